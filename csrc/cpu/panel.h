// A panel: some neighbouring columns of the result, that is rows of the weights in their canonical layout, and plain C++
// to bring them into the order in which products read them. In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "product.h"

namespace mxdit {
namespace {

struct WeightPanel {
  int format;
  int64_t row_codes;
  const uint8_t* codes[kMostColumns];  // behind the last column, the last one again
  const uint8_t* scale[kMostColumns];

  WeightPanel(const MxLinear& job, int64_t n0, int columns) : format(job.w_format) {
    row_codes = code_bytes(format, job.k);
    for (int n = 0; n < columns; n++) {
      const int64_t row = min_of(n0 + n, job.n - 1);
      codes[n] = job.w_codes + row * row_codes;
      scale[n] = job.w_scale + row * blocks_of(job.k);
    }
  }

  // Bytes of codes that a block of 32 elements has; fewer at the end of a row.
  int block_codes(int64_t block) const {
    return static_cast<int>(min_of(code_bytes(format, kBlock), row_codes - code_bytes(format, block * kBlock)));
  }
};

// Asks for the weights of the panel behind this one, some at every block of this one. For a few rows of activations their
// way from memory is all that counts. Rows follow one another there, so it is one stream, as hardware likes it, where a
// panel read block by block would be one a row.
class NextPanel {
 public:
  NextPanel(const MxLinear& job, int64_t n0, int columns) {
    const int64_t rows = min_of<int64_t>(columns, job.n - n0);
    if (rows <= 0) return;
    codes_ = job.w_codes + n0 * code_bytes(job.w_format, job.k), scale_ = job.w_scale + n0 * blocks_of(job.k);
    codes_step_ = rows * code_bytes(job.w_format, kBlock), scale_step_ = rows;
    codes_end_ = codes_ + rows * code_bytes(job.w_format, job.k);
  }

  // The block-th part of as many as a row has blocks. To the second level of cache: the first has no room for it, and
  // fewer lines under way. (Not inlined at once, it is a function without effects to GCC, which then leaves out the call.)
  [[gnu::always_inline]] void prefetch(int64_t block) const {
    for (const uint8_t* at = codes_ + block * codes_step_; at < min_of(codes_ + (block + 1) * codes_step_, codes_end_); at += 64)
      __builtin_prefetch(at, 0, 2);
    if (scale_) __builtin_prefetch(scale_ + block * scale_step_, 0, 2);
  }

 private:
  const uint8_t *codes_ = nullptr, *scale_ = nullptr, *codes_end_ = nullptr;
  int64_t codes_step_ = 0, scale_step_ = 0;
};

// fp32 values of a block with their scales, (32, columns); zeros behind the end of a row.
inline void plain_floats(const WeightPanel& panel, int64_t block, int columns, float* out) {
  const int bytes = panel.block_codes(block), n_values = panel.format == MX_FP4 ? bytes * 2 : bytes;
  for (int n = 0; n < columns; n++) {
    float v[kBlock] = {};
    decode_block(panel.codes[n] + code_bytes(panel.format, block * kBlock), n_values, panel.format, panel.scale[n][block], v);
    for (int i = 0; i < kBlock; i++) out[i * columns + n] = v[i];
  }
}

}  // namespace
}  // namespace mxdit
