// Executes the tile instructions of AMX-TILE, AMX-BF16 and AMX-INT8 for a CPU that lacks them: it raises SIGILL at each, and
// the handler does what Intel's Software Developer's Manual says. So amx.cpp runs as it was compiled. What a CPU answers with
// a fault ends the program, and so does what would go unnoticed on one: tiles that hold nothing yet, and memory that a tile
// may not reach.
#ifdef MXDIT_EMULATE_TILES
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "support.h"

namespace conformance {
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

thread_local EmulatedTiles tiles;  // of this thread, like the registers

// One instruction with a VEX prefix of three bytes in opcode map 0F38, as all of AMX's are.
class Instruction {
 public:
  enum Prefix { kNone, k66, kF3, kF2 };

  Instruction(const uint8_t* code, const greg_t* registers) : registers_(registers) {
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || code[2] & 0x84) return;  // of another map, W or L set
    wide_reg_ = code[1] & 0x80 ? 0 : 8, wide_index_ = code[1] & 0x40 ? 0 : 8, wide_rm_ = code[1] & 0x20 ? 0 : 8;
    third = ~code[2] >> 3 & 15, prefix = static_cast<Prefix>(code[2] & 3), opcode = code[3];
    reg = (code[4] >> 3 & 7) | wide_reg_, rm = (code[4] & 7) | wide_rm_;
    end = code + 5;
    in_memory = code[4] < 0xC0;
    if (in_memory) address_of(code[4] >> 6, code[4] & 7);
  }

  int opcode = -1;  // of none that is known here
  Prefix prefix = kNone;
  int reg = 0, rm = 0, third = 0;  // registers, where there are so many
  bool in_memory = false;
  uint8_t* memory = nullptr;
  int64_t stride = 0;  // the index register, scaled
  const uint8_t* end = nullptr;

 private:
  void address_of(int mode, int base) {
    int64_t address = 0;
    if (base == 4) {
      const int sib = *end++, index = (sib >> 3 & 7) | wide_index_;
      base = sib & 7;
      if (index != 4) stride = value(index) << (sib >> 6);
      address = base == 5 && mode == 0 ? displacement() : value(base | wide_rm_);
    } else if (base == 5 && mode == 0) {
      address = displacement();
      address += reinterpret_cast<int64_t>(end);
    } else {
      address = value(base | wide_rm_);
    }
    if (mode == 1) address += static_cast<int8_t>(*end++);
    if (mode == 2) address += displacement();
    memory = reinterpret_cast<uint8_t*>(address);
  }

  int32_t displacement() {
    int32_t bytes;
    memcpy(&bytes, end, 4);
    end += 4;
    return bytes;
  }

  int64_t value(int number) const {
    static constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[order[number]];
  }

  const greg_t* registers_;
  int wide_reg_ = 0, wide_index_ = 0, wide_rm_ = 0;
};

// False for an instruction that is not AMX's.
bool execute(const Instruction& it) {
  const bool load = it.prefix == Instruction::kF2 || it.prefix == Instruction::k66;
  if (it.opcode == 0x49 && it.in_memory && it.prefix == Instruction::kNone)
    tiles.load_config(it.memory);
  else if (it.opcode == 0x49 && !it.in_memory && it.prefix == Instruction::kNone)
    tiles.release();
  else if (it.opcode == 0x49 && !it.in_memory && it.prefix == Instruction::kF2)
    tiles.zero(it.reg);
  else if (it.opcode == 0x4B && it.in_memory && load)
    tiles.load(it.reg, it.memory, it.stride);
  else if (it.opcode == 0x4B && it.in_memory && it.prefix == Instruction::kF3)
    tiles.store(it.reg, it.memory, it.stride);
  else if (it.opcode == 0x5C && !it.in_memory && it.prefix == Instruction::kF3)
    tiles.dot_bf16(it.reg, it.rm, it.third);
  else if (it.opcode == 0x5E && !it.in_memory && it.prefix == Instruction::kF3)
    tiles.dot_bytes(it.reg, it.rm, it.third);
  else
    return false;
  return true;
}

struct sigaction otherwise;

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction it(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (execute(it))
    registers[REG_RIP] = reinterpret_cast<greg_t>(it.end);
  else
    sigaction(SIGILL, &otherwise, nullptr);  // which gets the next, the same
}

}  // namespace

void emulate_tiles() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &otherwise);
}

}  // namespace conformance
#endif
