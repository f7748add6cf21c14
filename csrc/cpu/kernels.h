// What an instruction set path offers to the driver: one table of functions, each working on a range of a job, alone on its
// thread. A path's file is compiled with that path's flags, so nothing in it may be an inline function or a template
// that another file could also emit: the linker keeps one copy, and an old CPU would run the new CPU's. Hence every
// header that such a file includes keeps its contents in an unnamed namespace, and the standard library's templates stay out.
#pragma once
#include "mxdit_cpu.h"

namespace mxdit {

constexpr int kBlock = 32;       // elements under one E8M0 scale
constexpr int kGroup = 512;      // elements under one outer scale, and one step of every product along K
constexpr int kGroupBlocks = kGroup / kBlock;

// One way to multiply. The driver lets `prepare` fill `a` with some rows of the activations, then cuts the columns into
// tasks of `columns` (and the rows into tasks of `rows`) and hands each to `multiply`.
struct Product {
  int64_t held_bytes;     // of prepared activations that the caches are good for, while every column goes by
  int64_t a_row_bytes;    // of these, each row and group of K
  int64_t columns, rows;  // of one task
  int64_t prepare_bytes, multiply_bytes;  // of scratch that a call needs
  // Rows [first, last) of the activations into `a`, whose row 0 is row `base` of the job and which holds `held` rows, as
  // [group of K][row]. False when the values are outside what this way can multiply: then `general` has to.
  bool (*prepare)(const MxLinear&, int64_t base, int64_t held, int64_t first, int64_t last, uint8_t* a, uint8_t* scratch);
  bool (*multiply)(const MxLinear&, int64_t base, int64_t held, const uint8_t* a, int64_t m0, int64_t m1, int64_t n0,
                   int64_t n1, uint8_t* scratch);
  int64_t strip = 1;  // of rows that `prepare` has to get at once: `first` is a multiple, and so is `last`, or the end
};

// One way to attend. The driver lets `prepare` lay out the keys and values of a few heads, a range of keys a call, and then
// hands ranges of queries to `attend`.
struct Attention {
  int64_t prepared_bytes;  // of one head's keys and values
  int64_t keys, queries;   // of one task: `first` is a multiple of it
  int64_t scratch_bytes;   // that a call needs
  void (*prepare)(const MxAttention&, int64_t batch, int64_t kv_head, int64_t first, int64_t last, uint8_t* prepared,
                  uint8_t* scratch);
  void (*attend)(const MxAttention&, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared,
                 uint8_t* scratch);
  decltype(prepare) survey = nullptr;  // what `prepare` has to know of all keys, if anything: called before, likewise
};

// What lies between linears and attention, see rowwise.h.
struct Rowwise {
  void (*rms_norm)(const MxRmsNorm&, int64_t first, int64_t last);  // rows [first, last)
  void (*gelu)(const MxGelu&, int64_t first, int64_t last);         // numbers, likewise
};

struct Path {
  const char* name;
  void (*encode)(const MxEncode&, int64_t first, int64_t last);  // rows [first, last)
  void (*decode)(const MxDecode&, int64_t first, int64_t last);
  Product (*fast)(const MxLinear&);     // the quickest way for this job, which may decline extreme values
  Product (*general)(const MxLinear&);  // IEEE fp32 throughout: takes everything
  Attention (*attention)(const MxAttention&);
  Rowwise rowwise;
};

// Each is defined in the file of its name, and to be called where cpu.h says that this CPU runs it.
Path scalar_path();
Path avx2_path();
Path avx512vnni_path();
Path avx512bf16_path();
Path amx_path();
Path neon_path();

}  // namespace mxdit
