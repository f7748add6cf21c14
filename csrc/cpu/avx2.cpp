// AVX2 with FMA: Haswell and newer, Zen and newer.
#include <immintrin.h>

#include "float_attention.h"
#include "float_product.h"
#include "int_product.h"

namespace mxdit {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2, kRows = 3, kFloatRows = 6, kOffset = 12, kFewRows = 0;
  static constexpr bool kWindows = false;
  static constexpr int kWidth = kLanes * kVectors;
  typedef float F __attribute__((vector_size(32)));
  typedef __m256i Sum;  // int16: a block's pairs sum to 8 * 2 * 24 * 12 at most

  static constexpr auto encode = encode_any;
  static F all(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(__m256i x) { return _mm256_cvtepi32_ps(x); }

  static Sum begin(int32_t) { return _mm256_setzero_si256(); }
  static Sum dot(Sum sum, const uint8_t* weights, int32_t four) {
    const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights));
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(four)));
  }
  static __m256i finish(Sum sum, int32_t start) {
    return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(start));
  }

  static constexpr auto prepare_group = int_prepare_group<Avx2>;

  // A block's 16 bytes of codes to 32 bytes of activations, as IntGroup has them.
  static void unpack_row(const uint8_t* codes, int shift, int8_t* q) {
    const __m128i doubled = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubled[shift]));
    const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
    const __m128i even = _mm_shuffle_epi8(doubled, _mm_and_si128(two, low));
    const __m128i odd = _mm_shuffle_epi8(doubled, _mm_and_si128(_mm_srli_epi16(two, 4), low));
    _mm_store_si128(reinterpret_cast<__m128i*>(q), _mm_unpacklo_epi32(even, odd));
    _mm_store_si128(reinterpret_cast<__m128i*>(q + 16), _mm_unpackhi_epi32(even, odd));
  }

  static bool unpack_scales(const WeightPanel& panel, int64_t group, int blocks, float* out) {
    for (int n = 0; n < kWidth; n++)
      for (int b = 0; b < blocks; b++) {
        const uint8_t byte = panel.scale[n][group * kGroupBlocks + b];
        if (byte > kTopByte) return false;
        out[b * kWidth + n] = scale_value(byte);
      }
    return true;
  }

  static void unpack_weights(const WeightPanel& panel, int64_t block, uint8_t* out) {
    uint8_t padded[kWidth][16];
    const int bytes = panel.block_codes(block);
    const auto codes = [&](int n) -> const uint8_t* {
      const uint8_t* at = panel.codes[n] + block * 16;
      if (bytes == 16) return at;
      memset(padded[n], 0, 16);
      return static_cast<const uint8_t*>(memcpy(padded[n], at, static_cast<size_t>(bytes)));
    };
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i shifted =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    for (int half = 0; half < kVectors; half++) {
      const auto row = [&](int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes(half * 8 + i)));
      };
      __m256i two[4];  // lane j of two[i]: column 4j + i
      for (int i = 0; i < 4; i++) two[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(4 + i), 1);
      // Within each lane, a 4 x 4 transposition of 32-bit elements.
      const __m256i a = _mm256_unpacklo_epi32(two[0], two[1]), b = _mm256_unpackhi_epi32(two[0], two[1]);
      const __m256i c = _mm256_unpacklo_epi32(two[2], two[3]), d = _mm256_unpackhi_epi32(two[2], two[3]);
      const __m256i dwords[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                                 _mm256_unpackhi_epi64(b, d)};
      for (int j = 0; j < 4; j++) {
        uint8_t* at = out + (j * 2 * kVectors + half) * 32;
        _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_shuffle_epi8(shifted, _mm256_and_si256(dwords[j], low)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(at + kVectors * 32),
                           _mm256_shuffle_epi8(shifted, _mm256_and_si256(_mm256_srli_epi16(dwords[j], 4), low)));
      }
    }
  }
};

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Avx2>(job) : float_product<Avx2>(job);
}

}  // namespace

Path avx2_path() { return {"avx2", encode_any, decode_any, fast, float_product<Avx2>, float_attention}; }

}  // namespace mxdit
