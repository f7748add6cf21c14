// AVX2 with FMA: Haswell and newer, Zen and newer.
#include "float_attention.h"
#include "int8_attention.h"
#include "int_avx2.h"
#include "rowwise.h"

namespace mxdit {
namespace {

// AVX2's products of bytes saturate, so codes take 16 bits; and two registers multiply at once where four add, so that a
// multiplication in place of an addition pays.
struct Int8 {
  static constexpr int kLanes = 8, kVectors = 2, kRows = 4, kSide = 2, kTogether = 2, kQueryOffset = 0, kValueOffset = 0;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef int16_t Code;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static __m256i broadcast(const Code* codes) {
    int32_t two;
    memcpy(&two, codes, 4);
    return _mm256_set1_epi32(two);
  }
  static I dot_keys(I sum, const I* x, const Code* four) {
    const __m256i a = _mm256_add_epi16((__m256i)x[0], broadcast(four + 2)), b = _mm256_add_epi16((__m256i)x[1], broadcast(four));
    return sum + (I)_mm256_madd_epi16(a, b);
  }
  static I dot_values(I sum, const I* x, const Code* four) { return dot_keys(sum, x, four); }
  static I dot_paired(I sum, const I* x) { return sum + (I)_mm256_madd_epi16((__m256i)x[0], (__m256i)x[1]); }
  static I add_codes(I sum, I x) { return sum + (I)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
};

Attention attention(const MxAttention& job) {
  return job.method == MX_INT8 ? int8_attention<Int8>(job) : float_attention<Avx2>(job);
}

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Avx2>(job) : float_product<Avx2>(job);
}

}  // namespace

Path avx2_path() { return {"avx2", encode_any, decode_any, fast, float_product<Avx2>, attention, rowwise}; }

}  // namespace mxdit
