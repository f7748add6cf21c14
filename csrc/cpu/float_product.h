// Any product in IEEE fp32: both operands decoded, products summed in fp32, group of K by group of K. It takes every
// value, so it is what the other ways fall back to. A template over registers, `V`: kLanes, kVectors, kFloatRows, F, load,
// store, all, and fma (which here may also be a product and a sum: see docs/numerics.md section 9).
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "panel.h"

namespace mxdit {
namespace {

struct alignas(64) FloatGroup {
  float v[kGroup];
};

// n activations from (row, k) of a row that holds `packed` codes or, without them, floats.
inline void activations(const MxLinear& job, int64_t row, const PackedRow& packed, int64_t k, int n, float* out) {
  if (!packed.codes) return float_activations(job, row, k, n, out);
  for (int i = 0; i < n; i += kBlock) {
    float v[kBlock];
    const int count = min_of(kBlock, n - i);
    decode_block(packed.codes + code_bytes(job.a_format, k + i), count, job.a_format, packed.scale[(k + i) / kBlock], v);
    memcpy(out + i, v, static_cast<size_t>(count) * sizeof(float));
  }
}

template <class V>
bool float_prepare(const MxLinear& job, int64_t base, int64_t held, int64_t first, int64_t last, uint8_t* a, uint8_t* scratch) {
  FloatGroup* out = reinterpret_cast<FloatGroup*>(a);
  float* outer = reinterpret_cast<float*>(out + groups_of(job.k) * held);
  for (int64_t m = first; m < last; m++) {
    PackedRow row = {};
    if (job.a_format != MX_FLOAT) row = packed_row(job, base + m, V::encode, scratch);
    for (int64_t g = 0; g < groups_of(job.k); g++) {
      activations(job, base + m, row, g * kGroup, group_length(job, g), out[g * held + m].v);
      if (job.w_outer) outer[g * held + m] = outer_of(row, g);
    }
  }
  return true;
}

template <class V, int R, bool kOuter>
void float_group(const FloatGroup* a, int length, const float* w, const float* a_outer, const float* w_outer, float* sums) {
  using F = typename V::F;
  constexpr int width = V::kLanes * V::kVectors;
  F p[R][V::kVectors] = {};
  for (int k = 0; k < length; k++, w += width) {
#pragma GCC unroll 16
    for (int m = 0; m < R; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V::kVectors; v++)
        p[m][v] = V::multiply_add(V::all(a[m].v[k]), V::load(w + v * V::kLanes), p[m][v]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V::kVectors; v++) {
      float* at = sums + m * width + v * V::kLanes;
      if (kOuter)
        V::store(at, V::fma(p[m][v], V::all(a_outer[m]) * V::load(w_outer + v * V::kLanes), V::load(at)));
      else
        V::store(at, p[m][v] + V::load(at));
    }
}

template <class V, bool kOuter>
void float_rows(const FloatGroup* a, int64_t rows, int length, const float* w, const float* a_outer, const float* w_outer,
                float* sums) {
  constexpr int width = V::kLanes * V::kVectors;
  int64_t m = 0;
  for (; m + V::kFloatRows <= rows; m += V::kFloatRows)
    float_group<V, V::kFloatRows, kOuter>(a + m, length, w, a_outer + m, w_outer, sums + m * width);
  for (; m < rows; m++) float_group<V, 1, kOuter>(a + m, length, w, a_outer + m, w_outer, sums + m * width);
}

template <class V>
bool float_multiply(const MxLinear& job, int64_t base, int64_t held, const uint8_t* a, int64_t m0, int64_t m1, int64_t n0,
                    int64_t n1, uint8_t* scratch) {
  constexpr int width = V::kLanes * V::kVectors;
  float* w = reinterpret_cast<float*>(scratch);
  float *w_outer = w + kGroup * width, *sums = w_outer + width;
  const FloatGroup* groups = reinterpret_cast<const FloatGroup*>(a);
  const float* a_outer = reinterpret_cast<const float*>(groups + groups_of(job.k) * held);
  const WeightPanel panel(job, n0, width);
  start_sums(job, sums, m1 - m0, width, n0, n1);
  for (int64_t g = 0; g < groups_of(job.k); g++) {
    const int length = group_length(job, g);
    for (int b = 0; b < blocks_of(length); b++) plain_floats(panel, g * kGroupBlocks + b, width, w + b * kBlock * width);
    const FloatGroup* rows = groups + g * held + m0;
    if (job.w_outer) {
      outer_column(job, g, n0, width, w_outer);
      float_rows<V, true>(rows, m1 - m0, length, w, a_outer + g * held + m0, w_outer, sums);
    } else {
      float_rows<V, false>(rows, m1 - m0, length, w, a_outer, w_outer, sums);
    }
  }
  store_sums(job, sums, width, base + m0, base + m1, n0, n1);
  return true;
}

template <class V>
Product float_product(const MxLinear& job) {
  constexpr int width = V::kLanes * V::kVectors;
  const int64_t rows = 512, outer = job.w_outer ? 4 : 0;
  return {8 << 20,
          static_cast<int64_t>(sizeof(FloatGroup)) + outer,
          width,
          rows,
          job.a_format == MX_FLOAT ? 0 : packed_row_bytes(job),
          (kGroup + 1 + rows) * width * 4,
          float_prepare<V>,
          float_multiply<V>};
}

}  // namespace
}  // namespace mxdit
