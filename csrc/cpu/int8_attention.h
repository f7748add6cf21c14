// Attention in 8-bit integers, docs/numerics.md section 10, bit for bit. Queries lie in the lanes of registers: maxima, sums and
// factors of a query never cross lanes. Both products add dot products of a few codes that lie side by side; those of keys, and
// of v's channels, are broadcast from memory. A template over a path's registers, `V`:
//   kLanes, kVectors   queries in one register, registers across a tile of queries
//   kRows              keys, or channels of v, that are multiplied at once; divides kKeys
//   Code, kSide        how a code is held, and how many of them fill 32 bits
//   kQueryOffset       what is added to q's codes, for instructions that want one operand unsigned
//   kValueOffset       what is added to v's codes, likewise
//   F, I               registers of fp32 and int32, with load, store, fma, max of F
//   kTogether          registers of q's codes, or P's, that a dot product takes: 1, or 2 where it adds what paired() says
//   dot_keys           adds to int32 the products of q's codes, in lanes, with a key's at an address
//   dot_values         the same of P and v
//   dot_paired         with kTogether 2: adds the products of one register with the other
//   add_codes          adds to int32 the codes of P that lie side by side
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <math.h>

#include "int8_operands.h"

namespace mxdit {
namespace {

template <class V>
struct Int8Tile {
  using F = typename V::F;
  using I = typename V::I;
  using Code = typename V::Code;
  static constexpr int kLanes = V::kLanes, kVectors = V::kVectors, kSide = V::kSide, kQueries = kLanes * kVectors;
  static constexpr int kTogether = V::kTogether;
  static constexpr float kLowest = -32.0f, kNoKey = -0x1.fffffep127f;  // of E; what can be subtracted where no key is seen

  const MxAttention& job;
  const Int8Head<V> keys;
  const int64_t batch, head, first, last;  // queries
  // Scratch, each (.., kQueries):
  float *logits, *bias, *acc, *q_scale, *highest, *total, *old_factor, *new_factor, *local;
  int32_t *q_start, *p_start;  // what sums begin with, for what dot products add beside the products
  int32_t *q, *p;  // q: (k_width / kSide), p: (kKeys / kSide), of kSide codes side by side
  float* row;  // of numbers, with room for codes behind those of q
  bool undefined[kQueries];

  static int64_t floats(const MxAttention& job) {
    const int64_t channels = up_to(job.v_width, V::kRows), q_groups = up_to(job.width, kSide * kTogether) / kSide;
    return (2 * kKeys + channels + 9 + q_groups + kKeys / kSide) * kQueries + 2 * up_to(job.width, 16) + job.v_width;
  }

  Int8Tile(const MxAttention& job, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared, uint8_t* scratch)
      : job(job), keys(job, const_cast<uint8_t*>(prepared)), batch(batch), head(head), first(first), last(last) {
    float* at = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t rows) {
      float* const here = at;
      at += rows * kQueries;
      return here;
    };
    logits = take(kKeys), bias = take(kKeys), acc = take(keys.channels), q_scale = take(1), highest = take(1), total = take(1);
    old_factor = take(1), new_factor = take(1), local = take(1);
    q_start = reinterpret_cast<int32_t*>(take(1)), p_start = reinterpret_cast<int32_t*>(take(1));
    q = reinterpret_cast<int32_t*>(take(keys.k_width / kSide)), p = reinterpret_cast<int32_t*>(take(kKeys / kSide));
    row = at;
    load_queries();
    for (int64_t i = 0; i < keys.channels * kQueries; i++) acc[i] = 0.0f;
    for (int i = 0; i < kQueries; i++) highest[i] = -HUGE_VALF, total[i] = 0.0f;
  }

  void load_queries() {
    Code* const codes = reinterpret_cast<Code*>(row + up_to(job.width, 16));
    for (int64_t d = 0; d < keys.k_width; d++) codes[d] = 0;
    for (int i = 0; i < kQueries; i++) {
      float scale = 0.0f;
      if (first + i < last) {
        with_dtype(job.dtype, [&](auto* type) {
          const auto* x = static_cast<decltype(type)>(job.q) + batch * job.q_strides[0] + (first + i) * job.q_strides[1] +
                          head * job.q_strides[2];
          for (int64_t d = 0; d < job.width; d++) row[d] = widen(x[d]);
        });
        scale = quantize_row(row, job.width, codes);
      }
      undefined[i] = scale != scale;
      q_scale[i] = undefined[i] ? 0.0f : scale * log2_scale(job);
      q_start[i] = -paired<V>(codes, keys.k_width);
#pragma GCC unroll 8
      for (int64_t d = 0; d < keys.k_width; d += kSide) {
        Code side[kSide];
        for (int s = 0; s < kSide; s++) side[s] = static_cast<Code>(codes[d + s] + V::kQueryOffset);
        memcpy(q + d / kSide * kQueries + i, side, 4);
      }
    }
  }

  // What is added to a query's logits, in base 2, for `here` keys.
  void biases_of(int64_t query, int64_t key0, int64_t here, float* out) const {
    for (int64_t j = 0; j < here; j++)
      out[j] = key0 + j >= job.keys || (job.causal && key0 + j > query) ? -HUGE_VALF : 0.0f;
    if (job.mask_dtype == MX_NO_MASK || query >= last) return;
    const int64_t count = min_of(here, job.keys - key0), step = job.mask_strides[3];
    const int64_t at = batch * job.mask_strides[0] + head * job.mask_strides[1] + query * job.mask_strides[2] + key0 * step;
    if (job.mask_dtype == MX_BOOL_MASK) {
      const uint8_t* const seen = static_cast<const uint8_t*>(job.mask) + at;
      for (int64_t j = 0; j < count; j++) {
        const int32_t hidden = seen[j * step] == 0;
        out[j] = hidden ? -HUGE_VALF : 0.0f;
      }
    } else {
      with_dtype(job.mask_dtype, [&](auto* type) {
        const auto* const added = static_cast<decltype(type)>(job.mask) + at;
        for (int64_t j = 0; j < count; j++) out[j] = widen(added[j * step]) * kLog2E;
      });
    }
  }

  // Biases of a block's keys; false where no query sees any of them.
  bool load_bias(int64_t key0, int64_t here) {
    const bool shared = !job.causal && (job.mask_dtype == MX_NO_MASK || job.mask_strides[2] == 0);
    float own[kKeys];
    bool seen = false;
    for (int i = 0; i < kQueries; i += shared ? kQueries : 1) {
      biases_of(first + i, key0, here, own);
      int32_t nan = 0, sees = 0;
      for (int64_t j = 0; j < here; j++) {
        nan |= own[j] < HUGE_VALF ? 0 : 1;
        own[j] = own[j] < HUGE_VALF ? own[j] : 0.0f;
        sees |= own[j] > -HUGE_VALF ? 1 : 0;
      }
      seen |= sees && first + i < last;
      const int end = shared ? kQueries : i + 1;
      for (int each = i; each < end; each++) undefined[each] |= nan != 0;
      if (shared) {
        for (int64_t j = 0; j < here; j++)
          for (int each = 0; each < kQueries; each++) bias[j * kQueries + each] = own[j];
      } else {
        for (int64_t j = 0; j < here; j++) bias[j * kQueries + i] = own[j];
      }
    }
    return seen;
  }

  static F all(float x) { return F{} + x; }
  static F to_float(I x) { return __builtin_convertvector(x, F); }

  // 2^x for x from kLowest to 0.
  static F exp2(F x) {
    const F shifted = x + kRound;
    const F f = x - (shifted - kRound);
    F y = all(0x1.3a0184p-7f);
    y = V::fma(y, f, all(0x1.c9fd38p-5f));
    y = V::fma(y, f, all(0x1.ec037ep-3f));
    y = V::fma(y, f, all(0x1.62e12ap-1f));
    y = V::fma(y, f, all(1.0f));
    return (F)((I)y + ((I)shifted << 23));
  }
  static F factor(F x) { return x >= kLowest ? exp2(V::max(x, all(kLowest))) : F{}; }

  template <bool kBias>
  void block_logits(int64_t block, int64_t here) {
    const int64_t groups = keys.k_width / kSide;
    F most[kVectors];
    for (int v = 0; v < kVectors; v++) most[v] = all(-HUGE_VALF);
    F scale[kVectors];
    I start[kVectors];
    for (int v = 0; v < kVectors; v++) {
      scale[v] = V::load(q_scale + v * kLanes);
      start[v] = kTogether > 1 ? load_int(q_start + v * kLanes) : I{};
    }
    for (int64_t j = 0; j < here; j += V::kRows) {
      const int64_t key = block * kKeys + j;
      const Code* const k = keys.k + key * keys.k_width;
      I sum[V::kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sum[r][v] = start[v] + keys.start[key + r];
      for (int64_t g = 0; g < groups; g += kTogether) {
        I x[kVectors][kTogether];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 2
          for (int t = 0; t < kTogether; t++) x[v][t] = load_int(q + (g + t) * kQueries + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; v++) sum[r][v] = V::dot_keys(sum[r][v], x[v], k + r * keys.k_width + g * kSide);
      }
#pragma GCC unroll 16
      for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) {
          const int64_t at = (j + r) * kQueries + v * kLanes;
          const F x = to_float(sum[r][v]) * keys.k_scale[key + r];
          const F t = kBias ? V::fma(x, scale[v], V::load(bias + at)) : x * scale[v];
          V::store(logits + at, t);
          most[v] = V::max(most[v], t);
        }
    }
    for (int v = 0; v < kVectors; v++) {
      const F before = V::load(highest + v * kLanes), after = V::max(before, most[v]);
      const F finite = V::max(after, all(kNoKey));
      V::store(old_factor + v * kLanes, factor(before - finite));
      V::store(new_factor + v * kLanes, factor(most[v] - finite));
      V::store(highest + v * kLanes, after);
      V::store(local + v * kLanes, most[v]);
    }
  }

  // P, and its sums.
  template <bool kBias>
  void block_weights(int64_t here) {
    for (int v = 0; v < kVectors; v++) {
      const F most = V::load(local + v * kLanes), finite = V::max(most, all(kNoKey));
      I sum = {}, beside = {};
      for (int64_t j = 0; j < here; j += kSide * kTogether) {
        I side[kTogether] = {};
#pragma GCC unroll 2
        for (int t = 0; t < kTogether; t++) {
#pragma GCC unroll 4
          for (int s = 0; s < kSide; s++) {
            const F x = V::load(logits + (j + t * kSide + s) * kQueries + v * kLanes) - finite;
            const I code = (I)V::fma(exp2(V::max(x, all(kLowest))), all(255.0f), all(0x1p23f));  // in the low bits
            side[t] |= s == 0 ? code & 255 : code << (s * (32 / kSide));
          }
          store_int(p + (j / kSide + t) * kQueries + v * kLanes, side[t]);
          sum = V::add_codes(sum, side[t]);
        }
        if constexpr (kTogether > 1) beside = V::dot_paired(beside, side);
      }
      store_int(p_start + v * kLanes, -(kTogether > 1 ? beside : sum * V::kValueOffset));
      const F before = V::load(total + v * kLanes);
      const F after = V::fma(to_float(sum), V::load(new_factor + v * kLanes), before * V::load(old_factor + v * kLanes));
      V::store(total + v * kLanes, kBias ? most > -HUGE_VALF ? after : before : after);
    }
  }

  template <bool kBias>
  void block_values(int64_t block, int64_t here) {
    I start[kVectors];
    F old[kVectors], now[kVectors];
    for (int v = 0; v < kVectors; v++) {
      start[v] = kTogether > 1 || V::kValueOffset ? load_int(p_start + v * kLanes) : I{};
      old[v] = V::load(old_factor + v * kLanes), now[v] = V::load(new_factor + v * kLanes);
    }
    for (int64_t e = 0; e < keys.channels; e += V::kRows) {
      const Code* const codes = keys.v + (block * keys.channels + e) * kKeys;
      I sum[V::kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sum[r][v] = kTogether > 1 ? start[v] + keys.v_start[block * keys.channels + e + r] : start[v];
      for (int64_t g = 0; g < here / kSide; g += kTogether) {
        I x[kVectors][kTogether];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 2
          for (int t = 0; t < kTogether; t++) x[v][t] = load_int(p + (g + t) * kQueries + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; v++) sum[r][v] = V::dot_values(sum[r][v], x[v], codes + r * kKeys + g * kSide);
      }
#pragma GCC unroll 16
      for (int r = 0; r < V::kRows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) {
          float* const at = acc + (e + r) * kQueries + v * kLanes;
          const F part = to_float(sum[r][v]) * keys.v_scale[block * keys.channels + e + r];
          const F before = V::load(at), after = V::fma(part, now[v], before * old[v]);
          V::store(at, kBias ? V::load(local + v * kLanes) > -HUGE_VALF ? after : before : after);
        }
    }
  }

  template <bool kBias>
  void add_block(int64_t block, int64_t here) {
    block_logits<kBias>(block, here);
    block_weights<kBias>(here);
    block_values<kBias>(block, here);
  }

  void store_results() {
    bool none = false;
    for (int64_t block = 0; block < keys.blocks; block++) none |= keys.undefined[block] != 0;
    with_dtype(job.dtype, [&]<class T>(const T*) {
      for (int64_t i = 0; i < last - first; i++) {
        T* const out = static_cast<T*>(job.out) + ((batch * job.queries + first + i) * job.heads + head) * job.v_width;
        const bool sees = total[i] > 0.0f, nan = none || undefined[i];
        const float inverse = sees ? nan ? float_of(0x7FC00000u) : 1.0f / total[i] : 0.0f;
#pragma GCC unroll 8
        for (int64_t e = 0; e < job.v_width; e++) row[e] = sees ? acc[e * kQueries + i] * inverse : 0.0f;
        for (int64_t e = 0; e < job.v_width; e++) narrow(row[e], out + e);
      }
    });
  }

 private:
  static I load_int(const int32_t* p) {
    I x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store_int(int32_t* p, I x) { memcpy(p, &x, sizeof x); }
};

template <class V>
void int8_attend(const MxAttention& job, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared,
                 uint8_t* scratch) {
  Int8Tile<V> tile(job, batch, head, first, last, prepared, scratch);
  for (int64_t block = 0; block < tile.keys.blocks; block++) {
    const int64_t key = block * kKeys;
    if (job.causal && key >= last) break;
    const bool biased = job.mask_dtype != MX_NO_MASK || key + kKeys > job.keys || (job.causal && key + kKeys - 1 > first);
    const int64_t here = min_of(kKeys, up_to(job.keys - key, V::kRows));
    if (!biased)
      tile.template add_block<false>(block, kKeys);
    else if (tile.load_bias(key, here))
      tile.template add_block<true>(block, here);
  }
  tile.store_results();
}

template <class V>
Attention int8_attention(const MxAttention& job) {
  const int64_t attend = Int8Tile<V>::floats(job) * 4, prepare = int8_prepare_bytes(job);
  return {Int8Head<V>(job, nullptr).bytes, 8 * kKeys, Int8Tile<V>::kQueries, attend > prepare ? attend : prepare, int8_prepare<V>,
          int8_attend<V>, int8_sums<V>};
}

}  // namespace
}  // namespace mxdit
