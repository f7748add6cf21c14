// Encoding with AVX-512: bf16 to the nearest E2M1, single or dual level, a block of 32 numbers in one register, and to E4M3.
// Everything else takes the plain loops of numerics.h. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>

#include "numerics.h"

namespace mxdit {
namespace {

inline uint32_t largest_magnitude_bf16(__m512i x) {
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitude), _mm512_extracti64x4_epi64(magnitude, 1));
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i inverted = _mm_xor_si128(eight, _mm_set1_epi16(-1));
  return 0xFFFFu ^ (static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(inverted))) & 0xFFFFu);
}

// E2M1 codes, two a byte, of 32 bf16 numbers divided by 2^(byte-127); `shift` is (byte - 3) << 7 in every lane. Taken off
// the magnitude's bits, that leaves 1.0 at three binades, 384. The decision points then are multiples of 32; on one, the
// even of the two codes is the lower one where bit 6 is 0. What remains are 25 steps for a look-up.
inline __m128i nearest_e2m1(__m512i x, __m512i shift) {
  alignas(64) static constexpr uint16_t codes[32] = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3,
                                                     4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
  const __m512i w = _mm512_subs_epu16(magnitude, shift);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(w, 6), _mm512_set1_epi16(1));
  const __m512i step = _mm512_srli_epi16(_mm512_add_epi16(_mm512_add_epi16(w, _mm512_set1_epi16(31)), odd), 5);
  const __m512i code = _mm512_permutexvar_epi16(step, _mm512_load_si512(codes));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(x, 12), _mm512_set1_epi16(8));
  const __m512i signed_code = _mm512_or_si512(code, sign);
  return _mm512_cvtepi32_epi8(_mm512_or_si512(signed_code, _mm512_srli_epi32(signed_code, 12)));
}

// Up to 16 full blocks. A scale's byte is ((amax + carry) >> 7) - 2 in bf16 bits: what a rule adds to the mantissa is what
// has to carry into the exponent. Subnormal scales and blocks with inf or NaN are left to `rare(block)`.
template <class Rare>
inline void encode_blocks_avx512(const Bf16* x, int blocks, int carry, uint8_t* codes, uint8_t* scale, Rare rare) {
  alignas(64) uint16_t amax[16] = {}, shift[32];
  for (int b = 0; b < blocks; b++) amax[b] = static_cast<uint16_t>(largest_magnitude_bf16(_mm512_loadu_si512(x + b * kBlock)));
  const __m256i largest = _mm256_load_si256(reinterpret_cast<const __m256i*>(amax));
  const __m256i field = _mm256_srli_epi16(_mm256_add_epi16(largest, _mm256_set1_epi16(static_cast<int16_t>(carry))), 7);
  const __m256i byte = _mm256_subs_epu16(field, _mm256_set1_epi16(2));
  _mm256_store_si256(reinterpret_cast<__m256i*>(shift), _mm256_slli_epi16(_mm256_sub_epi16(byte, _mm256_set1_epi16(3)), 7));
  const __mmask16 valid = static_cast<__mmask16>((1u << blocks) - 1u);
  _mm_mask_storeu_epi8(scale, valid, _mm256_cvtepi16_epi8(byte));
  for (int b = 0; b < blocks; b++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + b * 16),
                     nearest_e2m1(_mm512_loadu_si512(x + b * kBlock), _mm512_set1_epi16(static_cast<int16_t>(shift[b]))));
  const __mmask16 low = _mm256_cmplt_epu16_mask(largest, _mm256_set1_epi16(8 << 7)) & _mm256_test_epi16_mask(largest, largest);
  unsigned special = low | _mm256_cmpge_epu16_mask(largest, _mm256_set1_epi16(0x7F80));
  for (; special; special &= special - 1) rare(__builtin_ctz(special));
}

// fp32 lanes to the nearest bf16, as fp32.
inline __m512 nearest_bf16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), lsb);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_and_si512(rounded, _mm512_set1_epi32(-0x10000)), nan,
                                                   _mm512_set1_epi32(0x7FC00000)));
}

// Sixteen bf16 numbers as fp32, times those of `mul`, if any.
inline __m512 sixteen(const Bf16* x, const float* mul) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  return mul ? nearest_bf16(_mm512_mul_ps(v, _mm512_loadu_ps(mul))) : v;
}

// A group of n elements, a multiple of 32.
inline void encode_dual_group_avx512(const Bf16* x, const float* mul, int n, uint8_t* codes, uint8_t* scale, float* outer) {
  alignas(64) float t[kGroup];
  __m512i finite_max = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) {
    const __m512 v = sixteen(x + i, mul ? mul + i : nullptr);
    _mm512_store_ps(t + i, v);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    finite_max = _mm512_mask_max_epi32(finite_max, finite, finite_max, magnitude);
  }
  float l0 = float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(finite_max))) * float_of(0x3E2AAAABu);
  if (l0 < 0x1p-126f) l0 = 0.0f;
  *outer = l0;
  const auto quotient = [&](const float* p) {
    const __m512 v = _mm512_load_ps(p);
    const __mmask16 nonzero = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return _mm512_castps_si512(nearest_bf16(_mm512_mask_div_ps(v, nonzero, v, _mm512_set1_ps(l0))));
  };
  alignas(64) Bf16 quotients[kGroup];
  for (int i = 0; i < n; i += 16)
    _mm256_store_si256(reinterpret_cast<__m256i*>(quotients + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quotient(t + i), 16)));
  encode_blocks_avx512(quotients, n / kBlock, 0, codes, scale, [&](int b) {
    float v[kBlock];
    for (int i = 0; i < kBlock; i++) v[i] = widen(quotients[b * kBlock + i]);
    const Scale s = level_one_scale(largest_magnitude(v));
    scale[b] = s.byte;
    store_codes(v, kBlock, s, MX_FP4, MX_RINT, true, codes + b * 16);
  });
}

inline void encode_dual_row_avx512(const MxEncode& job, const Bf16* x, uint8_t* codes, uint8_t* scale, float* outer) {
  for (int64_t g = 0; g < groups_of(job.k); g++) {
    const float* mul = job.mul_scale ? job.mul_scale + g * kGroup : nullptr;
    const int n = static_cast<int>(min_of<int64_t>(kGroup, job.k - g * kGroup));
    if (n % kBlock == 0)
      encode_dual_group_avx512(x + g * kGroup, mul, n, codes + g * kGroup / 2, scale + g * kGroupBlocks, outer + g);
    else
      encode_dual_group(x + g * kGroup, mul, n, MX_RINT, codes + g * kGroup / 2,
                        scale + g * kGroupBlocks, outer + g);
  }
}

// E4M3 codes of 32 bf16 numbers divided by 2^(byte-127), for bytes from kLeastE4m3 on: what is subnormal in bf16 then is far
// below the smallest code.
constexpr int kLeastE4m3 = 16;

inline __m256i nearest_e4m3(__m512i x, int byte) {
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
  // To seven bits of fraction under a code's exponent, 0 where that is below the least normal one's, 1.
  const __m512i w = _mm512_sub_epi16(magnitude, _mm512_set1_epi16(static_cast<int16_t>((byte - 7) * 128)));
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi16(w, 4), one);
  const __m512i rounded = _mm512_srli_epi16(_mm512_add_epi16(_mm512_add_epi16(w, _mm512_set1_epi16(7)), lsb), 4);
  const __m512i normal = _mm512_min_epi16(rounded, _mm512_set1_epi16(0x7E));
  // Subnormal codes: the significand shifted to multiples of 2^-9, to the nearest even. Nine places leave nothing of it.
  const __m512i field = _mm512_srai_epi16(w, 7);
  const __m512i shift = _mm512_min_epu16(_mm512_sub_epi16(_mm512_set1_epi16(5), field), _mm512_set1_epi16(9));
  const __m512i significand = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi16(0x7F)), _mm512_set1_epi16(0x80));
  const __m512i odd = _mm512_and_si512(_mm512_srlv_epi16(significand, shift), one);
  const __m512i half = _mm512_sllv_epi16(one, _mm512_sub_epi16(shift, one));
  const __m512i sum = _mm512_add_epi16(_mm512_sub_epi16(_mm512_add_epi16(significand, half), one), odd);
  const __mmask32 small = _mm512_cmplt_epi16_mask(w, _mm512_set1_epi16(1 << 7));
  const __m512i code = _mm512_mask_mov_epi16(normal, small, _mm512_srlv_epi16(sum, shift));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(x, 8), _mm512_set1_epi16(0x80));
  return _mm512_cvtepi16_epi8(_mm512_or_si512(code, sign));
}

// 32 bf16 numbers, times those of `mul`, if any.
inline __m512i thirty_two(const Bf16* x, const float* mul) {
  if (!mul) return _mm512_loadu_si512(x);
  const auto bits = [](__m512 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(bits(sixteen(x, mul))), bits(sixteen(x + 16, mul + 16)), 1);
}

inline void encode_row_avx512(const MxEncode& job, const Bf16* x, uint8_t* codes, uint8_t* scale) {
  static constexpr int carries[] = {0, 0x17, 0x3F, 0x1F};  // by rule; 1.8125 = 7.25 / 4 is 104 / 128 above 1
  const auto rare = [&](int64_t b) {
    encode_block(x + b * kBlock, job.mul_scale ? job.mul_scale + b * kBlock : nullptr,
                 static_cast<int>(min_of<int64_t>(kBlock, job.k - b * kBlock)), MX_FP4, job.rule, MX_RINT, codes + b * 16,
                 scale + b);
  };
  alignas(64) Bf16 products[kGroup];
  const int64_t full = job.k / kBlock;
  for (int64_t b = 0; b < full; b += 16) {
    const int blocks = static_cast<int>(min_of<int64_t>(16, full - b));
    const Bf16* from = x + b * kBlock;
    if (job.mul_scale) {
      for (int i = 0; i < blocks * kBlock; i += kBlock)
        _mm512_store_si512(products + i, thirty_two(from + i, job.mul_scale + b * kBlock + i));
      from = products;
    }
    encode_blocks_avx512(from, blocks, carries[job.rule], codes + b * 16, scale + b, [&](int at) { rare(b + at); });
  }
  if (full < blocks_of(job.k)) rare(full);
}

inline void encode_fp8_row_avx512(const MxEncode& job, const Bf16* x, uint8_t* codes, uint8_t* scale) {
  for (int64_t k = 0; k < job.k; k += kBlock) {
    const float* mul = job.mul_scale ? job.mul_scale + k : nullptr;
    if (k + kBlock <= job.k) {
      const __m512i v = thirty_two(x + k, mul);
      const Scale s = single_scale(largest_magnitude_bf16(v) << 16, MX_FP8, job.rule, false);
      if (s.byte >= kLeastE4m3 && s.byte != 0xFF) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), nearest_e4m3(v, s.byte));
        scale[k / kBlock] = s.byte;
        continue;
      }
    }
    encode_block(x + k, mul, static_cast<int>(min_of<int64_t>(kBlock, job.k - k)), MX_FP8, job.rule, MX_RINT, codes + k,
                 scale + k / kBlock);
  }
}

inline void encode_avx512(const MxEncode& job, int64_t first, int64_t last) {
  if (job.x_dtype != MX_BF16 || job.round != MX_RINT) return encode_any(job, first, last);
  for (int64_t row = first; row < last; row++) {
    const Bf16* x = static_cast<const Bf16*>(job.x) + row * job.x_stride;
    uint8_t *codes = job.codes + row * code_bytes(job.format, job.k), *scale = job.scale + row * blocks_of(job.k);
    if (job.format == MX_FP8)
      encode_fp8_row_avx512(job, x, codes, scale);
    else if (job.outer)
      encode_dual_row_avx512(job, x, codes, scale, job.outer + row * groups_of(job.k));
    else
      encode_row_avx512(job, x, codes, scale);
  }
}

}  // namespace
}  // namespace mxdit
