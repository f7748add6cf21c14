// Products on BF16 units: operands decoded to bf16, which holds every product of an element and a power of two, sums in
// fp32. Such units flush subnormal numbers, so operands that come near them are declined. A template over the unit, `V`,
// one of which lives as long as a task is being multiplied:
//   kRows                rows of activations at once
//   kPanels, kTaskRows   panels of 32 columns and rows in one task, at most
//   kHeldBytes           see Product
//   group<kOuter>        adds the products of one group of K, for some rows and one panel, to their sums
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include <immintrin.h>

#include "encode_avx512.h"
#include "float_product.h"
#include "transpose_avx512.h"

namespace mxdit {
namespace {

constexpr int kPanelColumns = 32;
// A group of activations has to have something of at least 2^-40 in it, or be all zeros, and a block of weights a scale of
// at least that. What the unit flushes, products and activations below 2^-126, is then nothing beside the group's others.
constexpr int kLeastByte = 87;
constexpr int kMostByte = 244;
// Products of four-bit numbers stay exact: a block of activations, too, has to have something of at least 2^-82 in it. As
// that is at most 6 times the block's scale, the scale is 2^-84 or more, and the numbers are multiples of 2^-85. Those of
// the weights are multiples of 2^-41, so that all products and whatever they sum to are multiples of 2^-126: zero or normal.
constexpr int kLeastFourBit = 45;

constexpr int64_t kEnoughTasks = 32;  // for the threads of most CPUs

// One (row, group of K) of the activations; padded, so that the rows of a tile do not fall on the same cache sets.
struct alignas(64) Bf16Group {
  uint16_t v[kGroup];
  uint16_t padding[32];
};

// fp32 numbers that bf16 holds.
inline void store_bf16(const float* v, uint16_t* out) {
  for (int i = 0; i < kBlock; i++) out[i] = static_cast<uint16_t>(bits_of(v[i]) >> 16);
}

// The 128 E4M3 magnitudes as bf16. Made by the compiler: what starts with the library must run on every CPU.
struct Fp8Table {
  alignas(64) uint16_t bf16[128];
  constexpr Fp8Table() : bf16() {
    for (int code = 0; code < 128; code++) {
      const int field = code >> 3, fraction = code & 7;
      if (field == 0 && fraction != 0) {  // fraction x 2^-9
        const int top = fraction >= 4 ? 2 : fraction >= 2 ? 1 : 0;
        bf16[code] = static_cast<uint16_t>((127 - 9 + top) << 7 | (fraction << (7 - top) & 0x7F));
      } else {
        bf16[code] = static_cast<uint16_t>(field == 0 ? 0 : (field + 120) << 7 | fraction << 4);
      }
    }
    bf16[127] = 0x7FC0;
  }
};

constexpr Fp8Table fp8_table;

// 2^(byte-127) times 32 bf16 numbers, by their exponents. The byte must leave them normal.
inline __m512i scaled_bf16(__m512i value, __m512i shift) {
  return _mm512_mask_add_epi16(value, _mm512_test_epi16_mask(value, _mm512_set1_epi16(0x7FFF)), value, shift);
}

// The bf16 numbers of 32 E2M1 codes, in the lowest bits of their lanes. The table has each number twice, and so the fifth
// bit, the last one that a look-up reads, does not count.
inline __m512i bf16_of_fp4(__m512i codes) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, -0x8000,
                                                                 -0x4100, -0x4080, -0x4040, -0x4000, -0x3FC0, -0x3F80, -0x3F40));
  return _mm512_permutexvar_epi16(codes, table);
}

// The bf16 numbers of 32 E4M3 codes, one a lane.
inline __m512i bf16_of_fp8(__m512i codes) {
  const __m512i* t = reinterpret_cast<const __m512i*>(fp8_table.bf16);
  const __m512i low = _mm512_permutex2var_epi16(t[0], codes, t[1]), high = _mm512_permutex2var_epi16(t[2], codes, t[3]);
  const __m512i value = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40)), high);
  return _mm512_or_si512(value, _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8));
}

// 32 scaled E4M3 numbers, their codes in the high bytes. Shifts put exponent and fraction in their place, and what remains is
// the bias; but not for zeros and subnormal numbers, and `small` is whether there may be some.
inline __m512i scaled_fp8(__m512i codes, bool small, __m512i shift) {
  const __m512i bias = _mm512_add_epi16(shift, _mm512_set1_epi16(120 << 7));
  const __m512i moved = _mm512_and_si512(_mm512_srai_epi16(codes, 4), _mm512_set1_epi16(-0x7810));  // of the sign's copies, one
  if (!small) return _mm512_add_epi16(moved, bias);
  const __m512i magnitude = _mm512_and_si512(moved, _mm512_set1_epi16(0x7F0));
  const __mmask32 some = _mm512_test_epi16_mask(magnitude, magnitude);
  if (some & _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80)))
    return scaled_bf16(bf16_of_fp8(_mm512_srli_epi16(codes, 8)), shift);
  return _mm512_mask_add_epi16(moved, some, moved, bias);
}

// One full block of packed numbers, in their order. False where the scale is none that only adds to their exponents, and for NaN.
[[gnu::always_inline]] inline bool bf16_values(const uint8_t* codes, int format, uint8_t byte, __m512i& out) {
  if (byte < kLeastByte || byte > kMostByte) return false;
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((byte - 127) * 128));
  if (format == MX_FP4) {
    const __m512i two = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    out = scaled_bf16(bf16_of_fp4(_mm512_or_si512(two, _mm512_slli_epi32(two, 12))), shift);
    return true;
  }
  const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i magnitude = _mm256_and_si256(one, _mm256_set1_epi8(0x7F));
  // Whether the magnitude is from 8 to 0x7E, neither small nor NaN, by one comparison.
  const __m256i above = _mm256_sub_epi8(magnitude, _mm256_set1_epi8(8));
  const __mmask32 other = _mm256_cmpgt_epu8_mask(above, _mm256_set1_epi8(0x7E - 8));
  out = scaled_fp8(_mm512_slli_epi16(_mm512_cvtepu8_epi16(one), 8), other, shift);
  return !other || !_mm256_cmpeq_epi8_mask(magnitude, _mm256_set1_epi8(0x7F));
}

// One full block of packed activations as bf16.
inline void bf16_block(const uint8_t* codes, int format, uint8_t byte, uint16_t* out) {
  __m512i values;
  if (bf16_values(codes, format, byte, values)) return _mm512_store_si512(out, values);
  float block[kBlock];
  decode_block(codes, kBlock, format, byte, block);
  store_bf16(block, out);
}

// One group of a row of the activations. False where the unit would flush too much of it.
inline bool bf16_prepare_group(const MxLinear& job, int64_t m, const PackedRow& row, int64_t g, Bf16Group& group) {
  uint16_t* v = group.v;
  const int length = group_length(job, g);
  if (!row.codes && !job.mul_scale) {
    const Bf16* x = static_cast<const Bf16*>(job.x) + m * job.x_stride + g * kGroup;
    memcpy(v, x, static_cast<size_t>(length) * 2);
    memset(v + length, 0, static_cast<size_t>(-length & (kBlock - 1)) * 2);
  } else {
    for (int k = 0; k < length; k += kBlock) {
      if (row.codes && length - k >= kBlock) {
        const int64_t at = g * kGroup + k;
        bf16_block(row.codes + code_bytes(job.a_format, at), job.a_format, row.scale[at / kBlock], v + k);
        continue;
      }
      float block[kBlock] = {};
      activations(job, m, row, g * kGroup + k, min_of(kBlock, length - k), block);
      store_bf16(block, v + k);
    }
  }
  __m512i magnitudes = _mm512_setzero_si512();
  for (int k = 0; k < length; k += kBlock) {
    const __m512i magnitude = _mm512_and_si512(_mm512_load_si512(v + k), _mm512_set1_epi16(0x7FFF));
    magnitudes = _mm512_max_epu16(magnitudes, magnitude);
    if (!four_bit(job)) continue;
    const uint32_t of_block = largest_magnitude_bf16(magnitude);
    if (of_block != 0 && of_block < kLeastFourBit << 7) return false;
  }
  const uint32_t top = largest_magnitude_bf16(magnitudes);
  return four_bit(job) || top == 0 || top >= kLeastByte << 7;
}

inline bool bf16_prepare(const MxLinear& job, int64_t base, int64_t held, int64_t first, int64_t last, uint8_t* a, uint8_t* scratch) {
  Bf16Group* out = reinterpret_cast<Bf16Group*>(a);
  float* outer = reinterpret_cast<float*>(out + groups_of(job.k) * held);
  for (int64_t m = first; m < last; m++) {
    PackedRow row = {};
    if (job.a_format != MX_FLOAT) row = packed_row(job, base + m, encode_avx512, scratch);
    for (int64_t g = 0; g < groups_of(job.k); g++) {
      if (!bf16_prepare_group(job, base + m, row, g, out[g * held + m])) return false;
      if (job.w_outer) outer[g * held + m] = outer_of(row, g);
    }
  }
  return true;
}

// A block of 16 columns, from panel.codes[first] on, as bf16: pairs of neighbours in K side by side, a pair's columns after
// one another, the next pair behind the panel's other columns. `byte` has the columns' scales. False when the block holds
// what the unit cannot take.
inline bool bf16_weights(const WeightPanel& panel, int64_t block, int first, __m512i byte, uint16_t* out) {
  // What multiplying by the scale adds to the bits of a bf16 number, in both halves of a lane.
  const __m512i twice = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 16));
  const __m512i shift = _mm512_slli_epi16(_mm512_sub_epi16(twice, _mm512_set1_epi16(127)), 7);
  __m512i any = _mm512_setzero_si512();
  __mmask64 nan = 0;
  const auto store = [&](__m512i value) {
    _mm512_store_si512(out, value);
    out += 2 * kPanelColumns;
  };
  __m512i dwords[4];
  if (panel.format == MX_FP4) {
    transpose_rows(panel.codes + first, block * 16, panel.block_codes(block), dwords);
    const __m512i codes_0_1 = _mm512_set1_epi32(4 << 16), codes_2_3 = _mm512_set1_epi32(12 << 16 | 8);
    for (int j = 0; j < 4; j++) {
      any = _mm512_or_si512(any, _mm512_and_si512(dwords[j], _mm512_set1_epi8(0x77)));
      // Both halves of a lane get the same two bytes, four codes, and shift down the one that is theirs.
      const __m512i low = _mm512_mask_mov_epi16(dwords[j], 0xAAAAAAAAu, _mm512_slli_epi32(dwords[j], 16));
      const __m512i high = _mm512_mask_mov_epi16(dwords[j], 0x55555555u, _mm512_srli_epi32(dwords[j], 16));
      store(scaled_bf16(bf16_of_fp4(_mm512_srlv_epi16(low, codes_0_1)), shift));
      store(scaled_bf16(bf16_of_fp4(_mm512_srlv_epi16(low, codes_2_3)), shift));
      store(scaled_bf16(bf16_of_fp4(_mm512_srlv_epi16(high, codes_0_1)), shift));
      store(scaled_bf16(bf16_of_fp4(_mm512_srlv_epi16(high, codes_2_3)), shift));
    }
  } else {
    // Two bytes of every lane to the high bytes of its halves.
    const __m512i codes_0_1 = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m512i codes_2_3 = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
    for (int part = 0; part < 2; part++) {
      const int bytes_left = panel.block_codes(block) - part * 16;
      transpose_rows(panel.codes + first, block * 32 + part * 16, bytes_left < 0 ? 0 : min_of(bytes_left, 16), dwords);
      for (int j = 0; j < 4; j++) {
        const __m512i magnitudes = _mm512_and_si512(dwords[j], _mm512_set1_epi8(0x7F));
        any = _mm512_or_si512(any, magnitudes);
        nan |= _mm512_cmpeq_epi8_mask(magnitudes, _mm512_set1_epi8(0x7F));
        const bool small = _mm512_cmplt_epu8_mask(magnitudes, _mm512_set1_epi8(8));
        store(scaled_fp8(_mm512_shuffle_epi8(dwords[j], codes_0_1), small, shift));
        store(scaled_fp8(_mm512_shuffle_epi8(dwords[j], codes_2_3), small, shift));
      }
    }
  }
  const __mmask16 small = _mm512_cmplt_epi32_mask(byte, _mm512_set1_epi32(kLeastByte));
  const __mmask16 large = _mm512_cmpgt_epi32_mask(byte, _mm512_set1_epi32(kMostByte));
  return !(nan | large | (small & _mm512_test_epi32_mask(any, any)));
}

// A panel's blocks of one group, (pairs of neighbours in K, columns, 2). On the way it asks for some of `next`.
inline bool bf16_panel(const WeightPanel& panel, int64_t group, int blocks, uint16_t* out, const NextPanel* next) {
  __m512i bytes[2][4];
  for (int half = 0; half < 2; half++) transpose_rows(panel.scale + half * 16, group * kGroupBlocks, blocks, bytes[half]);
  for (int64_t b = 0; b < blocks; b++, out += kBlock * kPanelColumns) {
    const int64_t block = group * kGroupBlocks + b;
    if (next) next->prefetch(block);
    for (int half = 0; half < 2; half++) {
      const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(bytes[half][b / 4], b % 4 * 8), _mm512_set1_epi32(0xFF));
      if (!bf16_weights(panel, block, half * 16, byte, out + half * 32)) return false;
    }
  }
  return true;
}

// Asks for the codes that columns n, n + step, ... before `end` have in a group of K. A task of several panels needs them
// next; where it has one panel, what comes next is the panel behind it, see NextPanel.
[[gnu::always_inline]] inline void fetch_codes(const MxLinear& job, int64_t group, int64_t n, int64_t end, int64_t step) {
  const int64_t bytes = code_bytes(job.w_format, group_length(job, group));
  for (; n < end; n += step) {
    const uint8_t* codes = job.w_codes + n * code_bytes(job.w_format, job.k) + code_bytes(job.w_format, group * kGroup);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
  }
}

// A panel's weights in one group of K.
struct alignas(64) Bf16Panel {
  uint16_t w[kGroup * kPanelColumns];
  float outer[kPanelColumns];
};

// The operands of a product on V; see panels_multiply.
template <class V>
class Bf16Operands {
 public:
  using Panel = Bf16Panel;
  static constexpr int kRows = V::kRows;

  Bf16Operands(const MxLinear& job, int64_t held, const uint8_t* a) : groups_(reinterpret_cast<const Bf16Group*>(a)) {
    outer_ = reinterpret_cast<const float*>(groups_ + groups_of(job.k) * held);
  }

  bool unpack(const WeightPanel& weights, int64_t g, int blocks, int64_t, int64_t, const NextPanel* next, Panel& panel) {
    return bf16_panel(weights, g, blocks, panel.w, next);
  }

  template <bool kOuter>
  void multiply(int64_t at, int rows, int blocks, const Panel& panel, float* sums) {
    unit_.template group<kOuter>(groups_ + at, rows, blocks, panel.w, outer_ + at, panel.outer, sums);
  }

 private:
  V unit_;
  const Bf16Group* groups_;
  const float* outer_;
};

// One task, panels times rows. `Operands`, one of which lives as long as the task, has
//   Panel                what a panel's weights are unpacked to, with its outer scales in `outer`
//   unpack               a group of K of a panel, for the prepared rows [first, first + rows); false to decline
//   multiply<kOuter>     adds the products of up to kRows prepared rows, from `at` on, and one panel to their sums
template <class Operands>
bool panels_multiply(const MxLinear& job, int64_t base, int64_t held, const uint8_t* a, int64_t m0, int64_t m1, int64_t n0,
                     int64_t n1, uint8_t* scratch) {
  const int64_t rows = m1 - m0, panels = (n1 - n0 + kPanelColumns - 1) / kPanelColumns;
  const auto unpacked = reinterpret_cast<typename Operands::Panel*>(scratch);
  float* all_sums = reinterpret_cast<float*>(unpacked + panels);
  const auto column = [&](int64_t p) { return min_of(n0 + p * kPanelColumns, n1); };
  // Calls f for the rows [m, m + count) and the panel p that are multiplied at once, in the order of their sums.
  const auto each = [&](auto f) {
    for (int64_t m = 0; m < rows; m += Operands::kRows)
      for (int64_t p = 0; p < panels; p++) {
        const int count = static_cast<int>(min_of<int64_t>(Operands::kRows, rows - m));
        f(m, count, p, all_sums + (m * panels + p * count) * kPanelColumns);
      }
  };

  each([&](int64_t, int count, int64_t p, float* sums) {
    start_sums(job, sums, count, kPanelColumns, column(p), column(p + 1));
  });
  Operands operands(job, held, a);
  const NextPanel next(job, n1, kPanelColumns);
  for (int64_t g = 0; g < groups_of(job.k); g++) {
    const int blocks = static_cast<int>(blocks_of(group_length(job, g)));
    const int64_t at = g * held + m0, steps = (rows + Operands::kRows - 1) / Operands::kRows;
    for (int64_t p = 0; p < panels; p++) {
      const WeightPanel weights(job, column(p), kPanelColumns);
      if (!operands.unpack(weights, g, blocks, at, rows, panels == 1 ? &next : nullptr, unpacked[p])) return false;
      if (job.w_outer) outer_column(job, g, column(p), kPanelColumns, unpacked[p].outer);
    }
    each([&](int64_t m, int count, int64_t p, float* sums) {
      if (panels > 1 && g + 1 < groups_of(job.k)) fetch_codes(job, g + 1, column(p) + m / Operands::kRows, column(p + 1), steps);
      if (job.w_outer)
        operands.template multiply<true>(at + m, count, blocks, unpacked[p], sums);
      else
        operands.template multiply<false>(at + m, count, blocks, unpacked[p], sums);
    });
  }
  each([&](int64_t m, int count, int64_t p, float* sums) {
    store_sums(job, sums, kPanelColumns, base + m0 + m, base + m0 + m + count, column(p), column(p + 1));
  });
  return true;
}

// A product whose tasks are panels_multiply's, but for how activations are prepared.
template <class V, class Operands>
Product panels_product(const MxLinear& job) {
  // Rows are cut evenly; columns so that a small job, too, has tasks for some threads, and so that weights which serve a
  // few rows only come in the order of memory.
  const int64_t row_tasks = (job.m + V::kTaskRows - 1) / V::kTaskRows;
  const int64_t rows = ((job.m + row_tasks - 1) / row_tasks + V::kRows - 1) / V::kRows * V::kRows;
  const int64_t fair = row_tasks * ((job.n + kPanelColumns - 1) / kPanelColumns) / kEnoughTasks;
  const int64_t panels = fair < 1 || rows <= V::kRows ? 1 : min_of<int64_t>(fair, V::kPanels);
  Product product = {};
  product.held_bytes = V::kHeldBytes;
  product.columns = panels * kPanelColumns;
  product.rows = rows;
  product.multiply_bytes = panels * (static_cast<int64_t>(sizeof(typename Operands::Panel)) + rows * kPanelColumns * 4);
  product.multiply = panels_multiply<Operands>;
  return product;
}

template <class V>
Product bf16_product(const MxLinear& job) {
  Product product = panels_product<V, Bf16Operands<V>>(job);
  product.a_row_bytes = static_cast<int64_t>(sizeof(Bf16Group)) + (job.w_outer ? 4 : 0);
  product.prepare_bytes = job.a_format == MX_FLOAT ? 0 : packed_row_bytes(job);
  product.prepare = bf16_prepare;
  return product;
}

// Whether bf16 holds the activations of this job.
inline bool bf16_activations(const MxLinear& job) { return job.a_format != MX_FLOAT || job.x_dtype == MX_BF16; }

}  // namespace
}  // namespace mxdit
