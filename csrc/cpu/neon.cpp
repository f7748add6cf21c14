// 64-bit Arm with byte dot products: Armv8.2 with FEAT_DotProd, such as Neoverse N1 and newer, Apple M1 and newer.
#include <arm_neon.h>

#include "float_attention.h"
#include "float_product.h"
#include "int8_attention.h"
#include "int_product.h"
#include "rowwise.h"

namespace mxdit {
namespace {

// Four rows of up to 16 bytes, read from rows[i] + offset, to four registers: out[j] holds bytes 4j to 4j+3 of every row.
// What a row lacks of 16 bytes is not read and counts as zero.
inline void transpose_rows(const uint8_t* const* rows, int64_t offset, int bytes, uint32x4_t out[4]) {
  uint32x4_t row[4];
  for (int i = 0; i < 4; i++) {
    uint8_t padded[16] = {};
    const uint8_t* at = rows[i] + offset;
    if (bytes < 16) at = static_cast<const uint8_t*>(memcpy(padded, at, static_cast<size_t>(bytes)));
    row[i] = vreinterpretq_u32_u8(vld1q_u8(at));
  }
  const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(row[0], row[1]));
  const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(row[0], row[1]));
  const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(row[2], row[3]));
  const uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(row[2], row[3]));
  out[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
  out[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
  out[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
  out[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

inline uint32x4_t byte_of(const uint32x4_t* dwords, int b) {
  return vandq_u32(vshlq_u32(dwords[b / 4], vdupq_n_s32(b % 4 * -8)), vdupq_n_u32(0xFF));
}

struct Neon {
  static constexpr int kLanes = 4, kVectors = 4, kRows = 3, kFloatRows = 6, kOffset = 0, kFewRows = 0;
  static constexpr Windows kWindows = Windows::both;
  static constexpr int64_t kHeldBytes = 8 << 20;
  static constexpr int kWindowOffsets = 8, kWindowRows = 16;  // fewer rows do not pay for moving the weights into windows
  static constexpr int kWidth = kLanes * kVectors;
  typedef float32x4_t F;
  typedef int32x4_t Sum;

  static constexpr auto encode = encode_any;
  static F all(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F multiply_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F to_float(int32x4_t x) { return vcvtq_f32_s32(x); }

  static Sum begin(int32_t start) { return vdupq_n_s32(start); }
  static Sum dot(Sum sum, const uint8_t* weights, int32_t four) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(vld1q_u8(weights)), vreinterpretq_s8_s32(vdupq_n_s32(four)));
  }
  static int32x4_t finish(Sum sum, const float*) { return sum; }
  static constexpr auto at = by_eights;

  // Twice the values, times 2^shift, of the codes in the low and in the high nibbles.
  static void unpack_nibbles(uint8x16_t two, int shift, int8x16_t* even, int8x16_t* odd) {
    const int8x16_t doubled = vld1q_s8(kDoubled[shift]);
    *even = vqtbl1q_s8(doubled, vandq_u8(two, vdupq_n_u8(15)));
    *odd = vqtbl1q_s8(doubled, vshrq_n_u8(two, 4));
  }

  static constexpr auto prepare_group = int_prepare_group<Neon>;

  static void unpack_row(const uint8_t* codes, int shift, int8_t* q) {
    int8x16_t even, odd;
    unpack_nibbles(vld1q_u8(codes), shift, &even, &odd);
    const int32x4_t a = vreinterpretq_s32_s8(even), b = vreinterpretq_s32_s8(odd);
    vst1q_s8(q, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
    vst1q_s8(q + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
  }

  static bool unpack_scales(const WeightPanel& panel, int64_t group, int blocks, float* out) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int v = 0; v < kVectors; v++) {
      uint32x4_t bytes[4];
      transpose_rows(panel.scale + v * kLanes, group * kGroupBlocks, blocks, bytes);
      for (int b = 0; b < blocks; b++) {
        const uint32x4_t byte = byte_of(bytes, b);
        top = vmaxq_u32(top, byte);
        const uint32x4_t scale = vmaxq_u32(vshlq_n_u32(byte, 23), vdupq_n_u32(1u << 22));  // byte 0 is 2^-127
        store(out + b * kWidth + v * kLanes, vreinterpretq_f32_u32(scale));
      }
    }
    return vmaxvq_u32(top) <= kTopByte;
  }

  // A block of four columns, each column's values shifted by its lane of `shift`.
  static void unpack_columns(const WeightPanel& panel, int64_t block, int v, uint32x4_t shift, uint8_t* out) {
    const int8x16_t shifts = vreinterpretq_s8_u32(vmulq_n_u32(shift, 0x01010101u));
    uint32x4_t dwords[4];
    transpose_rows(panel.codes + v * kLanes, block * 16, panel.block_codes(block), dwords);
    for (int j = 0; j < 4; j++) {
      int8x16_t even, odd;
      unpack_nibbles(vreinterpretq_u8_u32(dwords[j]), 0, &even, &odd);
      uint8_t* at = out + (j * 2 * kVectors + v) * 16;
      vst1q_u8(at, vreinterpretq_u8_s8(vshlq_s8(even, shifts)));
      vst1q_u8(at + kVectors * 16, vreinterpretq_u8_s8(vshlq_s8(odd, shifts)));
    }
  }

  static void unpack_weights(const WeightPanel& panel, int64_t block, uint8_t* out) {
    for (int v = 0; v < kVectors; v++) unpack_columns(panel, block, v, vdupq_n_u32(0), out);
  }

  // The weights of a group in windows, if all columns have one.
  template <class Prefetch>
  static bool unpack_window(const WeightPanel& panel, int64_t group, int blocks, uint8_t* q, float* scales, Prefetch prefetch) {
    uint32x4_t bytes[kVectors][4], base[kVectors];
    for (int v = 0; v < kVectors; v++) {
      transpose_rows(panel.scale + v * kLanes, group * kGroupBlocks, blocks, bytes[v]);
      uint32x4_t low = vdupq_n_u32(0xFF), high = vdupq_n_u32(0);
      for (int b = 0; b < blocks; b++) {
        const uint32x4_t byte = byte_of(bytes[v], b);
        low = vminq_u32(low, byte), high = vmaxq_u32(high, byte);
      }
      // Byte 0, which is all zeros mostly, is not 2^-127 as a shift would have it.
      if (vmaxvq_u32(vsubq_u32(high, low)) > kWindow || vmaxvq_u32(high) > kTopByte || vminvq_u32(low) == 0) return false;
      base[v] = low;
      store(scales + v * kLanes, vreinterpretq_f32_u32(vshlq_n_u32(low, 23)));
    }
    for (int b = 0; b < blocks; b++, q += kBlock * kWidth) {
      prefetch(b);
      for (int v = 0; v < kVectors; v++)
        unpack_columns(panel, group * kGroupBlocks + b, v, vsubq_u32(byte_of(bytes[v], b), base[v]), q);
    }
    return true;
  }
};

struct Int8 {
  static constexpr int kLanes = 4, kVectors = 4, kRows = 4, kSide = 4, kTogether = 1, kQueryOffset = 0, kValueOffset = 128;
  typedef float32x4_t F;
  typedef int32x4_t I;
  typedef int8_t Code;

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static int8x16_t broadcast(const Code* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static I dot_keys(I sum, const I* x, const Code* codes) { return vdotq_s32(sum, vreinterpretq_s8_s32(x[0]), broadcast(codes)); }
  static I dot_unsigned(I sum, I x, uint8x16_t y) {
    return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), vreinterpretq_u8_s32(x), y));
  }
  static I dot_values(I sum, const I* x, const Code* codes) { return dot_unsigned(sum, x[0], vreinterpretq_u8_s8(broadcast(codes))); }
  static I add_codes(I sum, I x) { return dot_unsigned(sum, x, vdupq_n_u8(1)); }
};

Attention attention(const MxAttention& job) {
  return job.method == MX_INT8 ? int8_attention<Int8>(job) : float_attention<Neon>(job);
}

Product fast(const MxLinear& job) {
  return four_bit(job) ? int_product<Neon>(job) : float_product<Neon>(job);
}

}  // namespace

Path neon_path() { return {"neon", encode_any, decode_any, fast, float_product<Neon>, attention, rowwise}; }

}  // namespace mxdit
