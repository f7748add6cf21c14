// AVX-512 with bf16 dot products and VBMI: Sapphire Rapids and newer, Zen 4 and newer. Four-bit products stay with byte dot
// products, which do twice as many a cycle.
#include "bf16_attention.h"
#include "bf16_product.h"
#include "few_rows.h"
#include "int8_attention_avx512.h"
#include "int_avx512.h"
#include "rowwise.h"

namespace mxdit {
namespace {

struct Dot {
  static constexpr int kRows = 12, kPanels = 1, kTaskRows = 1024;
  static constexpr int64_t kHeldBytes = 8 << 20;

  template <bool kOuter>
  void group(const Bf16Group* a, int rows, int blocks, const uint16_t* w, const float* a_outer, const float* w_outer,
             float* sums) {
    int m = 0;
    if (rows == kRows) return some<kRows, kOuter>(a, blocks, w, a_outer, w_outer, sums);
    for (; m + 8 <= rows; m += 8) some<8, kOuter>(a + m, blocks, w, a_outer + m, w_outer, sums + m * kPanelColumns);
    for (; m + 4 <= rows; m += 4) some<4, kOuter>(a + m, blocks, w, a_outer + m, w_outer, sums + m * kPanelColumns);
    for (; m < rows; m++) some<1, kOuter>(a + m, blocks, w, a_outer + m, w_outer, sums + m * kPanelColumns);
  }

  template <int R, bool kOuter>
  static void some(const Bf16Group* a, int blocks, const uint16_t* w, const float* a_outer, const float* w_outer, float* sums) {
    __m512 p[R][2];
#pragma GCC unroll 16
    for (int m = 0; m < R; m++) p[m][0] = p[m][1] = _mm512_setzero_ps();
    for (int pair = 0; pair < blocks * kBlock / 2; pair++, w += 2 * kPanelColumns) {
      const __m512bh low = (__m512bh)_mm512_load_si512(w), high = (__m512bh)_mm512_load_si512(w + kPanelColumns);
#pragma GCC unroll 16
      for (int m = 0; m < R; m++) {
        int32_t two;
        memcpy(&two, a[m].v + 2 * pair, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
        p[m][0] = _mm512_dpbf16_ps(p[m][0], x, low);
        p[m][1] = _mm512_dpbf16_ps(p[m][1], x, high);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < R; m++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        float* at = sums + m * kPanelColumns + v * 16;
        const __m512 sum = _mm512_loadu_ps(at);
        if (kOuter) {
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_outer[m]), _mm512_loadu_ps(w_outer + v * 16));
          _mm512_storeu_ps(at, _mm512_fmadd_ps(p[m][v], scale, sum));
        } else {
          _mm512_storeu_ps(at, _mm512_add_ps(sum, p[m][v]));
        }
      }
  }
};

Attention attention(const MxAttention& job) {
  return job.method == MX_INT8 ? int8_attention<VnniInt8>(job) : bf16_attention(job);
}

Product fast(const MxLinear& job) {
  if (four_bit(job)) return int_product<Vnni>(job);
  if (!bf16_activations(job)) return float_product<Vnni>(job);
  return job.m <= kFewRows ? few_rows_product(job) : bf16_product<Dot>(job);
}

}  // namespace

Path avx512bf16_path() { return {"avx512bf16", encode_avx512, decode_any, fast, float_product<Vnni>, attention, rowwise}; }

}  // namespace mxdit
