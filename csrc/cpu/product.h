// What every product shares: the activations' rows as codes, and results from fp32 accumulators.
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "numerics.h"

namespace mxdit {
namespace {

constexpr int kMostColumns = 32;  // that a product works on at once

// One row of the activations, packed. Where the job brings floats they are encoded into `scratch` first.
struct PackedRow {
  const uint8_t *codes, *scale;
  const float* outer;
};

// The outer scale of a group; it counts as 1 where the activations have none.
inline float outer_of(const PackedRow& row, int64_t group) { return row.outer ? row.outer[group] : 1.0f; }

inline bool four_bit(const MxLinear& job) { return job.a_format == MX_FP4 && job.w_format == MX_FP4; }

inline int64_t packed_row_bytes(const MxLinear& job) {
  return job.x ? groups_of(job.k) * 4 + code_bytes(job.a_format, job.k) + blocks_of(job.k) : 0;
}

inline PackedRow packed_row(const MxLinear& job, int64_t row, void (*encode)(const MxEncode&, int64_t, int64_t),
                            uint8_t* scratch) {
  const int64_t codes = code_bytes(job.a_format, job.k), blocks = blocks_of(job.k), groups = groups_of(job.k);
  if (!job.x)
    return {job.a_codes + row * codes, job.a_scale + row * blocks, job.a_outer ? job.a_outer + row * groups : nullptr};
  float* outer = reinterpret_cast<float*>(scratch);
  uint8_t *to_codes = scratch + groups * 4, *to_scale = to_codes + codes;
  const int64_t element = job.x_dtype == MX_FP32 ? 4 : 2;
  const MxEncode one = {static_cast<const uint8_t*>(job.x) + row * job.x_stride * element,
                        1, job.k, job.x_stride, job.x_dtype, job.a_format, job.rule, MX_RINT, job.mul_scale,
                        to_codes, to_scale, job.a_dual ? outer : nullptr};
  encode(one, 0, 1);
  return {to_codes, to_scale, job.a_dual ? outer : nullptr};
}

// x of a job that does not quantize its activations: n floats from (row, k), multiplied by mul_scale in their own dtype.
inline void float_activations(const MxLinear& job, int64_t row, int64_t k, int n, float* out) {
  with_dtype(job.x_dtype, [&]<class T>(const T*) {
    const T* x = static_cast<const T*>(job.x) + row * job.x_stride + k;
    for (int i = 0; i < n; i++) out[i] = widen(x[i]);
    if (job.mul_scale)
      for (int i = 0; i < n; i++) out[i] = rounded_to<T>(out[i] * job.mul_scale[k + i]);
  });
}

// The bias of columns [n0, n1).
inline void bias_columns(const MxLinear& job, int64_t n0, int64_t n1, float* out) {
  with_dtype(job.bias_dtype, [&]<class T>(const T*) {
    for (int64_t n = n0; n < n1; n++) out[n - n0] = widen(static_cast<const T*>(job.bias)[n]);
  });
}

// Where the sums of columns [n0, n1) start: from the bias in a sum over scaled groups, else from zero; section 4.
inline void start_sums(const MxLinear& job, float* sums, int64_t rows, int columns, int64_t n0, int64_t n1) {
  float row[kMostColumns] = {};
  if (job.w_outer && job.bias) bias_columns(job, n0, n1, row);
  for (int64_t m = 0; m < rows; m++) memcpy(sums + m * columns, row, static_cast<size_t>(columns) * sizeof(float));
}

// n sums to results, with the bias and the limit that single-level products still lack.
template <class T>
inline void store_row(const float* sum, const float* bias, float limit, int n, T* out) {
  for (int i = 0; i < n; i++) {
    float v = sum[i] + bias[i];
    v = limit < v ? limit : v;  // comparisons leave a NaN alone
    v = -limit > v ? -limit : v;
    narrow(v, out + i);
  }
}

// Sums (rows, columns) to rows [m0, m1) and columns [n0, n1) of the result.
inline void store_sums(const MxLinear& job, const float* sums, int columns, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  float bias[kMostColumns];
  for (float& of_column : bias) of_column = -0.0f;  // which changes nothing
  if (job.bias && !job.w_outer) bias_columns(job, n0, n1, bias);
  with_dtype(job.out_dtype, [&]<class T>(const T* dtype) {
    const float limit = job.w_outer || job.out_dtype == MX_FP32 ? float_of(kInf) : largest(dtype);
    T* out = static_cast<T*>(job.out) + m0 * job.n + n0;
    for (int64_t m = m0; m < m1; m++, sums += columns, out += job.n) {
      if (n1 - n0 == kMostColumns)  // the length a compiler sees
        store_row(sums, bias, limit, kMostColumns, out);
      else
        store_row(sums, bias, limit, static_cast<int>(n1 - n0), out);
    }
  });
}

// The outer scales of a group: the weights' columns [n0, n0 + columns), the last one repeated behind n.
inline void outer_column(const MxLinear& job, int64_t group, int64_t n0, int columns, float* out) {
  for (int n = 0; n < columns; n++) out[n] = job.w_outer[min_of(n0 + n, job.n - 1) * groups_of(job.k) + group];
}

// Elements of K in a group; the last may have fewer.
inline int group_length(const MxLinear& job, int64_t group) {
  return static_cast<int>(min_of<int64_t>(kGroup, job.k - group * kGroup));
}

}  // namespace
}  // namespace mxdit
