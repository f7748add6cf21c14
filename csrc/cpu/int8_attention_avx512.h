// int8_attention.h on AVX-512's byte dot products, of unsigned with signed bytes. In an unnamed namespace on purpose, see
// kernels.h.
#pragma once
#include <immintrin.h>

#include "int8_attention.h"

namespace mxdit {
namespace {

struct VnniInt8 {
  static constexpr int kLanes = 16, kVectors = 2, kRows = 8, kSide = 4, kTogether = 1, kQueryOffset = 128, kValueOffset = 0;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef int8_t Code;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I dot_keys(I sum, const I* x, const Code* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x[0], _mm512_set1_epi32(four));
  }
  static I dot_values(I sum, const I* x, const Code* codes) { return dot_keys(sum, x, codes); }
  static I add_codes(I sum, I x) { return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, _mm512_set1_epi8(1)); }
};

}  // namespace
}  // namespace mxdit
