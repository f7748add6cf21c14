// Attention on BF16 dot products: queries, keys and values as they are, weights rounded to bf16, sums in fp32. In an unnamed
// namespace on purpose, see kernels.h.
#pragma once
#include "float_attention.h"
#include "int_avx512.h"

namespace mxdit {
namespace {

struct Bf16Unit : Vnni {
  using Number = uint16_t;
  struct Session {};
  static constexpr int kStep = 2, kWhole = 2, kBits = 8, kTileRows = 12, kParts = 3, kKeys = 512, kChain = 256;
  static constexpr int kColumns = kLanes * kVectors;

  template <int R, int C, int kStride>
  [[gnu::always_inline]] static void multiply(const uint16_t* a, const uint16_t* w, int64_t steps, F (&sums)[R][C]) {
    for (int64_t i = 0; i < steps; i++, w += 2 * kColumns) {
#pragma GCC unroll 16
      for (int m = 0; m < R; m++) {
        int32_t two;
        memcpy(&two, a + m * kStride + 2 * i, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) sums[m][c] = _mm512_dpbf16_ps(sums[m][c], x, (__m512bh)_mm512_load_si512(w + c * 2 * kLanes));
      }
    }
  }

  template <int R, int C, int kStride>
  static void products(const uint16_t* a, const uint16_t* w, int64_t steps, bool add, float* sums, int64_t stride) {
    tile_products<Bf16Unit, R, C, kStride>(a, w, steps, add, sums, stride);
  }

  // Their sum is of what they were rounded to: then values that are all the same come out as they are.
  [[gnu::always_inline]] static void keep(const F (&weights)[2], F& total, uint16_t* out) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(weights[1], weights[0]);
    _mm512_storeu_si512(out, (__m512i)rounded);
    total = _mm512_dpbf16_ps(total, rounded, (__m512bh)_mm512_set1_epi16(0x3F80));
  }

  static void numbers(const uint8_t* from, int, int64_t count, uint16_t* out) { memcpy(out, from, static_cast<size_t>(count) * 2); }

  static void keys(const uint8_t* const* k, int, int64_t width, uint16_t* out) {
    for (int half = 0; half < kVectors; half++)
      for (int64_t d = 0; d < width; d += 8) {
        __m512i pairs[4];
        transpose_rows(k + half * 16, d * 2, static_cast<int>(min_of<int64_t>(16, (width - d) * 2)), pairs);
        for (int j = 0; j < 4 && d + 2 * j < width; j++) _mm512_store_si512(out + ((d / 2 + j) * kVectors + half) * 32, pairs[j]);
      }
  }

  static void values(const uint8_t* const* v, int count, int, int64_t column, int columns, uint16_t* out) {
    const __mmask32 valid = columns == kColumns ? ~0u : (1u << columns) - 1u;
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                           3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int i = 0; i < kColumns; i += 2, out += 2 * kColumns) {
      const __m512i even = _mm512_maskz_loadu_epi16(i < count ? valid : 0, v[i] + column * 2);
      const __m512i odd = _mm512_maskz_loadu_epi16(i + 1 < count ? valid : 0, v[i + 1] + column * 2);
      _mm512_store_si512(out, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(even, second, odd));
    }
  }
};

inline Attention bf16_attention(const MxAttention& job) {
  return job.dtype == MX_BF16 ? tiled_attention<Bf16Unit>(job) : float_attention<Vnni>(job);
}

}  // namespace
}  // namespace mxdit
