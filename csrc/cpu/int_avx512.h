// MXFP4 x MXFP4 on AVX-512's byte dot products, and fp32 products. Files that may use VBMI's look-ups in 64 bytes, as
// __AVX512VBMI__ tells, unpack weights faster. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>

#include "encode_avx512.h"
#include "float_product.h"
#include "int_product.h"
#include "transpose_avx512.h"

namespace mxdit {
namespace {

#ifdef __AVX512VBMI__
// Every code in every shift of a window, at code + 16 * shift.
struct WindowBytes {
  alignas(64) int8_t value[64];
  constexpr explicit WindowBytes(int middle) : value() {
    for (int shift = 0; shift <= kWindow; shift++)
      for (int code = 0; code < 16; code++) value[shift * 16 + code] = static_cast<int8_t>(middle + kDoubled[shift][code]);
  }
};
#endif

struct Vnni {
  static constexpr int kLanes = 16, kVectors = 2, kRows = 6, kFloatRows = 12, kOffset = 12, kFewRows = 4;
  static constexpr Windows kWindows = Windows::both;
  static constexpr int64_t kHeldBytes = 8 << 20;
  static constexpr int kWindowOffsets = 8, kWindowRows = 16;  // fewer rows do not pay for moving the weights into windows
  typedef float F __attribute__((vector_size(64)));
  typedef __m512i Sum;

  static constexpr auto encode = encode_avx512;
  static F all(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_float(__m512i x) { return _mm512_cvtepi32_ps(x); }

  static Sum begin(int32_t start) { return _mm512_set1_epi32(start); }
  static Sum dot(Sum sum, const uint8_t* weights, int32_t four) {
    return _mm512_dpbusd_epi32(sum, _mm512_load_si512(weights), _mm512_set1_epi32(four));
  }
  static __m512i finish(Sum sum, const float*) { return sum; }
  static constexpr auto at = by_eights;

  // As int_prepare_group, with four blocks to a register, one a lane.
  static bool prepare_group(const uint8_t* codes, int64_t bytes, const uint8_t* scale, int blocks, IntGroup& group,
                            IntWindow& window) {
    const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(8), ones = _mm512_set1_epi8(1);
    __m512i packed[4], magnitudes[4];
    for (int j = 0; j < 4; j++) {
      const int64_t left = bytes - j * 64;
      packed[j] = _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : left > 0 ? (1ull << left) - 1 : 0, codes + j * 64);
      magnitudes[j] = _mm512_and_si512(packed[j], _mm512_set1_epi8(0x77));
    }
    const __mmask16 valid = static_cast<__mmask16>((1u << blocks) - 1u);
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, scale));
    const __m512i some = by_block(magnitudes, [](__m512i x, __m512i y) { return _mm512_or_si512(x, y); });
    const __mmask16 any = _mm512_test_epi32_mask(some, some);  // a block of zeros goes into every window
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(0xFF));
    const int least = any ? static_cast<int>(_mm512_mask_reduce_min_epu32(any, byte)) : 0;
    const int most = static_cast<int>(_mm512_mask_reduce_max_epu32(any, byte));
    const bool fits = !nan && most - least <= kWindow;
    const __m512i shift = _mm512_maskz_sub_epi32(fits ? any : 0, byte, _mm512_set1_epi32(least));

    __m512i sums[4] = {};
    for (int j = 0; j * 4 < blocks; j++) {
      const __m512i of_lane = _mm512_add_epi32(_mm512_set1_epi32(j * 4),
                                               _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
      const __m512i shifts = _mm512_permutexvar_epi32(of_lane, shift);
      const auto value = [&](__m512i nibbles) {
        const __m512i code = _mm512_and_si512(nibbles, low);
        const __m512i magnitude = _mm512_sllv_epi32(_mm512_shuffle_epi8(doubled_magnitudes(), code), shifts);
        return _mm512_mask_sub_epi8(magnitude, _mm512_test_epi8_mask(code, sign), _mm512_setzero_si512(), magnitude);
      };
      const __m512i even = value(packed[j]), odd = value(_mm512_srli_epi16(packed[j], 4));
      const __m512i first = _mm512_unpacklo_epi32(even, odd), second = _mm512_unpackhi_epi32(even, odd);
      sums[j] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[j], ones, first), ones, second);
      int8_t* q = group.q + j * 4 * kBlock;  // of each block the first half, then the second
      _mm512_store_si512(q, _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second));
      _mm512_store_si512(q + 64, _mm512_permutex2var_epi64(first, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), second));
    }
    const __m512i sum = by_block(sums, [](__m512i x, __m512i y) { return _mm512_add_epi32(x, y); });
    const __m512i start = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-kOffset));
    _mm512_store_si512(group.start, start);
    window = {fits ? power_of_two(least - 129) : 0.0f, _mm512_reduce_add_epi32(start) * 8};

    // 2^(byte-129); the first three bytes give subnormal numbers.
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(byte, _mm512_set1_epi32(2)), 23);
    const __m512i subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(1 << 20), byte);
    __m512i scales = _mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(byte, _mm512_set1_epi32(3)), subnormal);
    scales = _mm512_mask_mov_epi32(scales, nan, _mm512_set1_epi32(0x7FC00000));
    if (fits) scales = _mm512_castps_si512(_mm512_set1_ps(window.scale));
    _mm512_store_si512(group.scale, scales);
    return !(_mm512_cmpgt_epi32_mask(byte, _mm512_set1_epi32(kTopByte)) & ~nan);
  }

  // Four registers have four blocks each, one a lane: what `combine` makes of a block's four dwords, in the blocks' order.
  template <class Combine>
  static __m512i by_block(const __m512i of[4], Combine combine) {
    const __m512i two = combine(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
    const __m512i more = combine(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
    const __m512i all = combine(_mm512_unpacklo_epi64(two, more), _mm512_unpackhi_epi64(two, more));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
  }

  // A look-up by code: twice the magnitude of an E2M1 value.
  static __m512i doubled_magnitudes() {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, 1, 2, 3, 4, 6, 8, 12));
  }

  static bool unpack_scales(const WeightPanel& panel, int64_t group, int blocks, float* out) {
    __m512i top = _mm512_setzero_si512();
    for (int half = 0; half < kVectors; half++) {
      __m512i dwords[4];
      transpose_rows(panel.scale + half * 16, group * kGroupBlocks, blocks, dwords);
      for (int b = 0; b < blocks; b++) {
        const __m512i byte = byte_of(dwords, b);
        top = _mm512_max_epu32(top, byte);
        const __m512i scale = _mm512_slli_epi32(byte, 23);
        const __m512i smallest = _mm512_set1_epi32(1 << 22);  // byte 0 is 2^-127
        _mm512_store_si512(out + b * kMostColumns + half * 16,
                           _mm512_mask_mov_epi32(scale, _mm512_testn_epi32_mask(byte, byte), smallest));
      }
    }
    return _mm512_reduce_max_epu32(top) <= kTopByte;
  }

#ifdef __AVX512VBMI__
  // Bytes of twice the value plus the offset, of the codes in the low nibbles. The look-up reads six bits and has each value
  // four times, so that the upper nibbles do not count.
  static __m512i shifted(__m512i codes) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_permutexvar_epi8(codes, table);
  }

  // How far each column's values are shifted in their window, as `windowed` takes it: in bits 4 and 5 of every byte.
  static __m512i window_shift(__m512i shift) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    return _mm512_slli_epi32(_mm512_shuffle_epi8(shift, first), 4);
  }

  // Bytes of 8 * kOffset plus the shifted values, by code and shift in one look-up.
  static __m512i windowed(__m512i codes, __m512i shift) {
    alignas(64) static constexpr WindowBytes table(8 * kOffset);
    const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), shift, 0xEA);  // (codes & 15) | shift
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(table.value));
  }
#else
  // Bytes of twice the value plus the offset, of the codes in the low nibbles.
  static __m512i shifted(__m512i codes) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }

  // How far each column's values are shifted in their window, as `windowed` takes it.
  static __m512i window_shift(__m512i shift) { return shift; }

  // Bytes of 8 * kOffset plus or minus the shifted values.
  static __m512i windowed(__m512i codes, __m512i shift) {
    const __m512i middle = _mm512_set1_epi8(8 * kOffset), code = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    // The largest, 12 << 3, stays within its byte.
    const __m512i magnitude = _mm512_sllv_epi32(_mm512_shuffle_epi8(doubled_magnitudes(), code), shift);
    return _mm512_mask_sub_epi8(_mm512_add_epi8(middle, magnitude), _mm512_test_epi8_mask(code, _mm512_set1_epi8(8)), middle,
                                magnitude);
  }
#endif

  static void unpack_weights(const WeightPanel& panel, int64_t block, uint8_t* out) {
    for (int half = 0; half < kVectors; half++) {
      __m512i dwords[4];
      transpose_rows(panel.codes + half * 16, block * 16, panel.block_codes(block), dwords);
      for (int j = 0; j < 4; j++) {
        uint8_t* at = out + (j * 2 * kVectors + half) * 64;
        _mm512_store_si512(at, shifted(dwords[j]));
        _mm512_store_si512(at + kVectors * 64, shifted(_mm512_srli_epi16(dwords[j], 4)));
      }
    }
  }

  // As int_group without windows, for a few rows: unpacked weights go from register to register.
  template <class Prefetch>
  static bool few_rows(const WeightPanel& panel, int64_t group, const IntGroup* a, const IntWindow*, int rows,
                       const float* a_outer, float* scales, const float* w_outer, int blocks, float* sums, Prefetch prefetch) {
    if (!unpack_scales(panel, group, blocks, scales)) return false;
    const IntWeights w = {nullptr, scales, w_outer, blocks};
    const auto multiply = rows == 1   ? some_rows<1, Prefetch>
                          : rows == 2 ? some_rows<2, Prefetch>
                          : rows == 3 ? some_rows<3, Prefetch>
                                      : some_rows<4, Prefetch>;
    multiply(panel, group, a, a_outer, w, sums, prefetch);
    return true;
  }

  template <int R, class Prefetch>
  static void some_rows(const WeightPanel& panel, int64_t group, const IntGroup* a, const float* a_outer, const IntWeights& w,
                        float* sums, Prefetch prefetch) {
    for (int half = 0; half < kVectors; half++) {
      F p[R] = {};
      for (int b = 0; b < w.blocks; b++) {
        if (half == 0) prefetch(b);
        const int64_t block = group * kGroupBlocks + b;
        __m512i dwords[4], sum[R];
        transpose_rows(panel.codes + half * 16, block * 16, panel.block_codes(block), dwords);
#pragma GCC unroll 4
        for (int m = 0; m < R; m++) sum[m] = begin(a[m].start[b]);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
          const __m512i weights = shifted(t % 2 ? _mm512_srli_epi16(dwords[t / 2], 4) : dwords[t / 2]);
#pragma GCC unroll 4
          for (int m = 0; m < R; m++) {
            int32_t four;
            memcpy(&four, a[m].q + b * kBlock + t * 4, 4);
            sum[m] = _mm512_dpbusd_epi32(sum[m], weights, _mm512_set1_epi32(four));
          }
        }
        const F scale = load(w.scale + b * kMostColumns + half * 16);
#pragma GCC unroll 4
        for (int m = 0; m < R; m++) p[m] = fma(to_float(sum[m]) * all(a[m].scale[b]), scale, p[m]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < R; m++) {
        float* at = sums + m * kMostColumns + half * 16;
        if (a_outer)
          store(at, fma(p[m], all(a_outer[m]) * load(w.outer + half * 16), load(at)));
        else
          store(at, p[m] + load(at));
      }
    }
  }

  // The weights of a group in windows, if all columns have one: see `windowed`.
  template <class Prefetch>
  static bool unpack_window(const WeightPanel& panel, int64_t group, int blocks, uint8_t* q, float* scales, Prefetch prefetch) {
    __m512i bytes[kVectors][4], base[kVectors];
    __mmask16 wide = 0;
    for (int half = 0; half < kVectors; half++) {
      transpose_rows(panel.scale + half * 16, group * kGroupBlocks, blocks, bytes[half]);
      __m512i low = _mm512_set1_epi32(0xFF), high = _mm512_setzero_si512();
      for (int b = 0; b < blocks; b++) {
        const __m512i byte = byte_of(bytes[half], b);
        low = _mm512_min_epu32(low, byte), high = _mm512_max_epu32(high, byte);
      }
      wide |= _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(high, low), _mm512_set1_epi32(kWindow));
      wide |= _mm512_cmpgt_epu32_mask(high, _mm512_set1_epi32(kTopByte));
      wide |= _mm512_testn_epi32_mask(low, low);  // byte 0: all zeros, mostly, and not 2^-127 as a shift would have it
      base[half] = low;
      _mm512_store_si512(scales + half * 16, _mm512_slli_epi32(low, 23));
    }
    if (wide) return false;
    for (int b = 0; b < blocks; b++, q += kBlock * kVectors * 16) {
      prefetch(b);
      for (int half = 0; half < kVectors; half++) {
        const __m512i shift = window_shift(_mm512_sub_epi32(byte_of(bytes[half], b), base[half]));
        const int64_t block = group * kGroupBlocks + b;
        __m512i dwords[4];
        transpose_rows(panel.codes + half * 16, block * 16, panel.block_codes(block), dwords);
        for (int j = 0; j < 8; j++) {
          const __m512i codes = j % 2 ? _mm512_srli_epi16(dwords[j / 2], 4) : dwords[j / 2];
          _mm512_store_si512(q + (j * kVectors + half) * 64, windowed(codes, shift));
        }
      }
    }
    return true;
  }

  static __m512i byte_of(const __m512i* dwords, int b) {
    return _mm512_and_si512(_mm512_srli_epi32(dwords[b / 4], b % 4 * 8), _mm512_set1_epi32(0xFF));
  }
};

}  // namespace
}  // namespace mxdit
