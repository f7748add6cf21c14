// The operands of int8_attention.h: q, k and v as codes with their scales, as docs/numerics.md section 10 has them, and laid out
// for a path's dot products. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "numerics.h"

namespace mxdit {
namespace {

constexpr int64_t kKeys = 64;  // of a block
constexpr float kLog2E = 0x1.715476p+0f, kInverse127 = 0x1.020408p-7f;
constexpr float kRound = 0x1.8p23f;  // added and subtracted again, it rounds to whole numbers, ties to even

inline int64_t up_to(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline float log2_scale(const MxAttention& job) { return job.scale * kLog2E; }

// What makes codes of numbers whose largest magnitude has these bits.
struct Symmetric {
  float inverse, scale;  // 0 where all codes are, NaN where something is not finite

  explicit Symmetric(uint32_t highest) : inverse(0.0f), scale(0.0f) {
    if (highest >= kInf) {
      scale = float_of(0x7FC00000u);
    } else if (highest >= bits_of(0x1p-100f)) {
      inverse = 127.0f / float_of(highest);
      scale = float_of(highest) * kInverse127;
    }
  }
};

inline int32_t code_of(float x, float inverse) { return static_cast<int32_t>(bits_of(x * inverse + kRound) - bits_of(kRound)); }

// A token's numbers as codes; the scale.
template <class Code>
float quantize_row(const float* x, int64_t width, Code* codes) {
  uint32_t highest = 0;
  for (int64_t d = 0; d < width; d++) {
    const uint32_t magnitude = bits_of(x[d]) & kMagnitude;
    highest = magnitude > highest ? magnitude : highest;
  }
  const Symmetric to(highest);
  for (int64_t d = 0; d < width; d++) codes[d] = to.inverse == 0.0f ? Code(0) : static_cast<Code>(code_of(x[d], to.inverse));
  return to.scale;
}

// Where dot products take two registers (a, a') of codes at once and two neighbours (b, b') of the other side, they multiply
// (a + b')(a' + b), half as many products: ab + a'b', and beside that aa', which this sums, and bb' (Winograd's inner product,
// IEEE Transactions on Computers C-17, 1968).
template <class V>
int32_t paired(const typename V::Code* codes, int64_t count) {
  int32_t sum = 0;
  if constexpr (V::kTogether > 1)
    for (int64_t i = 0; i < count; i += 2 * V::kSide)
      for (int s = 0; s < V::kSide; s++) sum += codes[i + s] * codes[i + V::kSide + s];
  return sum;
}

// One head's keys and values.
template <class V>
struct Int8Head {
  using Code = typename V::Code;
  int64_t blocks, k_width, channels;  // k_width, channels: with what fills them up, all 0
  Code* k;             // (key, k_width)
  Code* v;             // (block, channel, kKeys), with V::kValueOffset added
  float* k_scale;      // (key)
  int32_t* start;      // (key): undoes V::kQueryOffset, and what is beside the products
  int32_t* v_start;    // (block, channel), likewise; only with V::kTogether 2
  float* v_scale;      // (block, channel)
  float* sums;         // (block, width), of k
  int32_t* undefined;  // (block): whether a key has no finite scale
  int64_t bytes = 64;  // some, also without keys

  Int8Head(const MxAttention& job, uint8_t* memory) {
    blocks = (job.keys + kKeys - 1) / kKeys, k_width = up_to(job.width, V::kSide * V::kTogether), channels = up_to(job.v_width, V::kRows);
    take(k, blocks * kKeys * k_width, memory);
    take(v, blocks * kKeys * channels, memory);
    take(k_scale, blocks * kKeys, memory);
    take(start, blocks * kKeys, memory);
    take(v_start, V::kTogether > 1 ? blocks * channels : 0, memory);
    take(v_scale, blocks * channels, memory);
    take(sums, blocks * job.width, memory);
    take(undefined, blocks, memory);
  }

 private:
  template <class T>
  void take(T*& what, int64_t count, uint8_t* memory) {
    what = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += up_to(count * static_cast<int64_t>(sizeof(T)), 64);
  }
};

// Each block's sum of keys, one after the other.
template <class V>
void int8_sums(const MxAttention& job, int64_t batch, int64_t kv_head, int64_t first, int64_t last, uint8_t* prepared, uint8_t*) {
  const Int8Head<V> head(job, prepared);
  with_dtype(job.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(job.k) + batch * job.k_strides[0] + kv_head * job.k_strides[2];
    for (int64_t key = first; key < last; key++) {
      float* sum = head.sums + key / kKeys * job.width;
      const auto* x = from + key * job.k_strides[1];
      if (key % kKeys == 0)
        for (int64_t d = 0; d < job.width; d++) sum[d] = 0.0f;
      for (int64_t d = 0; d < job.width; d++) sum[d] += widen(x[d]);
    }
  });
}

template <class V>
void int8_keys(const MxAttention& job, const Int8Head<V>& head, int64_t batch, int64_t kv_head, int64_t first, int64_t last,
               float* scratch) {
  float* const mean = scratch;
  float* const row = mean + job.width;
  for (int64_t d = 0; d < job.width; d++) mean[d] = 0.0f;
  for (int64_t block = 0; block < head.blocks; block++)
    for (int64_t d = 0; d < job.width; d++) mean[d] += head.sums[block * job.width + d];
  const float share = 1.0f / static_cast<float>(job.keys);
  for (int64_t d = 0; d < job.width; d++) mean[d] *= share;
  with_dtype(job.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(job.k) + batch * job.k_strides[0] + kv_head * job.k_strides[2];
    for (int64_t key = first; key < up_to(last, V::kRows); key++) {  // no more are read
      typename V::Code* codes = head.k + key * head.k_width;
      if (key % kKeys == 0) head.undefined[key / kKeys] = 0;
      for (int64_t d = job.width; d < head.k_width; d++) codes[d] = 0;
      float scale = 0.0f;
      if (key < last) {
        const auto* x = from + key * job.k_strides[1];
        for (int64_t d = 0; d < job.width; d++) row[d] = widen(x[d]) - mean[d];
        scale = quantize_row(row, job.width, codes);
      } else {
        memset(codes, 0, static_cast<size_t>(job.width) * sizeof *codes);
      }
      const bool defined = scale == scale;
      head.undefined[key / kKeys] |= !defined;
      head.k_scale[key] = defined ? scale : 0.0f;
      int32_t sum = 0;
      for (int64_t d = 0; d < job.width; d++) sum += codes[d];
      head.start[key] = -V::kQueryOffset * sum - paired<V>(codes, head.k_width);
    }
  });
}

template <class V>
void int8_values(const MxAttention& job, const Int8Head<V>& head, int64_t batch, int64_t kv_head, int64_t first, int64_t last,
                 float* scratch) {
  float* const numbers = scratch;  // (kKeys, v_width)
  float* const inverse = numbers + kKeys * job.v_width;
  uint32_t* const highest = reinterpret_cast<uint32_t*>(inverse + job.v_width);
  uint32_t* const sides = highest + job.v_width;  // codes of some keys, as they lie side by side
  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t here = min_of(kKeys, last - key), block = key / kKeys;
    with_dtype(job.dtype, [&](auto* type) {
      const auto* from = static_cast<decltype(type)>(job.v) + batch * job.v_strides[0] + kv_head * job.v_strides[2];
      for (int64_t i = 0; i < here; i++)
        for (int64_t e = 0; e < job.v_width; e++) numbers[i * job.v_width + e] = widen(from[(key + i) * job.v_strides[1] + e]);
    });
    for (int64_t e = 0; e < job.v_width; e++) highest[e] = 0;
    for (int64_t i = 0; i < here; i++)
      for (int64_t e = 0; e < job.v_width; e++) {
        const uint32_t magnitude = bits_of(numbers[i * job.v_width + e]) & kMagnitude;
        highest[e] = magnitude > highest[e] ? magnitude : highest[e];
      }
    float* const scale = head.v_scale + block * head.channels;
    typename V::Code* const codes = head.v + block * kKeys * head.channels;
    for (int64_t e = 0; e < head.channels; e++) {
      const Symmetric to(e < job.v_width ? highest[e] : 0);
      scale[e] = to.scale;
      if (e < job.v_width) inverse[e] = to.inverse;
    }
    for (int64_t i = here * job.v_width; i < up_to(here, V::kRows) * job.v_width; i++) numbers[i] = 0.0f;
    for (int64_t i = 0; i < up_to(here, V::kRows); i += V::kSide) {
      for (int64_t e = 0; e < head.channels; e++) sides[e] = 0;
      for (int s = 0; s < V::kSide; s++)
        for (int64_t e = 0; e < job.v_width; e++) {
          const int32_t code = inverse[e] == 0.0f ? 0 : code_of(numbers[(i + s) * job.v_width + e], inverse[e]);
          constexpr int bits = 32 / V::kSide;
          sides[e] |= static_cast<uint32_t>(code + V::kValueOffset) << (32 - bits) >> (32 - bits - s * bits);
        }
      for (int64_t e = 0; e < head.channels; e++) memcpy(codes + e * kKeys + i, sides + e, 4);
    }
    if constexpr (V::kTogether > 1)
      for (int64_t e = 0; e < head.channels; e++)
        head.v_start[block * head.channels + e] = -paired<V>(codes + e * kKeys, up_to(here, V::kRows));
  }
}

template <class V>
void int8_prepare(const MxAttention& job, int64_t batch, int64_t kv_head, int64_t first, int64_t last, uint8_t* prepared,
                  uint8_t* scratch) {
  const Int8Head<V> head(job, prepared);
  float* const own = reinterpret_cast<float*>(scratch);
  int8_keys(job, head, batch, kv_head, first, last, own);
  int8_values(job, head, batch, kv_head, first, last, own);
}

inline int64_t int8_prepare_bytes(const MxAttention& job) { return (2 * job.width + (kKeys + 3) * job.v_width + 16) * 4; }

}  // namespace
}  // namespace mxdit
