// Products of a few rows of activations on BF16 dot products. Weights are multiplied as they lie, 32 neighbours in K at a time:
// to transpose and store them, as panels are, takes longer than such rows take to multiply. What is declined is what
// bf16_product.h declines. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "bf16_product.h"

namespace mxdit {
namespace {

constexpr int kFewRows = 4;

// Rows and columns of one call, and where their sums go.
struct FewRows {
  const Bf16Group* a[kFewRows];  // of each row its first group; behind the last row, the last one again
  const float* a_outer[kFewRows];
  int64_t held;  // from a row's group to its next
  float* sums;   // (rows, kPanelColumns)
};

// A block of a weight that bf16_values does not take: zeros, or false.
[[gnu::noinline]] inline bool few_rows_zero(const uint8_t* codes, int format, int64_t bytes, uint8_t byte) {
  if (byte == 0xFF) return false;
  const uint8_t magnitude = format == MX_FP4 ? 0x77 : 0x7F;
  for (int64_t i = 0; i < bytes; i++)
    if (codes[i] & magnitude) return false;
  return true;
}

// Adds the products of R rows and C columns, from n on, to their sums.
template <int R, int C, int kFormat, bool kOuter>
bool few_rows_columns(const MxLinear& job, const FewRows& rows, int64_t n, int64_t at) {
  constexpr int bytes = kFormat == MX_FP4 ? kBlock / 2 : kBlock;
  const int64_t row_codes = code_bytes(kFormat, job.k), blocks = blocks_of(job.k), groups = groups_of(job.k);
  const uint8_t *codes[C], *scale[C];
  for (int c = 0; c < C; c++) {
    const int64_t column = min_of(n + c, job.n - 1);
    codes[c] = job.w_codes + column * row_codes, scale[c] = job.w_scale + column * blocks;
  }
  __m512 p[R][C];
#pragma GCC unroll 4
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) p[m][c] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    const int64_t last = min_of<int64_t>(blocks, (g + 1) * kGroupBlocks);
    for (int64_t b = g * kGroupBlocks; b < last; b++) {
      const int64_t left = row_codes - b * bytes;
      __m512i w[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const uint8_t* from = codes[c] + b * bytes;
        __builtin_prefetch(from + C * row_codes, 0, 2);  // the columns that come next; it reads nothing behind the last
        uint8_t padded[bytes];
        if (left < bytes) {
          memset(padded, 0, bytes);
          memcpy(padded, from, static_cast<size_t>(left));
          from = padded;
        }
        if (!bf16_values(from, kFormat, scale[c][b], w[c])) {
          if (!few_rows_zero(from, kFormat, bytes, scale[c][b])) return false;
          w[c] = _mm512_setzero_si512();
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < R; m++) {
        const __m512bh x = (__m512bh)_mm512_load_si512(rows.a[m][g * rows.held].v + (b - g * kGroupBlocks) * kBlock);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) p[m][c] = _mm512_dpbf16_ps(p[m][c], x, (__m512bh)w[c]);
      }
    }
    if (!kOuter && g + 1 < groups) continue;
#pragma GCC unroll 4
    for (int m = 0; m < R; m++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        float& sum = rows.sums[m * kPanelColumns + at + c];
        const float part = _mm512_reduce_add_ps(p[m][c]);
        if (kOuter) {
          sum = __builtin_fmaf(part, rows.a_outer[m][g * rows.held] * job.w_outer[min_of(n + c, job.n - 1) * groups + g], sum);
          p[m][c] = _mm512_setzero_ps();
        } else {
          sum += part;
        }
      }
  }
  return true;
}

template <int R, int kFormat, bool kOuter>
bool few_rows_panel(const MxLinear& job, const FewRows& rows, int64_t n0, int64_t n1) {
  constexpr int columns = 2;
  for (int64_t n = n0; n < n1; n += columns)
    if (!few_rows_columns<R, columns, kFormat, kOuter>(job, rows, n, n - n0)) return false;
  return true;
}

template <int R>
bool few_rows_any(const MxLinear& job, const FewRows& rows, int64_t n0, int64_t n1) {
  if (job.w_outer) return few_rows_panel<R, MX_FP4, true>(job, rows, n0, n1);
  if (job.w_format == MX_FP4) return few_rows_panel<R, MX_FP4, false>(job, rows, n0, n1);
  return few_rows_panel<R, MX_FP8, false>(job, rows, n0, n1);
}

bool few_rows_multiply(const MxLinear& job, int64_t base, int64_t held, const uint8_t* a, int64_t m0, int64_t m1, int64_t n0,
                       int64_t n1, uint8_t* scratch) {
  const Bf16Group* groups = reinterpret_cast<const Bf16Group*>(a);
  const float* outer = reinterpret_cast<const float*>(groups + groups_of(job.k) * held);
  const int count = static_cast<int>(m1 - m0);
  FewRows rows;
  rows.held = held, rows.sums = reinterpret_cast<float*>(scratch);
  for (int m = 0; m < kFewRows; m++) {
    const int64_t row = m0 + min_of(m, count - 1);
    rows.a[m] = groups + row, rows.a_outer[m] = outer + row;
  }
  start_sums(job, rows.sums, kFewRows, kPanelColumns, n0, n1);
  const auto multiply = count == 1 ? few_rows_any<1> : count == 2 ? few_rows_any<2> : few_rows_any<4>;
  if (!multiply(job, rows, n0, n1)) return false;
  store_sums(job, rows.sums, kPanelColumns, base + m0, base + m1, n0, n1);
  return true;
}

inline Product few_rows_product(const MxLinear& job) {
  Product product = {};
  product.held_bytes = 8 << 20;
  product.a_row_bytes = static_cast<int64_t>(sizeof(Bf16Group)) + (job.w_outer ? 4 : 0);
  product.columns = kPanelColumns, product.rows = kFewRows;
  product.prepare_bytes = job.a_format == MX_FLOAT ? 0 : packed_row_bytes(job);
  product.multiply_bytes = kFewRows * kPanelColumns * 4;
  product.prepare = bf16_prepare;
  product.multiply = few_rows_multiply;
  return product;
}

}  // namespace
}  // namespace mxdit
