// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>

#include "int_product.h"

namespace mxdit {
namespace {

// A block's 16 bytes of codes to 32 bytes of activations, as IntGroup has them.
inline void unpack_row_x86(const uint8_t* codes, int shift, int8_t* q) {
  const __m128i doubled = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubled[shift]));
  const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(doubled, _mm_and_si128(two, low));
  const __m128i odd = _mm_shuffle_epi8(doubled, _mm_and_si128(_mm_srli_epi16(two, 4), low));
  _mm_store_si128(reinterpret_cast<__m128i*>(q), _mm_unpacklo_epi32(even, odd));
  _mm_store_si128(reinterpret_cast<__m128i*>(q + 16), _mm_unpackhi_epi32(even, odd));
}

}  // namespace
}  // namespace mxdit
