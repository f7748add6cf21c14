// Attention on AMX's tiles of bf16: as bf16_attention.h, but for the products. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "bf16_attention.h"

namespace mxdit {
namespace {

struct TileUnit : Bf16Unit {
  static constexpr int kTileRows = 32, kParts = 1, kWhole = 32;

  // Sixteen rows of 64 bytes in every tile: rows behind the last query are there, too.
  class Session {
   public:
    Session() {
      config_.palette = 1;
      for (int t = 0; t < 8; t++) config_.rows[t] = 16, config_.row_bytes[t] = 64;
      asm volatile("" : : "r"(&config_) : "memory");  // all of it: the next line names 8 bytes only
      _tile_loadconfig(&config_);
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { _tile_release(); }

   private:
    struct alignas(64) {
      uint8_t palette = 0, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config_;
  };

  // Of 32 rows and C registers of columns; 32 numbers of each row at a time.
  template <int R, int C, int kStride>
  static void products(const uint16_t* a, const uint16_t* w, int64_t steps, bool add, float* sums, int64_t stride) {
    static_assert(R == kTileRows && C <= 2);
    const int64_t bytes = stride * 4;
    float* lower = sums + 16 * stride;
    asm volatile("" : : : "memory");  // compilers do not know what tiles read and write
    if (add) {
      _tile_loadd(0, sums, bytes);
      _tile_loadd(2, lower, bytes);
      if (C > 1) _tile_loadd(1, sums + 16, bytes);
      if (C > 1) _tile_loadd(3, lower + 16, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i += 16, a += 32, w += 32 * kColumns) {
      _tile_loadd(4, a, kStride * 2);
      _tile_loadd(5, a + 16 * kStride, kStride * 2);
      _tile_loadd(6, w, kColumns * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (C > 1) {
        _tile_loadd(7, w + 32, kColumns * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(2, lower, bytes);
    if (C > 1) _tile_stored(1, sums + 16, bytes);
    if (C > 1) _tile_stored(3, lower + 16, bytes);
    asm volatile("" : : : "memory");
  }

  static void keys(const uint8_t* const* k, int dtype, int64_t width, uint16_t* out) {
    memset(out, 0, static_cast<size_t>((width + kWhole - 1) / kWhole * kWhole * kColumns) * 2);
    Bf16Unit::keys(k, dtype, width, out);
  }
};

inline Attention tile_attention(const MxAttention& job) {
  // A few queries leave the tiles mostly empty: then vectors are quicker.
  return job.dtype == MX_BF16 && job.queries > 8 ? tiled_attention<TileUnit>(job) : bf16_attention(job);
}

}  // namespace
}  // namespace mxdit
