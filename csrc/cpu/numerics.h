// Encoding and decoding in plain C++: docs/numerics.md sections 1 to 3, one block at a time, for every dtype, rule and
// rounding mode. The loops over a block are written so that compilers vectorize them for the path's instruction set.
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <stddef.h>
#include <string.h>

#include "kernels.h"

namespace mxdit {
namespace {

template <class T>
inline T min_of(T a, T b) {
  return a < b ? a : b;
}

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

constexpr float float_of_power(int exponent) {
  float x = 1.0f;
  for (; exponent > 0; exponent--) x *= 2.0f;
  for (; exponent < 0; exponent++) x *= 0.5f;
  return x;
}

constexpr uint32_t kSign = 0x80000000u, kMagnitude = 0x7FFFFFFFu, kInf = 0x7F800000u;

// -- the float dtypes ---------------------------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Fp16 x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t scaled = bits_of(float_of(magnitude << 13) * 0x1p112f);  // subnormals become normal by themselves
  const uint32_t special = kInf | (magnitude << 13);                       // inf and NaN
  return float_of((static_cast<uint32_t>(x.bits & 0x8000u) << 16) | (magnitude >= 0x7C00u ? special : scaled));
}

// To the nearest number of that dtype, ties to even; past its range, inf.
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Bf16* out) {
  const uint32_t u = bits_of(x), magnitude = u & kMagnitude;
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(magnitude > kInf ? 0x7FC0u : rounded);
}
inline void narrow(float x, Fp16* out) {
  const uint32_t u = bits_of(x), magnitude = u & kMagnitude;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the sum rounds at 2^-24
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above
  half = magnitude > kInf ? 0x7E00u : half;
  out->bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
}

template <class T>
inline float rounded_to(float x) {
  T narrowed;
  narrow(x, &narrowed);
  return widen(narrowed);
}

constexpr float largest(const float*) { return 0x1.FFFFFEp127f; }
constexpr float largest(const Bf16*) { return 0x1.FEp127f; }
constexpr float largest(const Fp16*) { return 65504.0f; }

// Calls f with a null pointer of the dtype's type.
template <class F>
inline void with_dtype(int dtype, F f) {
  switch (dtype) {
    case MX_BF16: return f(static_cast<const Bf16*>(nullptr));
    case MX_FP16: return f(static_cast<const Fp16*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

// -- scales ---------------------------------------------------------------------------------------------------------------

// 2^exponent for exponents -149 to 127, subnormals included.
inline float power_of_two(int exponent) {
  return float_of(exponent >= -126 ? static_cast<uint32_t>(exponent + 127) << 23 : 1u << (exponent + 149));
}

inline float scale_value(uint8_t byte) { return byte == 0xFF ? float_of(0x7FC00000u) : power_of_two(byte - 127); }

struct Scale {
  uint8_t byte;
  float reciprocal;  // 0: the block's codes are zeros with their signs
};

constexpr int emax_of(int format) { return format == MX_FP4 ? 2 : 8; }

// The scale of a single-level block from the bits of its largest magnitude; sections 2.2 to 2.5.
inline Scale single_scale(uint32_t amax, int format, int rule, bool fp16) {
  const int exponent = static_cast<int>(amax >> 23);
  if (exponent == 0xFF) return {0xFF, 0.0f};
  int byte;
  bool empty;
  if (rule == MX_UOS || rule == MX_CUBLAS) {
    const float inverse = static_cast<float>(1.0 / (rule == MX_UOS ? 7.25 : 448.0));
    const uint32_t s = bits_of(float_of(amax) * inverse);
    const uint32_t mantissa = s & 0x7FFFFFu;
    byte = static_cast<int>(s >> 23);
    byte += byte > 0 ? mantissa > 0 : rule == MX_CUBLAS && mantissa > 0x400000u;
    empty = amax == 0;
  } else {
    int field = exponent;
    if (rule != MX_OCP) {
      const uint32_t m = bits_of(fp16 ? rounded_to<Bf16>(float_of(amax)) : float_of(amax)) >> 16;
      field = (m >> 7) < 2 ? 0 : static_cast<int>((m + (rule == MX_EVEN6 ? 0x3Fu : 0x1Fu)) >> 7);
    }
    byte = field > emax_of(format) ? field - emax_of(format) : 0;
    empty = byte == 0;
  }
  return {static_cast<uint8_t>(byte), empty ? 0.0f : power_of_two(127 - byte)};
}

// The scale of a level-1 block; section 3.2.
inline Scale level_one_scale(uint32_t amax) {
  const int exponent = static_cast<int>(amax >> 23);
  if (exponent == 0xFF) return {0xFF, 0.0f};
  const int byte = exponent > 2 ? exponent - 2 : 0;
  return {static_cast<uint8_t>(byte), exponent == 0 ? 0.0f : power_of_two(127 - byte)};
}

// -- codes ----------------------------------------------------------------------------------------------------------------

// For the modes other than rint, the code of an E2M1 magnitude is the number of these that its bits exceed: the decision
// points, less one bit where the point itself belongs above. By mode: round, floor, floor of negative numbers; section 1.
inline const uint32_t* decision_points(int round, bool negative) {
  static const uint32_t points[3][7] = {
      {0x3E7FFFFFu, 0x3F3FFFFFu, 0x3F9FFFFFu, 0x3FDFFFFFu, 0x401FFFFFu, 0x405FFFFFu, 0x409FFFFFu},  // .25 .75 1.25 ... 5
      {0x3EFFFFFFu, 0x3F7FFFFFu, 0x3FBFFFFFu, 0x3FFFFFFFu, 0x403FFFFFu, 0x407FFFFFu, 0x40BFFFFFu},  // .5 1 1.5 ... 6
      {0x00000000u, 0x3F000000u, 0x3F800000u, 0x3FC00000u, 0x40000000u, 0x40400000u, 0x40800000u},  // 0 .5 1 ... 4
  };
  return points[round == MX_FLOOR ? 1 + negative : 0];
}

// To nearest, ties to even, saturating, for a small float whose normal numbers start at 2^kLow and have kMantissa bits.
template <int kMantissa, int kLow>
inline uint32_t nearest_code(uint32_t bits, uint32_t most) {
  constexpr int drop = 23 - kMantissa;
  constexpr float round = float_of_power(23 + kLow - kMantissa);  // a sum with it rounds at the subnormals' quantum
  const uint32_t magnitude = min_of(bits & kMagnitude, most);
  const uint32_t lsb = (magnitude >> drop) & 1u;
  const uint32_t normal = ((magnitude + (1u << (drop - 1)) - 1u + lsb) >> drop) - ((126u + kLow) << kMantissa);
  const uint32_t subnormal = bits_of(float_of(magnitude) + round) - bits_of(round);
  return magnitude < (127u + kLow) << 23 ? subnormal : normal;
}

inline void fp4_codes(const float* v, int round, uint8_t* codes) {
  if (round == MX_RINT) {
    for (int i = 0; i < kBlock; i++)
      codes[i] = static_cast<uint8_t>(nearest_code<1, 0>(bits_of(v[i]), 0x40C00000u) | ((bits_of(v[i]) >> 28) & 8u));
    return;
  }
  const uint32_t *positive = decision_points(round, false), *negative = decision_points(round, true);
  for (int i = 0; i < kBlock; i++) {
    const uint32_t u = bits_of(v[i]), magnitude = u & kMagnitude;
    uint32_t code = (u >> 28) & 8u;
    for (int j = 0; j < 7; j++) code += magnitude > ((u & kSign) ? negative[j] : positive[j]);
    codes[i] = static_cast<uint8_t>(code);
  }
}

inline void fp8_codes(const float* v, uint8_t* codes) {
  for (int i = 0; i < kBlock; i++)
    codes[i] = static_cast<uint8_t>(nearest_code<3, -6>(bits_of(v[i]), 0x43E00000u) | ((bits_of(v[i]) >> 24) & 0x80u));
}

// Codes of one block of n values, scaled and stored; `v` has kBlock floats, zeros behind n.
inline void store_codes(float* v, int n, Scale scale, int format, int round, bool bf16, uint8_t* out) {
  uint8_t codes[kBlock];
  if (scale.byte == 0xFF) {
    memset(codes, 0, sizeof codes);
  } else {
    for (int i = 0; i < kBlock; i++) v[i] *= scale.reciprocal;
    // The product of a bf16 number is a bf16 one: a negative that underflows there is -0 and does not floor to -0.5.
    if (bf16 && round == MX_FLOOR)
      for (int i = 0; i < kBlock; i++) v[i] = rounded_to<Bf16>(v[i]);
    if (format == MX_FP4)
      fp4_codes(v, round, codes);
    else
      fp8_codes(v, codes);
  }
  if (format == MX_FP8) {
    memcpy(out, codes, static_cast<size_t>(n));
  } else {
    for (int i = 0; i < n / 2; i++) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

inline uint32_t largest_magnitude(const float* v) {
  uint32_t amax = 0;
  for (int i = 0; i < kBlock; i++) {
    const uint32_t magnitude = bits_of(v[i]) & kMagnitude;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

template <class T>
constexpr bool is_bf16(const T*) {
  return false;
}
template <>
constexpr bool is_bf16(const Bf16*) {
  return true;
}
template <class T>
constexpr bool is_fp16(const T*) {
  return false;
}
template <>
constexpr bool is_fp16(const Fp16*) {
  return true;
}

// `mul` holds values of T, or is NULL; likewise below.
template <class T>
inline void encode_block(const T* x, const float* mul, int n, int format, int rule, int round, uint8_t* codes, uint8_t* scale) {
  float v[kBlock] = {};
  if (n == kBlock)
    for (int i = 0; i < kBlock; i++) v[i] = widen(x[i]);
  else
    for (int i = 0; i < n; i++) v[i] = widen(x[i]);
  if (mul)
    for (int i = 0; i < n; i++) v[i] = rounded_to<T>(v[i] * mul[i]);
  const Scale s = single_scale(largest_magnitude(v), format, rule, is_fp16(x));
  *scale = s.byte;
  store_codes(v, n, s, format, round, is_bf16(x), codes);
}

template <class T>
inline void encode_dual_group(const T* x, const float* mul, int n, int round, uint8_t* codes, uint8_t* scale, float* outer) {
  float t[kGroup];
  uint32_t finite_max = 0;
  for (int i = 0; i < n; i++) {
    t[i] = mul ? rounded_to<T>(widen(x[i]) * mul[i]) : widen(x[i]);
    const uint32_t magnitude = bits_of(t[i]) & kMagnitude;
    finite_max = magnitude < kInf && magnitude > finite_max ? magnitude : finite_max;
  }
  float l0 = float_of(finite_max) * float_of(0x3E2AAAABu);
  if (l0 < 0x1p-126f) l0 = 0.0f;
  *outer = l0;
  for (int i = 0; i < n; i++) t[i] = t[i] == 0.0f ? t[i] : rounded_to<T>(t[i] / l0);
  for (int first = 0; first < n; first += kBlock) {
    const int count = min_of(kBlock, n - first);
    float v[kBlock] = {};
    memcpy(v, t + first, static_cast<size_t>(count) * sizeof(float));
    const Scale s = level_one_scale(largest_magnitude(v));
    scale[first / kBlock] = s.byte;
    store_codes(v, count, s, MX_FP4, round, is_bf16(x), codes + first / 2);
  }
}

// -- whole rows -------------------------------------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }
inline int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }
inline int64_t code_bytes(int format, int64_t k) { return format == MX_FP4 ? k / 2 : k; }

template <class T>
inline void encode_rows(const MxEncode& job, int64_t first, int64_t last) {
  const int64_t row_codes = code_bytes(job.format, job.k), blocks = blocks_of(job.k), groups = groups_of(job.k);
  for (int64_t row = first; row < last; row++) {
    const T* x = static_cast<const T*>(job.x) + row * job.x_stride;
    uint8_t *codes = job.codes + row * row_codes, *scale = job.scale + row * blocks;
    if (job.outer) {
      for (int64_t g = 0; g < groups; g++)
        encode_dual_group(x + g * kGroup, job.mul_scale ? job.mul_scale + g * kGroup : nullptr,
                          static_cast<int>(min_of<int64_t>(kGroup, job.k - g * kGroup)), job.round,
                          codes + g * kGroup / 2, scale + g * kGroupBlocks, job.outer + row * groups + g);
    } else {
      for (int64_t b = 0; b < blocks; b++)
        encode_block(x + b * kBlock, job.mul_scale ? job.mul_scale + b * kBlock : nullptr,
                     static_cast<int>(min_of<int64_t>(kBlock, job.k - b * kBlock)), job.format, job.rule, job.round,
                     codes + code_bytes(job.format, b * kBlock), scale + b);
    }
  }
}

inline void encode_any(const MxEncode& job, int64_t first, int64_t last) {
  with_dtype(job.x_dtype, [&]<class T>(const T*) { encode_rows<T>(job, first, last); });
}

inline float fp4_value(uint32_t code) {
  static const float values[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  return values[code];
}

inline float fp8_value(uint32_t code) {
  const float magnitude = float_of((code & 0x7Fu) << 20) * 0x1p120f;  // the exponent's bias; subnormals come out right
  return float_of(((code & 0x80u) << 24) | ((code & 0x7Fu) == 0x7Fu ? 0x7FC00000u : bits_of(magnitude)));
}

// n values of one block: code x 2^(byte-127), exact but past fp32's range, where it is inf. `out` has kBlock floats.
inline void decode_block(const uint8_t* codes, int n, int format, uint8_t byte, float* out) {
  const float scale = scale_value(byte);
  if (format == MX_FP4) {
    for (int i = 0; i < n / 2; i++) {
      out[2 * i] = fp4_value(codes[i] & 15u) * scale;
      out[2 * i + 1] = fp4_value(codes[i] >> 4) * scale;
    }
  } else {
    for (int i = 0; i < n; i++) out[i] = fp8_value(codes[i]) * scale;
  }
}

inline void decode_any(const MxDecode& job, int64_t first, int64_t last) {
  with_dtype(job.out_dtype, [&]<class T>(const T*) {
    for (int64_t row = first; row < last; row++) {
      T* out = static_cast<T*>(job.out) + row * job.k;
      for (int64_t k = 0; k < job.k; k += kBlock) {
        const int n = static_cast<int>(min_of<int64_t>(kBlock, job.k - k));
        float v[kBlock];
        decode_block(job.codes + row * code_bytes(job.format, job.k) + code_bytes(job.format, k), n, job.format,
                     job.scale[row * blocks_of(job.k) + k / kBlock], v);
        if (job.outer)
          for (int i = 0; i < n; i++) v[i] *= job.outer[row * groups_of(job.k) + k / kGroup];
        for (int i = 0; i < n; i++) narrow(v[i], out + k + i);
      }
    }
  });
}

}  // namespace
}  // namespace mxdit
