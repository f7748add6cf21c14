// What lies between linears and attention: RMS norm with rotary embedding, GELU; docs/numerics.md section 11. Plain loops, each
// operation rounded by itself, written so that compilers vectorize them for the path's instruction set.
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <math.h>

#include "numerics.h"

namespace mxdit {
namespace {

constexpr int kPiece = 32;  // numbers that registers hold at once, and the sums that a row's squares are spread over

template <class T>
float inverse_rms(const T* x, int64_t width, float eps) {
  float sums[kPiece] = {};
  int64_t k = 0;
  for (; k + kPiece <= width; k += kPiece)
    for (int i = 0; i < kPiece; i++) {
      const float value = widen(x[k + i]);
      sums[i] += value * value;
    }
  for (int i = 0; k + i < width; i++) {
    const float value = widen(x[k + i]);
    sums[i] += value * value;
  }
  for (int half = kPiece / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return 1.0f / sqrtf(sums[0] / static_cast<float>(width) + eps);
}

// `count` numbers of a row; cos and sin NULL: not rotated.
template <class T>
inline __attribute__((always_inline)) void norm_piece(const T* x, const float* weight, const float* cos, const float* sin,
                                                      float factor, bool rounded, int count, T* out) {
  float v[kPiece];
  for (int i = 0; i < count; i++) v[i] = widen(x[i]) * factor;
  if (rounded)
    for (int i = 0; i < count; i++) v[i] = rounded_to<T>(v[i]);
  for (int i = 0; i < count; i++) v[i] *= weight[i];
  if (cos) {
    // Not as a difference and a sum side by side, of which GCC makes one fused multiply-add, whatever -ffp-contract says.
    float other[kPiece], c[kPiece], s[kPiece];
    for (int i = 0; i < count; i++) v[i] = rounded_to<T>(v[i]);
    for (int i = 0; i < count; i += 2) {
      other[i] = v[i + 1], other[i + 1] = v[i];
      c[i] = c[i + 1] = cos[i];
      s[i] = -sin[i + 1], s[i + 1] = sin[i + 1];
    }
    for (int i = 0; i < count; i++) narrow(v[i] * c[i] + other[i] * s[i], out + i);
  } else {
    for (int i = 0; i < count; i++) narrow(v[i], out + i);
  }
}

template <class T>
void rms_norm_row(const MxRmsNorm& job, const T* x, const float* cos, const float* sin, T* out) {
  const float factor = inverse_rms(x, job.width, job.eps);
  for (int64_t head = 0; head < job.width; head += job.head)
    for (int64_t d = 0; d < job.head; d += kPiece) {
      const int64_t k = head + d;
      const float *const c = cos ? cos + d : cos, *const s = sin ? sin + d : sin;
      if (job.head - d >= kPiece)
        norm_piece(x + k, job.weight + k, c, s, factor, job.rounded, kPiece, out + k);
      else
        norm_piece(x + k, job.weight + k, c, s, factor, job.rounded, static_cast<int>(job.head - d), out + k);
    }
}

inline void rms_norm(const MxRmsNorm& job, int64_t first, int64_t last) {
  with_dtype(job.dtype, [&]<class T>(const T*) {
    for (int64_t row = first; row < last; row++) {
      const int64_t token = row / job.token_rows % job.tokens;
      rms_norm_row(job, static_cast<const T*>(job.x) + row * job.x_stride, job.cos ? job.cos + token * job.head : nullptr,
                   job.sin ? job.sin + token * job.head : nullptr, static_cast<T*>(job.out) + row * job.out_stride);
    }
  });
}

// 2^n times a polynomial for x = n ln 2 + s, of |x| up to 20.
inline float exp_of(float x) {
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // the sum rounds to an integer, which its low bits are
  const float n = shifted - 0x1.8p23f;
  const float s = (x - n * 0x1.62e8p-1f) - n * -0x1.e8082ep-16f;
  float p = 0x1.6a2434p-10f;
  p = p * s + 0x1.1239e2p-7f;
  p = p * s + 0x1.5558f2p-5f;
  p = p * s + 0x1.555492p-3f;
  p = p * s + 0x1.fffffcp-2f;
  p = p * s + 1.0f;
  p = p * s + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + (127u << 23));
}

inline float gelu_of(float x) {
  const float inner = 0x1.988454p-1f * (x + 0x1.6e4e26p-5f * ((x * x) * x));
  const uint32_t twice = bits_of(inner + inner), most = 0x41A00000u;  // 20; NaN as well, which x brings back below
  const float e = exp_of(float_of(min_of(twice & kMagnitude, most) | (twice & kSign)));
  const float tanh = (e + e) / (e + 1.0f) - 1.0f;
  return (0.5f * x) * (1.0f + tanh);
}

template <class T>
inline __attribute__((always_inline)) void gelu_piece(T* x, int count) {
  float v[kPiece];
  for (int i = 0; i < count; i++) v[i] = gelu_of(widen(x[i]));
  for (int i = 0; i < count; i++) narrow(v[i], x + i);
}

inline void gelu(const MxGelu& job, int64_t first, int64_t last) {
  with_dtype(job.dtype, [&]<class T>(const T*) {
    T* const x = static_cast<T*>(job.x);
    for (; first + kPiece <= last; first += kPiece) gelu_piece(x + first, kPiece);
    gelu_piece(x + first, static_cast<int>(last - first));
  });
}

constexpr Rowwise rowwise = {rms_norm, gelu};

}  // namespace
}  // namespace mxdit
