// Attention in IEEE fp32, for every dtype, over the registers of float_product.h. In an unnamed namespace on purpose, see
// kernels.h.
#pragma once
#include "attention.h"

namespace mxdit {
namespace {

template <class V>
struct FloatUnit : V {
  using Number = float;
  struct Session {};
  using typename V::F;
  static constexpr int kStep = 1, kWhole = 1, kBits = 24, kTileRows = V::kFloatRows, kParts = 3;
  static constexpr int kKeys = V::kLanes < 16 ? 256 : 512, kChain = 64;  // 256 KB of second level cache, or 512, at width 128
  static constexpr int kColumns = V::kLanes * V::kVectors;

  template <int R, int C, int kStride>
  [[gnu::always_inline]] static void multiply(const float* a, const float* w, int64_t steps, F (&sums)[R][C]) {
    for (int64_t i = 0; i < steps; i++, w += kColumns) {
#pragma GCC unroll 16
      for (int m = 0; m < R; m++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
          sums[m][c] = V::multiply_add(V::all(a[m * kStride + i]), V::load(w + c * V::kLanes), sums[m][c]);
    }
  }

  template <int R, int C, int kStride>
  static void products(const float* a, const float* w, int64_t steps, bool add, float* sums, int64_t stride) {
    tile_products<FloatUnit, R, C, kStride>(a, w, steps, add, sums, stride);
  }

  [[gnu::always_inline]] static void keep(const F (&weights)[1], F& total, float* out) {
    V::store(out, weights[0]);
    total += weights[0];
  }

  static void numbers(const uint8_t* from, int dtype, int64_t count, float* out) {
    with_dtype(dtype, [&]<class T>(const T*) {
      const T* x = reinterpret_cast<const T*>(from);
      for (int64_t i = 0; i < count; i++) out[i] = widen(x[i]);
    });
  }

  static void keys(const uint8_t* const* k, int dtype, int64_t width, float* out) {
    with_dtype(dtype, [&]<class T>(const T*) {
      for (int n = 0; n < kColumns; n++) {
        const T* x = reinterpret_cast<const T*>(k[n]);
        for (int64_t d = 0; d < width; d++) out[d * kColumns + n] = widen(x[d]);
      }
    });
  }

  static void values(const uint8_t* const* v, int count, int dtype, int64_t column, int columns, float* out) {
    memset(out, 0, kColumns * kColumns * sizeof(float));
    with_dtype(dtype, [&]<class T>(const T*) {
      for (int i = 0; i < count; i++)
        numbers(v[i] + column * static_cast<int64_t>(sizeof(T)), dtype, columns, out + i * kColumns);
    });
  }
};

template <class V>
Attention float_attention(const MxAttention& job) {
  return tiled_attention<FloatUnit<V>>(job);
}

}  // namespace
}  // namespace mxdit
