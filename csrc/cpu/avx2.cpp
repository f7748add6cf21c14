// AVX2 with FMA: Haswell and newer, Zen and newer.
#include "float_attention.h"
#include "int8_attention.h"
#include "int_avx2.h"
#include "rowwise.h"

namespace mxdit {
namespace {

// AVX2's products of bytes saturate, so codes take 16 bits.
struct Int8 {
  static constexpr int kLanes = 8, kVectors = 2, kRows = 4, kSide = 2, kQueryOffset = 0, kValueOffset = 0;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef int16_t Code;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I dot_keys(I sum, I x, const Code* two) {
    int32_t both;
    memcpy(&both, two, 4);
    return sum + (I)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi32(both));
  }
  static I dot_values(I sum, I x, const Code* two) { return dot_keys(sum, x, two); }
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
