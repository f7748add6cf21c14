// The tile instructions that tiles.h uses, in plain C++, for CPUs that lack them: AMX-TILE, AMX-BF16 and AMX-INT8 as Intel's
// Software Developer's Manual describes them. What a CPU answers with a fault ends the program, and so does what would go unnoticed
// on one: tiles that hold nothing yet, and memory that a tile may not reach.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace mxdit {
namespace {

class EmulatedTiles {
 public:
  // LDTILECFG: palette 1 has eight tiles of at most 16 rows of 64 bytes.
  void load_config(const void* from) {
    uint8_t config[64];
    memcpy(config, from, sizeof config);
    release();
    if (config[0] == 0) return;
    check(config[0] == 1, "LDTILECFG: unknown palette");
    for (int i = 1; i < 16; i++) check(config[i] == 0, "LDTILECFG: start row or reserved byte set");
    for (int t = 0; t < 16; t++) {
      uint16_t row_bytes;
      memcpy(&row_bytes, config + 16 + 2 * t, 2);
      const uint8_t rows = config[48 + t];
      check(t < kTiles || (rows == 0 && row_bytes == 0), "LDTILECFG: no such tile");
      check(rows <= kRows && row_bytes <= kRowBytes, "LDTILECFG: a tile is too large");
      check((rows == 0) == (row_bytes == 0), "LDTILECFG: a tile has rows or columns only");
      if (t < kTiles) tiles_[t].rows = rows, tiles_[t].row_bytes = row_bytes;
    }
    configured_ = true;
  }

  void release() { *this = EmulatedTiles(); }

  void zero(int t) {
    usable(t, "TILEZERO");
    memset(tiles_[t].bytes, 0, sizeof tiles_[t].bytes);
    tiles_[t].holds = true;
  }

  void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int r = 0; r < tiles_[t].rows; r++)
      memcpy(tiles_[t].bytes[r], static_cast<const uint8_t*>(from) + r * stride, tiles_[t].row_bytes);
  }

  void store(int t, void* to, int64_t stride) {
    usable(t, "TILESTORED");
    check(tiles_[t].holds, "TILESTORED: the tile holds nothing");
    for (int r = 0; r < tiles_[t].rows; r++)
      memcpy(static_cast<uint8_t*>(to) + r * stride, tiles_[t].bytes[r], tiles_[t].row_bytes);
  }

  // TDPBF16PS. Of each pair in K the first and the second products are summed apart, then added up, then added to the tile.
  void dot_bf16(int c, int a, int b) {
    operands(c, a, b, "TDPBF16PS");
    Tile &sum = tiles_[c], &left = tiles_[a], &right = tiles_[b];
    for (int m = 0; m < sum.rows; m++) {
      float apart[kRowBytes / 2] = {};
      for (int k = 0; k < right.rows; k++)
        for (int n = 0; n < right.row_bytes / 2; n++)
          apart[n] = flushed(__builtin_fmaf(widened(left.bytes[m], 2 * k + n % 2), widened(right.bytes[k], n), apart[n]));
      for (int n = 0; n < sum.row_bytes / 4; n++) {
        float old;
        memcpy(&old, sum.bytes[m] + 4 * n, 4);
        const float next = flushed(flushed(old) + flushed(apart[2 * n] + apart[2 * n + 1]));
        memcpy(sum.bytes[m] + 4 * n, &next, 4);
      }
    }
  }

  // TDPBSUD: signed bytes of the first operand times unsigned ones of the second, four a sum of 32 bits.
  void dot_bytes(int c, int a, int b) {
    operands(c, a, b, "TDPBSUD");
    Tile &sum = tiles_[c], &left = tiles_[a], &right = tiles_[b];
    for (int m = 0; m < sum.rows; m++)
      for (int n = 0; n < sum.row_bytes / 4; n++) {
        uint32_t total;  // wraps around, as the instruction does
        memcpy(&total, sum.bytes[m] + 4 * n, 4);
        for (int k = 0; k < right.rows; k++)
          for (int i = 0; i < 4; i++)
            total += static_cast<uint32_t>(static_cast<int8_t>(left.bytes[m][4 * k + i]) * right.bytes[k][4 * n + i]);
        memcpy(sum.bytes[m] + 4 * n, &total, 4);
      }
  }

 private:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

  struct Tile {
    int rows = 0, row_bytes = 0;
    bool holds = false;  // something was loaded since the configuration
    alignas(64) uint8_t bytes[kRows][kRowBytes] = {};
  };

  static void check(bool fine, const char* otherwise) {
    if (fine) return;
    fprintf(stderr, "emulated tiles: %s\n", otherwise);
    abort();
  }

  void operands(int c, int a, int b, const char* instruction) const {
    usable(c, instruction), usable(a, instruction), usable(b, instruction);
    const Tile &sum = tiles_[c], &left = tiles_[a], &right = tiles_[b];
    check(c != a && c != b && a != b, "a dot product of the same tile twice");
    check(sum.row_bytes % 4 == 0 && left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0, "a dot product of half an element");
    check(sum.rows == left.rows && sum.row_bytes == right.row_bytes && left.row_bytes / 4 == right.rows,
          "a dot product whose shapes do not fit");
    check(sum.holds && left.holds && right.holds, "a dot product of a tile that holds nothing");
  }

  void usable(int t, const char* instruction) const {
    if (configured_ && t >= 0 && t < kTiles && tiles_[t].rows != 0) return;
    fprintf(stderr, "emulated tiles: %s: tile %d is not configured\n", instruction, t);
    abort();
  }

  // Subnormal numbers count as zeros, as operands and as results.
  static float flushed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7F800000u) == 0) bits &= 0x80000000u;
    memcpy(&x, &bits, 4);
    return x;
  }

  static float widened(const uint8_t* row, int element) {
    uint16_t half;
    memcpy(&half, row + 2 * element, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
  }

  bool configured_ = false;
  Tile tiles_[kTiles];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;  // of this thread, like the registers
  return tiles;
}

}  // namespace
}  // namespace mxdit

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(from) emulated_tiles().load_config(from)
#define _tile_release() emulated_tiles().release()
#define _tile_zero(t) emulated_tiles().zero(t)
#define _tile_loadd(t, from, stride) emulated_tiles().load(t, from, stride)
#define _tile_stream_loadd(t, from, stride) emulated_tiles().load(t, from, stride)
#define _tile_stored(t, to, stride) emulated_tiles().store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated_tiles().dot_bf16(c, a, b)
#define _tile_dpbsud(c, a, b) emulated_tiles().dot_bytes(c, a, b)
