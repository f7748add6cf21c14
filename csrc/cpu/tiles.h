// AMX, of bf16 numbers and of bytes. A tile is 16 rows of 64 bytes; two tiles of activations times two of weights give 32 rows
// by a panel's 32 columns. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "bf16_product.h"
#include "int_product.h"

namespace mxdit {
namespace {

class Tiles {
 public:
  // A task's sums (768 KB), a group of its weights (384 KB, half for bytes) and of its activations (544 KB) share 2 MB of L2
  // cache.
  static constexpr int kRows = 32, kPanels = 12, kTaskRows = 512;
  // Tiles outpace the unpacking of weights, which more rows have to pay for; CPUs that have them have large caches, too.
  static constexpr int64_t kHeldBytes = 32 << 20;

  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  // Adds the products of bf16 numbers to `sums`.
  template <bool kOuter>
  void group(const Bf16Group* a, int rows, int blocks, const uint16_t* w, const float* a_outer, const float* w_outer,
             float* sums) {
    begin(a, rows);
    alignas(64) float product[kRows * kPanelColumns];  // where it has to be scaled before it is added
    fence();
    if (rows > 16)
      multiply<true, kOuter>(a, blocks, w, kOuter ? product : sums);
    else
      multiply<false, kOuter>(a, blocks, w, kOuter ? product : sums);
    fence();
    if (kOuter)
      for (int m = 0; m < rows; m++)
        for (int n = 0; n < kPanelColumns; n += 16) {
          float* at = sums + m * kPanelColumns + n;
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_outer[m]), _mm512_loadu_ps(w_outer + n));
          const __m512 p = _mm512_load_ps(product + m * kPanelColumns + n);
          _mm512_storeu_ps(at, _mm512_fmadd_ps(p, scale, _mm512_loadu_ps(at)));
        }
  }

  // The same of four-bit numbers in windows; as int_group with Windows::both.
  template <bool kOuter>
  void group(const IntGroup* a, const IntWindow* windows, int rows, int blocks, const uint8_t* w, const float* w_scale,
             const float* a_outer, const float* w_outer, float* sums) {
    begin(a, rows);
    alignas(64) int32_t product[kRows * kPanelColumns];
    fence();
    if (rows > 16)
      multiply<true>(a, blocks, w, product);
    else
      multiply<false>(a, blocks, w, product);
    fence();
    for (int n = 0; n < kPanelColumns; n += 16) {
      const __m512 of_columns = _mm512_loadu_ps(w_scale + n);
      for (int m = 0; m < rows; m++) {
        const __m512i whole = _mm512_load_si512(product + m * kPanelColumns + n);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(whole, _mm512_set1_epi32(windows[m].start)));
        const __m512 p = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(windows[m].scale)), of_columns);
        float* at = sums + m * kPanelColumns + n;
        if (kOuter) {
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_outer[m]), _mm512_loadu_ps(w_outer + n));
          _mm512_storeu_ps(at, _mm512_fmadd_ps(p, scale, _mm512_loadu_ps(at)));
        } else {
          _mm512_storeu_ps(at, _mm512_add_ps(p, _mm512_loadu_ps(at)));
        }
      }
    }
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  // Tile instructions do not tell the compiler which memory they read; no store may pass this.
  static void fence() { asm volatile("" : : : "memory"); }

  // Rows of either kind lie as far apart as bf16 ones, strip by strip.
  void begin(const void* a, int rows) {
    if (rows != rows_) configure(rows);
    if (a != a_) a_ = a, ahead_ = static_cast<const char*>(a) + static_cast<size_t>(rows) * sizeof(Bf16Group);
  }

  // Tiles 0 and 1 hold the sums of up to 16 rows, 2 and 3 those of the rows behind them; 4 and 5 the activations of both;
  // 6 and 7 weights of 16 columns. Tiles have as many rows as there are, so that nothing behind the last one is read.
  void configure(int rows) {
    const int upper = min_of(rows, 16), lower = rows - upper;
    const int tile_rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    config_ = {};
    config_.palette = 1;
    for (int t = 0; t < 8; t++) {
      config_.rows[t] = static_cast<uint8_t>(tile_rows[t]);
      config_.row_bytes[t] = tile_rows[t] ? 64 : 0;
    }
    asm volatile("" : : "r"(&config_) : "memory");  // all of it: the next line names 8 bytes only
    _tile_loadconfig(&config_);
    rows_ = rows;
  }

  // What `sums` holds, or zero if kFresh, and the products of a group of K. kLower: there are more than 16 rows.
  template <bool kLower, bool kFresh>
  void multiply(const Bf16Group* a, int blocks, const uint16_t* w, float* sums) {
    constexpr int64_t a_stride = sizeof(Bf16Group), stride = kPanelColumns * 4;  // bytes from row to row
    float* lower = sums + 16 * kPanelColumns;
    if (kFresh) {
      _tile_zero(0);
      _tile_zero(1);
      if (kLower) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + 16, stride);
      if (kLower) {
        _tile_loadd(2, lower, stride);
        _tile_loadd(3, lower + 16, stride);
      }
    }
    const char* ahead = ahead_;
    for (int b = 0; b < blocks; b++, w += kBlock * kPanelColumns) {
      for (int i = 0; i < 4; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      _tile_loadd(4, a->v + b * kBlock, a_stride);
      if (kLower) _tile_loadd(5, a[16].v + b * kBlock, a_stride);
      _tile_stream_loadd(6, w, stride);
      _tile_dpbf16ps(0, 4, 6);
      if (kLower) _tile_dpbf16ps(2, 5, 6);
      _tile_stream_loadd(7, w + 32, stride);
      _tile_dpbf16ps(1, 4, 7);
      if (kLower) _tile_dpbf16ps(3, 5, 7);
    }
    ahead_ = ahead;
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + 16, stride);
    if (kLower) {
      _tile_stored(2, lower, stride);
      _tile_stored(3, lower + 16, stride);
    }
  }

  // Sums of 64 products of bytes at a time; a step behind the last block finds zeros in the activations.
  template <bool kLower>
  void multiply(const IntGroup* a, int blocks, const uint8_t* w, int32_t* product) {
    constexpr int64_t a_stride = sizeof(IntGroup), stride = kPanelColumns * 4;
    _tile_zero(0);
    _tile_zero(1);
    if (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const char* ahead = ahead_;
    for (int b = 0; b < blocks; b += 2, w += 2 * kBlock * kPanelColumns) {
      for (int i = 0; i < 4; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      _tile_loadd(4, a->q + b * kBlock, a_stride);
      if (kLower) _tile_loadd(5, a[16].q + b * kBlock, a_stride);
      _tile_stream_loadd(6, w, stride);
      _tile_dpbsud(0, 4, 6);
      if (kLower) _tile_dpbsud(2, 5, 6);
      _tile_stream_loadd(7, w + 64, stride);
      _tile_dpbsud(1, 4, 7);
      if (kLower) _tile_dpbsud(3, 5, 7);
    }
    ahead_ = ahead;
    int32_t* lower = product + 16 * kPanelColumns;
    _tile_stored(0, product, stride);
    _tile_stored(1, product + 16, stride);
    if (kLower) {
      _tile_stored(2, lower, stride);
      _tile_stored(3, lower + 16, stride);
    }
  }

  int rows_ = 0;  // that the tiles are configured for
  // The rows that one panel after the other is multiplied by, and, of those that come next, the ones to ask for.
  const void* a_ = nullptr;
  const char* ahead_ = nullptr;
  Config config_;
};

}  // namespace
}  // namespace mxdit
