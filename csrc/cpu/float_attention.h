// Attention in IEEE fp32: keys and values as floats, a query at a time against all of them. What each path has until it has
// a better one. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <math.h>

#include "numerics.h"

namespace mxdit {
namespace {

inline float number_at(const void* from, int64_t at, int dtype) {
  float value = 0.0f;
  with_dtype(dtype, [&](auto* type) { value = widen(static_cast<decltype(type)>(from)[at]); });
  return value;
}

// What the mask adds to a logit: 0 or -inf where it is of bools, or not there.
inline float mask_at(const MxAttention& job, int64_t batch, int64_t head, int64_t query, int64_t key) {
  if (job.causal && key > query) return -HUGE_VALF;
  if (job.mask_dtype == MX_NO_MASK) return 0.0f;
  const int64_t at = batch * job.mask_strides[0] + head * job.mask_strides[1] + query * job.mask_strides[2] + key * job.mask_strides[3];
  if (job.mask_dtype == MX_BOOL_MASK) return static_cast<const uint8_t*>(job.mask)[at] ? 0.0f : -HUGE_VALF;
  return number_at(job.mask, at, job.mask_dtype);
}

inline void float_keys(const MxAttention& job, int64_t batch, int64_t kv_head, int64_t first, int64_t last, uint8_t* prepared, uint8_t*) {
  float* k = reinterpret_cast<float*>(prepared);
  float* v = k + job.keys * job.width;
  for (int64_t key = first; key < last; key++) {
    const int64_t from_k = batch * job.k_strides[0] + key * job.k_strides[1] + kv_head * job.k_strides[2];
    const int64_t from_v = batch * job.v_strides[0] + key * job.v_strides[1] + kv_head * job.v_strides[2];
    for (int64_t d = 0; d < job.width; d++) k[key * job.width + d] = number_at(job.k, from_k + d, job.dtype);
    for (int64_t d = 0; d < job.v_width; d++) v[key * job.v_width + d] = number_at(job.v, from_v + d, job.dtype);
  }
}

inline void float_queries(const MxAttention& job, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared,
                          uint8_t* scratch) {
  const float* k = reinterpret_cast<const float*>(prepared);
  const float* v = k + job.keys * job.width;
  float* const q = reinterpret_cast<float*>(scratch);
  float* const sums = q + job.width;
  float* const logits = sums + job.v_width;
  for (int64_t query = first; query < last; query++) {
    const int64_t from = batch * job.q_strides[0] + query * job.q_strides[1] + head * job.q_strides[2];
    for (int64_t d = 0; d < job.width; d++) q[d] = number_at(job.q, from + d, job.dtype);
    float highest = -HUGE_VALF, total = 0.0f;
    for (int64_t key = 0; key < job.keys; key++) {
      float product = 0.0f;
      for (int64_t d = 0; d < job.width; d++) product += q[d] * k[key * job.width + d];
      logits[key] = product * job.scale + mask_at(job, batch, head, query, key);
      if (logits[key] > highest) highest = logits[key];
    }
    for (int64_t d = 0; d < job.v_width; d++) sums[d] = 0.0f;
    for (int64_t key = 0; key < job.keys && highest > -HUGE_VALF; key++) {
      const float weight = expf(logits[key] - highest);
      total += weight;
      for (int64_t d = 0; d < job.v_width; d++) sums[d] += weight * v[key * job.v_width + d];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t to = ((batch * job.queries + query) * job.heads + head) * job.v_width;
    for (int64_t d = 0; d < job.v_width; d++) {
      const float value = sums[d] * inverse;
      switch (job.dtype) {
        case MX_BF16: narrow(value, static_cast<Bf16*>(job.out) + to + d); break;
        case MX_FP16: narrow(value, static_cast<Fp16*>(job.out) + to + d); break;
        default: narrow(value, static_cast<float*>(job.out) + to + d);
      }
    }
  }
}

inline Attention float_attention(const MxAttention& job) {
  const int64_t bytes = (job.keys * (job.width + job.v_width) * 4 + 64) / 64 * 64;  // some, also without keys
  return {bytes, 64, 16, (job.width + job.v_width + job.keys) * 4, float_keys, float_queries};
}

}  // namespace
}  // namespace mxdit
