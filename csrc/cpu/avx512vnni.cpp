// AVX-512 with byte dot products: Cascade Lake and newer, Zen 4 and newer.
#include <immintrin.h>

#include "encode_avx512.h"
#include "float_product.h"
#include "transpose_avx512.h"
#include "unpack_x86.h"

namespace mxdit {
namespace {

struct Vnni {
  static constexpr int kLanes = 16, kVectors = 2, kRows = 6, kFloatRows = 12, kOffset = 12, kFewRows = 4;
  static constexpr bool kWindows = true;
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
  static __m512i finish(Sum sum, int32_t) { return sum; }

  static constexpr auto unpack_row = unpack_row_x86;

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

  // Bytes of twice the value plus the offset, of the codes in the low nibbles.
  static __m512i shifted(__m512i codes) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }

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
  static void few_rows(const WeightPanel& panel, int64_t group, const IntGroup* a, int rows, const float* a_outer,
                       const IntWeights& w, float* sums, Prefetch prefetch) {
    if (rows == 1) return some_rows<1>(panel, group, a, a_outer, w, sums, prefetch);
    if (rows == 2) return some_rows<2>(panel, group, a, a_outer, w, sums, prefetch);
    if (rows == 3) return some_rows<3>(panel, group, a, a_outer, w, sums, prefetch);
    some_rows<4>(panel, group, a, a_outer, w, sums, prefetch);
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

  // The weights of a group in windows, if all columns have one: bytes of 96 plus or minus the shifted values.
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
    const __m512i magnitudes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, 1, 2, 3, 4, 6, 8, 12));
    const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8 * kOffset), sign = _mm512_set1_epi8(8);
    for (int b = 0; b < blocks; b++, q += kBlock * kVectors * 16) {
      prefetch(b);
      for (int half = 0; half < kVectors; half++) {
        const __m512i shift = _mm512_sub_epi32(byte_of(bytes[half], b), base[half]);
        const int64_t block = group * kGroupBlocks + b;
        __m512i dwords[4];
        transpose_rows(panel.codes + half * 16, block * 16, panel.block_codes(block), dwords);
        for (int j = 0; j < 8; j++) {
          const __m512i code = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(dwords[j / 2], 4) : dwords[j / 2], low);
          // The largest, 12 << 3, stays within its byte.
          const __m512i magnitude = _mm512_sllv_epi32(_mm512_shuffle_epi8(magnitudes, code), shift);
          const __m512i value = _mm512_mask_sub_epi8(_mm512_add_epi8(middle, magnitude), _mm512_test_epi8_mask(code, sign),
                                                     middle, magnitude);
          _mm512_store_si512(q + (j * kVectors + half) * 64, value);
        }
      }
    }
    return true;
  }

  static __m512i byte_of(const __m512i* dwords, int b) {
    return _mm512_and_si512(_mm512_srli_epi32(dwords[b / 4], b % 4 * 8), _mm512_set1_epi32(0xFF));
  }
};

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Vnni>(job) : float_product<Vnni>(job);
}

}  // namespace

Path avx512vnni_path() { return {"avx512vnni", encode_avx512, decode_any, fast, float_product<Vnni>}; }

}  // namespace mxdit
