// MXFP4 x MXFP4 on AVX2: bytes multiplied and added in pairs to 16 bits, a block's pairs summed there. The sum goes to 32 bits
// by a multiplication, which has room for what the scales of a column's blocks differ: so weights in a window cost nothing.
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>

#include "float_product.h"
#include "int_product.h"

namespace mxdit {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2, kRows = 3, kFloatRows = 6, kOffset = 12, kFewRows = 4;
  static constexpr Windows kWindows = Windows::weights;
  static constexpr int kWindowOffsets = 1, kWindowRows = 1;
  static constexpr int64_t kHeldBytes = 512 << 10;  // of second level cache: from the third they come too late
  // Binades. The weights': a group's sum, at most 16 * 32 * 144 * 2^6, times an activation's scale stays finite, as
  // kTopByte has it. The activations', where few_rows() adds a group up in integers: 16 * 32 * 144 * 2^(6 + 8) < 2^31.
  static constexpr int kWeightWindow = 6, kRowWindow = 8;
  static constexpr int kWidth = kLanes * kVectors;
  typedef float F __attribute__((vector_size(32)));
  typedef __m256i Sum;  // int16; with its start, at most 16 * 144 in the end, and nothing in between exceeds 16 bits

  static constexpr auto encode = encode_any;
  static F all(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(__m256i x) { return _mm256_cvtepi32_ps(x); }

  // GCC may add integers in another order, and makes trees of long sums: their products do not fit into registers. So it is
  // not told what x is.
  static __m256i in_order(__m256i x) {
    __asm__("" : "+x"(x));
    return x;
  }

  static Sum begin(int32_t two) { return _mm256_set1_epi32(two); }  // int16, as the products of four bytes come
  static Sum dot(Sum sum, const uint8_t* weights, int32_t four) {
    const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights));
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(four))));
  }
  static __m256i finish(Sum sum, const float* scale) {
    return _mm256_madd_epi16(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(scale + kGroupBlocks * kWidth)));
  }

  // Of two blocks the even elements, then the odd ones: what shifts and masks make of 32 bytes of codes.
  static constexpr int at(int block, int t) { return block / 2 * 64 + block % 2 * 16 + t / 4 * 32 + t % 4 * 4; }

  // A row's group as operands. The window is few_rows()'s: nothing is shifted.
  static bool prepare_group(const uint8_t* codes, int64_t bytes, const uint8_t* scale, int blocks, IntGroup& group,
                            IntWindow& window) {
    uint8_t padded[kGroup / 2];
    if (bytes < kGroup / 2) {
      memset(padded, 0, sizeof padded);
      codes = static_cast<const uint8_t*>(memcpy(padded, codes, static_cast<size_t>(bytes)));
    }
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1);
    const __m256i doubled =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kDoubled[0])));
    bool any[kGroupBlocks];
    for (int b = 0; b < blocks; b += 2) {
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * 16));
      const __m256i even = _mm256_shuffle_epi8(doubled, _mm256_and_si256(two, low));
      const __m256i odd = _mm256_shuffle_epi8(doubled, _mm256_and_si256(_mm256_srli_epi16(two, 4), low));
      _mm256_store_si256(reinterpret_cast<__m256i*>(group.q + b * kBlock), even);
      _mm256_store_si256(reinterpret_cast<__m256i*>(group.q + b * kBlock + 32), odd);
      // In each lane a block: pairs as dot() takes them, the first of four bytes apart from the second.
      __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(ones, even), _mm256_maddubs_epi16(ones, odd));
      sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0x4E));
      sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0xB1));
      const __m256i start = _mm256_mullo_epi16(sum, _mm256_set1_epi16(-kOffset));
      group.start[b] = _mm256_extract_epi32(start, 0), group.start[b + 1] = _mm256_extract_epi32(start, 4);
      const int zeros = _mm256_movemask_epi8(
          _mm256_cmpeq_epi8(_mm256_and_si256(two, _mm256_set1_epi8(0x77)), _mm256_setzero_si256()));
      any[b] = (zeros & 0xFFFF) != 0xFFFF, any[b + 1] = (zeros >> 16 & 0xFFFF) != 0xFFFF;
    }
    int least = 0xFF, most = 0;
    bool nan = false, plain = true;
    for (int b = 0; b < blocks; b++) {
      nan |= scale[b] == 0xFF;
      plain &= scale[b] <= kTopByte || scale[b] == 0xFF;
      least = any[b] && scale[b] < least ? scale[b] : least;
      most = any[b] && scale[b] > most ? scale[b] : most;
      group.scale[b] = scale[b] == 0xFF ? scale_value(0xFF) : power_of_two(scale[b] - 129);
    }
    // Only with all blocks, and with normal scales, from which few_rows() takes the differences.
    const bool fits = blocks == kGroupBlocks && !nan && least > 2 && most - least <= kRowWindow;
    window = {fits ? power_of_two(least - 129) : 0.0f, 0};
    return plain;
  }

  // Up to 16 bytes of each of eight rows, from rows[i] + offset on: out[j] holds bytes 4j to 4j+3 of every row. What a row
  // lacks of 16 bytes counts as zero.
  static void transpose_rows(const uint8_t* const* rows, int64_t offset, int bytes, __m256i out[4]) {
    uint8_t padded[8][16];
    const auto row = [&](int i) {
      const uint8_t* from = rows[i] + offset;
      if (bytes < 16) {
        memset(padded[i], 0, 16);
        from = static_cast<const uint8_t*>(memcpy(padded[i], from, static_cast<size_t>(bytes)));
      }
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    };
    __m256i two[4];
    for (int i = 0; i < 4; i++) two[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(4 + i), 1);
    const __m256i a = _mm256_unpacklo_epi32(two[0], two[1]), b = _mm256_unpackhi_epi32(two[0], two[1]);
    const __m256i c = _mm256_unpacklo_epi32(two[2], two[3]), d = _mm256_unpackhi_epi32(two[2], two[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
  }

  static __m256i byte_of(const __m256i* dwords, int b) {
    return _mm256_and_si256(_mm256_srli_epi32(dwords[b / 4], b % 4 * 8), _mm256_set1_epi32(0xFF));
  }

  // Bytes of twice the values, plus the offset, by code.
  static __m256i shifted_values() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  }

  static void set(float* p, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }

  static bool unpack_scales(const WeightPanel& panel, int64_t group, int blocks, float* out) {
    __m256i top = _mm256_setzero_si256();
    for (int v = 0; v < kVectors; v++) {
      __m256i bytes[4];
      transpose_rows(panel.scale + v * kLanes, group * kGroupBlocks, blocks, bytes);
      for (int b = 0; b < blocks; b++) {
        const __m256i byte = byte_of(bytes, b);
        float* to = out + b * kWidth + v * kLanes;
        top = _mm256_max_epu32(top, byte);
        set(to, _mm256_max_epu32(_mm256_slli_epi32(byte, 23), _mm256_set1_epi32(1 << 22)));  // byte 0 is 2^-127
        set(to + kGroupBlocks * kWidth, _mm256_set1_epi16(1));
      }
    }
    return _mm256_testz_si256(_mm256_cmpgt_epi32(top, _mm256_set1_epi32(kTopByte)), _mm256_set1_epi32(-1));
  }

  static void unpack_weights(const WeightPanel& panel, int64_t block, uint8_t* out) {
    const __m256i low = _mm256_set1_epi8(15), shifted = shifted_values();
    for (int v = 0; v < kVectors; v++) {
      __m256i dwords[4];
      transpose_rows(panel.codes + v * kLanes, block * 16, panel.block_codes(block), dwords);
      for (int j = 0; j < 4; j++) {
        __m256i* to = reinterpret_cast<__m256i*>(out + (j * kVectors + v) * 32);
        _mm256_store_si256(to, _mm256_shuffle_epi8(shifted, _mm256_and_si256(dwords[j], low)));
        _mm256_store_si256(to + 4 * kVectors,
                           _mm256_shuffle_epi8(shifted, _mm256_and_si256(_mm256_srli_epi16(dwords[j], 4), low)));
      }
    }
  }

  // The weights of a group in windows, if all columns have one: as ever, and the blocks' differences as factors.
  template <class Prefetch>
  static bool unpack_window(const WeightPanel& panel, int64_t group, int blocks, uint8_t* q, float* scales, Prefetch prefetch) {
    __m256i wrong = _mm256_setzero_si256();
    for (int v = 0; v < kVectors; v++) {
      __m256i bytes[4], least = _mm256_set1_epi32(0xFF), most = _mm256_setzero_si256();
      transpose_rows(panel.scale + v * kLanes, group * kGroupBlocks, blocks, bytes);
      for (int b = 0; b < blocks; b++) {
        least = _mm256_min_epu32(least, byte_of(bytes, b)), most = _mm256_max_epu32(most, byte_of(bytes, b));
      }
      wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi32(_mm256_sub_epi32(most, least), _mm256_set1_epi32(kWeightWindow)));
      wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi32(most, _mm256_set1_epi32(kTopByte)));
      wrong = _mm256_or_si256(wrong, _mm256_cmpeq_epi32(least, _mm256_setzero_si256()));  // mostly zeros; not 2^-127 as below
      set(scales + v * kLanes, _mm256_slli_epi32(least, 23));
      for (int b = 0; b < blocks; b++)
        set(scales + (kGroupBlocks + b) * kWidth + v * kLanes,
            _mm256_sllv_epi32(_mm256_set1_epi16(1), _mm256_sub_epi32(byte_of(bytes, b), least)));
    }
    if (!_mm256_testz_si256(wrong, wrong)) return false;
    for (int b = 0; b < blocks; b++, q += kBlock * kWidth) {
      prefetch(b);
      unpack_weights(panel, group * kGroupBlocks + b, q);
    }
    return true;
  }

  // The same for a few rows, weights from register to register. False where rows or columns have no window, or the group is
  // not whole.
  template <class Prefetch>
  static bool few_rows(const WeightPanel& panel, int64_t group, const IntGroup* a, const IntWindow* windows, int rows,
                       const float* a_outer, float*, const float* w_outer, int blocks, float* sums, Prefetch prefetch) {
    bool fit = blocks == kGroupBlocks && panel.block_codes(group * kGroupBlocks + blocks - 1) == 16;
    for (int m = 0; m < rows; m++) fit &= windows[m].scale != 0.0f;
    if (!fit) return false;
    const auto multiply = rows == 1   ? some_rows<1, Prefetch>
                          : rows == 2 ? some_rows<2, Prefetch>
                          : rows == 3 ? some_rows<3, Prefetch>
                                      : some_rows<4, Prefetch>;
    alignas(32) float p[4 * kWidth];
    if (!multiply(panel, group, a, windows, p, prefetch)) return false;
    for (int m = 0; m < rows; m++)
      for (int first = 0; first < kWidth; first += kLanes) {
        float* to = sums + m * kWidth + first;
        const F part = load(p + m * kWidth + first);
        store(to, a_outer ? fma(part, all(a_outer[m]) * load(w_outer + first), load(to)) : part + load(to));
      }
    return true;
  }

  // Sixteen numbers, one of each block, as few_rows() has them: in 128 bits those of even blocks, then of odd ones.
  static __m256i even_odd(__m256i words) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), 0xD8);
  }

  // 16 dwords of 16 bits to words.
  static __m256i packed(__m256i first, __m256i second) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
  }

  // R rows by the panel's columns, to p (R, kWidth); false where the columns have no window.
  template <int R, class Prefetch>
  static bool some_rows(const WeightPanel& panel, int64_t group, const IntGroup* a, const IntWindow* windows, float* p,
                        Prefetch prefetch) {
    const __m256i low = _mm256_set1_epi8(15), shifted = shifted_values();
    const __m128i evens_first = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i power_low = _mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i power_high = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, -128);
    __m256i start[R];
    __m128i shift[R];
    for (int m = 0; m < R; m++) {
      const __m256i* starts = reinterpret_cast<const __m256i*>(a[m].start);
      const __m256i* scales = reinterpret_cast<const __m256i*>(a[m].scale);
      const __m256i one = _mm256_set1_epi16(1);
      start[m] = even_odd(packed(_mm256_madd_epi16(_mm256_load_si256(starts), one),
                                 _mm256_madd_epi16(_mm256_load_si256(starts + 1), one)));
      const __m256i exponents = even_odd(packed(_mm256_srli_epi32(_mm256_load_si256(scales), 23),
                                                _mm256_srli_epi32(_mm256_load_si256(scales + 1), 23)));
      // A block of zeros may have a scale below the window's.
      const __m256i over = _mm256_subs_epu16(exponents, _mm256_set1_epi16(static_cast<int16_t>(bits_of(windows[m].scale) >> 23)));
      shift[m] = _mm_packus_epi16(_mm256_castsi256_si128(over), _mm256_extracti128_si256(over, 1));
    }
    static_assert(kWidth == kGroupBlocks);
    __m256i sum[R][kWidth];
    __m128i most = _mm_setzero_si128(), top = most, bottom = _mm_set1_epi8(-1);
    alignas(32) uint32_t scale[kWidth];
#pragma GCC unroll 1
    for (int n = 0; n < kWidth; n++) {
      prefetch(n);  // there are as many columns as blocks
      const uint8_t* codes = panel.codes[n] + group * kGroup / 2;
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel.scale[n] + group * kGroupBlocks));
      const __m128i least = _mm_minpos_epu16(_mm_min_epu8(bytes, _mm_srli_epi16(bytes, 8)));
      scale[n] = static_cast<uint32_t>(_mm_cvtsi128_si32(least)) << 23;
      const __m128i over = _mm_sub_epi8(bytes, _mm_shuffle_epi8(least, _mm_setzero_si128()));
      most = _mm_max_epu8(most, over), top = _mm_max_epu8(top, bytes), bottom = _mm_min_epu8(bottom, bytes);
      __m256i factors[R], total[R];
#pragma GCC unroll 4
      for (int m = 0; m < R; m++) {
        const __m128i power = _mm_add_epi8(_mm_shuffle_epi8(over, evens_first), shift[m]);
        const __m128i l = _mm_shuffle_epi8(power_low, power), h = _mm_shuffle_epi8(power_high, power);
        factors[m] = _mm256_set_m128i(_mm_unpackhi_epi8(l, h), _mm_unpacklo_epi8(l, h));
        total[m] = _mm256_madd_epi16(start[m], factors[m]);
      }
#pragma GCC unroll 8
      for (int pair = 0; pair < kGroupBlocks / 2; pair++) {
        const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + pair * 32));
        const __m256i even = _mm256_shuffle_epi8(shifted, _mm256_and_si256(two, low));
        const __m256i odd = _mm256_shuffle_epi8(shifted, _mm256_and_si256(_mm256_srli_epi16(two, 4), low));
#pragma GCC unroll 4
        for (int m = 0; m < R; m++) {
          const __m256i* q = reinterpret_cast<const __m256i*>(a[m].q + pair * 64);
          const __m256i s = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_load_si256(q)),
                                             _mm256_maddubs_epi16(odd, _mm256_load_si256(q + 1)));
          const __m256i factor = _mm256_shuffle_epi8(factors[m], _mm256_set1_epi16(static_cast<int16_t>(pair * 0x202 + 0x100)));
          total[m] = in_order(_mm256_add_epi32(total[m], _mm256_madd_epi16(s, factor)));
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < R; m++) sum[m][n] = total[m];
    }
    most = _mm_or_si128(_mm_subs_epu8(most, _mm_set1_epi8(kWeightWindow)),
                        _mm_subs_epu8(top, _mm_set1_epi8(static_cast<char>(kTopByte))));
    most = _mm_or_si128(most, _mm_cmpeq_epi8(bottom, _mm_setzero_si128()));
    if (!_mm_testz_si128(most, most)) return false;
    for (int m = 0; m < R; m++)
      for (int n = 0; n < kWidth; n += kLanes) {
        const F whole = to_float(by_column(sum[m] + n)) * all(windows[m].scale);
        store(p + m * kWidth + n, whole * load(reinterpret_cast<const float*>(scale + n)));
      }
    return true;
  }

  // Of each register the sum of its eight numbers.
  static __m256i by_column(const __m256i* x) {
    const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
    __m256i two[4], four[2];
    for (int i = 0; i < 4; i++)
      two[i] = add(_mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 2; i++)
      four[i] = add(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]), _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
    return add(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
  }
};

}  // namespace
}  // namespace mxdit
