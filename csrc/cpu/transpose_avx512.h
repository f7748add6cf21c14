// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace mxdit {
namespace {

// row(i) for sixteen rows of 16 bytes.
template <class Row>
inline void transpose(Row row, __m512i out[4]) {
  __m512i four[4];  // lane j of four[i]: row 4j + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(4 + i), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(8 + i)), row(12 + i), 1);
    four[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  // Within each lane, a 4 x 4 transposition of 32-bit elements.
  const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
  const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
}

// Sixteen rows of up to 16 bytes, read from rows[i] + offset, to four registers: out[j] holds bytes 4j to 4j+3 of every
// row. What a row lacks of 16 bytes is not read and counts as zero.
inline void transpose_rows(const uint8_t* const* rows, int64_t offset, int bytes, __m512i out[4]) {
  const auto whole = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)); };
  const __mmask16 valid = static_cast<__mmask16>((1u << bytes) - 1u);
  const auto part = [&](int i) { return _mm_maskz_loadu_epi8(valid, rows[i] + offset); };
  bytes == 16 ? transpose(whole, out) : transpose(part, out);
}

}  // namespace
}  // namespace mxdit
