// MXFP4 x MXFP4 in integers: twice an E2M1 value is a whole number up to 12, so the products of a block sum exactly in
// int32 and only the block's sum is scaled, in fp32. Where the blocks of a group have scales within three binades, the
// differences fit into the bytes too (12 << 3 = 96): such a "window" of the activations, the weights or both leaves less,
// or nothing, to scale block by block. A template over a path's dot product, `V`:
//   kLanes, kVectors  columns in one register, registers across a panel; kRows: rows of activations at once
//   F                 fp32 registers, with all, load, store, fma; to_float from int32 registers
//   Sum               what accumulates a block; begin(start), dot(sum, weights, activations), finish(sum, scale) to int32,
//                     `scale` pointing into IntWeights::scale, behind which a path may have factors for it
//   kOffset           what is added to plain weights, for instructions that want one operand unsigned; in a window it is
//                     kWindowOffsets times as much
//   kWindows          which windows there are; where any, unpack_window exists and pays from kWindowRows rows on
//   kFewRows          for how many rows few_rows() multiplies with weights on their way from memory, without a panel, where
//                     it can
//   kHeldBytes        of prepared activations, as Product has them
//   at(block, t)      where the t-th four elements of a block are in IntGroup::q; at(block, 0) + at(0, t)
//   encode            of this path
//   prepare_group     a row's group of activations as operands; int_prepare_group where the path has an unpack_row only
//   unpack_scales, unpack_weights   of a panel, likewise
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "panel.h"

namespace mxdit {
namespace {

constexpr uint8_t kTopByte = 234;  // above it a group's sum times its scale could overflow before the other scale is in
constexpr int kWindow = 3;         // binades

enum class Windows { none, weights, both };

// One (row, group of K) of the activations.
struct alignas(64) IntGroup {
  int8_t q[kGroup];             // twice the values, in a window shifted by what the block's scale is above its base
  float scale[kGroupBlocks];    // 2^(byte-127) / 4: undoes the doubling of both operands
  int32_t start[kGroupBlocks];  // as V::begin takes it, -offset * sum of the block's q: undoes the weights' offset
};

// The window of one (row, group), if it has one.
struct IntWindow {
  float scale;    // 2^(base-127) / 4, or 0 where the blocks are too far apart
  int32_t start;  // for weights in a window
};

struct IntRows {  // prepared activations: groups, windows, outer scales, each as [group of K][row]
  IntGroup* groups;
  IntWindow* windows;
  float* outer;

  IntRows(const MxLinear& job, int64_t held, uint8_t* a) {
    groups = reinterpret_cast<IntGroup*>(a);
    windows = reinterpret_cast<IntWindow*>(groups + groups_of(job.k) * held);
    outer = reinterpret_cast<float*>(windows + groups_of(job.k) * held);
  }
};

// Within every eight elements the even ones come first, as nibbles unpack.
constexpr int by_eights(int block, int t) { return block * kBlock + t * 4; }

alignas(16) constexpr int8_t kDoubled[kWindow + 1][16] = {
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
    {0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24},
    {0, 4, 8, 12, 16, 24, 32, 48, 0, -4, -8, -12, -16, -24, -32, -48},
    {0, 8, 16, 24, 32, 48, 64, 96, 0, -8, -16, -24, -32, -48, -64, -96},
};

// Fills in a row's group from its `bytes` of codes and the scales of its blocks. False where those are outside what a
// product in integers can multiply.
template <class V>
bool int_prepare_group(const uint8_t* codes, int64_t bytes, const uint8_t* scale, int blocks, IntGroup& group,
                       IntWindow& window) {
  uint8_t padded[kGroupBlocks][16];
  if (bytes < blocks * 16) {
    memset(padded[blocks - 1], 0, 16);
    codes = static_cast<const uint8_t*>(memcpy(padded, codes, static_cast<size_t>(bytes)));
  }
  int low = 0xFF, high = 0;
  bool nan = false, plain = true;
  uint64_t any[kGroupBlocks];
  for (int b = 0; b < blocks; b++) {
    uint64_t half[2];
    memcpy(half, codes + b * 16, 16);
    any[b] = (half[0] | half[1]) & 0x7777777777777777u;  // a block of zeros goes into every window
    nan |= scale[b] == 0xFF;
    plain &= scale[b] <= kTopByte || scale[b] == 0xFF;
    low = any[b] && scale[b] < low ? scale[b] : low;
    high = any[b] && scale[b] > high ? scale[b] : high;
  }
  const bool fits = V::kWindows == Windows::both && !nan && high - low <= kWindow;
  const int base = low < high ? low : high;  // all zeros: 0
  window = {fits ? power_of_two(base - 129) : 0.0f, 0};
  for (int b = 0; b < blocks; b++) {
    const int shift = fits && any[b] ? scale[b] - base : 0;
    int8_t* q = group.q + b * kBlock;
    V::unpack_row(codes + b * 16, shift, q);
    int32_t sum = 0;
    for (int i = 0; i < kBlock; i++) sum += q[i];
    group.start[b] = -V::kOffset * sum;
    window.start += group.start[b] * 8;
    group.scale[b] = scale[b] == 0xFF ? scale_value(0xFF) : fits ? window.scale : power_of_two(scale[b] - 129);
  }
  return plain;
}

template <class V>
bool int_prepare(const MxLinear& job, int64_t base, int64_t held, int64_t first, int64_t last, uint8_t* a, uint8_t* scratch) {
  const IntRows out(job, held, a);
  for (int64_t m = first; m < last; m++) {
    const PackedRow row = packed_row(job, base + m, V::encode, scratch);
    for (int64_t g = 0; g < groups_of(job.k); g++) {
      const int length = group_length(job, g);
      if (!V::prepare_group(row.codes + g * kGroup / 2, length / 2, row.scale + g * kGroupBlocks,
                            static_cast<int>(blocks_of(length)), out.groups[g * held + m], out.windows[g * held + m]))
        return false;
      if (job.w_outer) out.outer[g * held + m] = outer_of(row, g);
    }
  }
  return true;
}

// The weights of one panel and group of K.
struct IntWeights {
  const uint8_t* q;
  const float* scale;  // (blocks, columns), or in a window (columns), in room for (2, kGroupBlocks, columns)
  const float* outer;  // (columns)
  int blocks;
};

// Sums over one group of K, R rows by the panel's columns, added to `sums`.
template <class V, int R, Windows kWindows, bool kOuter>
void int_group(const IntGroup* a, const IntWindow* windows, const float* a_outer, const IntWeights& w, float* sums) {
  using F = typename V::F;
  constexpr int width = V::kLanes * V::kVectors;
  F p[R][V::kVectors] = {};
  typename V::Sum sum[R][V::kVectors];
  const uint8_t* q = w.q;
  for (int block = 0; block < w.blocks; block++, q += kBlock * width) {
    if (kWindows != Windows::both || block == 0) {
#pragma GCC unroll 8
      for (int m = 0; m < R; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V::kVectors; v++)
          sum[m][v] = V::begin(kWindows == Windows::both      ? windows[m].start
                               : kWindows == Windows::weights ? a[m].start[block] * V::kWindowOffsets
                                                              : a[m].start[block]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kBlock / 4; t++)
#pragma GCC unroll 8
      for (int m = 0; m < R; m++) {
        int32_t four;
        memcpy(&four, a[m].q + V::at(block, 0) + V::at(0, t), 4);
#pragma GCC unroll 4
        for (int v = 0; v < V::kVectors; v++)
          sum[m][v] = V::dot(sum[m][v], q + (t * V::kVectors + v) * V::kLanes * 4, four);
      }
    if (kWindows == Windows::both) continue;
#pragma GCC unroll 8
    for (int m = 0; m < R; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V::kVectors; v++) {
        const F whole = V::to_float(V::finish(sum[m][v], w.scale + block * width + v * V::kLanes));
        if (kWindows == Windows::weights)
          p[m][v] = V::fma(whole, V::all(a[m].scale[block]), p[m][v]);
        else
          p[m][v] = V::fma(whole * V::all(a[m].scale[block]), V::load(w.scale + block * width + v * V::kLanes), p[m][v]);
      }
  }
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V::kVectors; v++) {
      if (kWindows == Windows::both) p[m][v] = V::to_float(V::finish(sum[m][v], w.scale)) * V::all(windows[m].scale);
      if (kWindows != Windows::none) p[m][v] = p[m][v] * V::load(w.scale + v * V::kLanes);
      float* at = sums + m * width + v * V::kLanes;
      if (kOuter)
        V::store(at, V::fma(p[m][v], V::all(a_outer[m]) * V::load(w.outer + v * V::kLanes), V::load(at)));
      else
        V::store(at, p[m][v] + V::load(at));
    }
}

template <class V, int R, bool kOuter>
void int_rows(const IntGroup* a, const IntWindow* windows, const float* a_outer, const IntWeights& w, bool window, float* sums) {
  if constexpr (V::kWindows != Windows::none) {
    if (window) {
      bool all = V::kWindows == Windows::both;
      for (int m = 0; m < R; m++) all &= windows[m].scale != 0.0f;
      if (all) return int_group<V, R, Windows::both, kOuter>(a, windows, a_outer, w, sums);
      return int_group<V, R, Windows::weights, kOuter>(a, windows, a_outer, w, sums);
    }
  }
  int_group<V, R, Windows::none, kOuter>(a, windows, a_outer, w, sums);
}

template <class V, bool kOuter>
void int_panel(const IntGroup* a, const IntWindow* windows, const float* a_outer, int64_t rows, const IntWeights& w,
               bool window, float* sums) {
  constexpr int width = V::kLanes * V::kVectors;
  int64_t m = 0;
  for (; m + V::kRows <= rows; m += V::kRows)
    int_rows<V, V::kRows, kOuter>(a + m, windows + m, a_outer + m, w, window, sums + m * width);
  for (; m + 4 <= rows; m += 4) int_rows<V, 4, kOuter>(a + m, windows + m, a_outer + m, w, window, sums + m * width);
  for (; m + 2 <= rows; m += 2) int_rows<V, 2, kOuter>(a + m, windows + m, a_outer + m, w, window, sums + m * width);
  if (m < rows) int_rows<V, 1, kOuter>(a + m, windows + m, a_outer + m, w, window, sums + m * width);
}

template <class V>
bool int_multiply(const MxLinear& job, int64_t base, int64_t held, const uint8_t* a, int64_t m0, int64_t m1, int64_t n0,
                  int64_t n1, uint8_t* scratch) {
  constexpr int width = V::kLanes * V::kVectors;
  uint8_t* q = scratch;
  float* scales = reinterpret_cast<float*>(q + kGroup * width);
  float* w_outer = scales + 2 * kGroupBlocks * width;
  float* sums = w_outer + width;
  const IntRows rows(job, held, const_cast<uint8_t*>(a));
  const WeightPanel panel(job, n0, width);
  const NextPanel next(job, n0 + width, width);
  start_sums(job, sums, m1 - m0, width, n0, n1);
  for (int64_t g = 0; g < groups_of(job.k); g++) {
    const int blocks = static_cast<int>(blocks_of(group_length(job, g)));
    const auto prefetch = [&](int block) __attribute__((always_inline)) { next.prefetch(g * kGroupBlocks + block); };
    const int64_t first = g * held + m0;
    if (job.w_outer) outer_column(job, g, n0, width, w_outer);
    if constexpr (V::kFewRows > 0) {
      if (m1 - m0 <= V::kFewRows &&
          V::few_rows(panel, g, rows.groups + first, rows.windows + first, static_cast<int>(m1 - m0),
                      job.w_outer ? rows.outer + first : nullptr, scales, w_outer, blocks, sums, prefetch))
        continue;
    }
    bool window = false;
    if constexpr (V::kWindows != Windows::none)
      window = m1 - m0 >= V::kWindowRows && V::unpack_window(panel, g, blocks, q, scales, prefetch);
    if (!window) {
      if (!V::unpack_scales(panel, g, blocks, scales)) return false;
      for (int block = 0; block < blocks; block++) {
        prefetch(block);
        V::unpack_weights(panel, g * kGroupBlocks + block, q + block * kBlock * width);
      }
    }
    const IntWeights w = {q, scales, w_outer, blocks};
    if (job.w_outer) {
      int_panel<V, true>(rows.groups + first, rows.windows + first, rows.outer + first, m1 - m0, w, window, sums);
    } else {
      int_panel<V, false>(rows.groups + first, rows.windows + first, rows.outer, m1 - m0, w, window, sums);
    }
  }
  store_sums(job, sums, width, base + m0, base + m1, n0, n1);
  return true;
}

template <class V>
Product int_product(const MxLinear& job) {
  constexpr int width = V::kLanes * V::kVectors;
  const int64_t rows = 2048, outer = job.w_outer ? 4 : 0;
  return {V::kHeldBytes,
          static_cast<int64_t>(sizeof(IntGroup) + sizeof(IntWindow)) + outer,
          width,
          rows,
          packed_row_bytes(job),
          kGroup * width + (2 * kGroupBlocks + 1 + rows) * width * 4,
          int_prepare<V>,
          int_multiply<V>};
}

}  // namespace
}  // namespace mxdit
