// AMX: Sapphire Rapids and newer. Tiles of bytes multiply four-bit numbers twice as fast as tiles of bf16, but need all blocks
// of a row's group within one window. So strips of rows are prepared as one or the other, group by group of K.
#include "int_avx512.h"
#include "tile_attention.h"
#include "tiles.h"

namespace mxdit {
namespace {

// Prepared activations of a four-bit product, each as [group of K][row]. A strip whose first window has no scale is in bf16;
// the others' bytes take the first part of the same place.
struct TileRows {
  Bf16Group* groups;
  IntWindow* windows;
  float* outer;

  static int64_t row_bytes(const MxLinear& job) {
    return static_cast<int64_t>(sizeof(Bf16Group) + sizeof(IntWindow)) + (job.w_outer ? 4 : 0);
  }

  TileRows(const MxLinear& job, int64_t held, const uint8_t* a) {
    groups = reinterpret_cast<Bf16Group*>(const_cast<uint8_t*>(a));
    windows = reinterpret_cast<IntWindow*>(groups + groups_of(job.k) * held);
    outer = reinterpret_cast<float*>(windows + groups_of(job.k) * held);
  }

  // Of the strip whose first row that is.
  Bf16Group* floats(int64_t at) const { return groups + at; }
  IntGroup* ints(int64_t at) const { return reinterpret_cast<IntGroup*>(groups + at); }
};
static_assert(sizeof(IntGroup) <= sizeof(Bf16Group));

// Of a row, in a strip's scratch: whole cache lines, so that its outer scales are aligned.
int64_t strip_row_bytes(const MxLinear& job) { return (packed_row_bytes(job) + 63) / 64 * 64; }

bool prepare_strip(const MxLinear& job, int64_t base, int64_t held, int64_t first, int count, const TileRows& out, uint8_t* scratch) {
  PackedRow rows[Tiles::kRows];
  for (int m = 0; m < count; m++)
    rows[m] = packed_row(job, base + first + m, encode_avx512, scratch + m * strip_row_bytes(job));
  for (int64_t g = 0; g < groups_of(job.k); g++) {
    const int length = group_length(job, g), blocks = static_cast<int>(blocks_of(length));
    const int64_t at = g * held + first;
    bool fits = true;
    for (int m = 0; m < count; m++) {
      if (!Vnni::prepare_group(rows[m].codes + g * kGroup / 2, length / 2, rows[m].scale + g * kGroupBlocks, blocks,
                               out.ints(at)[m], out.windows[at + m]))
        return false;
      fits &= out.windows[at + m].scale != 0.0f;
      if (job.w_outer) out.outer[at + m] = outer_of(rows[m], g);
    }
    if (fits) continue;
    for (int m = 0; m < count; m++) {
      out.windows[at + m].scale = 0.0f;
      if (!bf16_prepare_group(job, base + first + m, rows[m], g, out.floats(at)[m])) return false;
    }
  }
  return true;
}

bool prepare(const MxLinear& job, int64_t base, int64_t held, int64_t first, int64_t last, uint8_t* a, uint8_t* scratch) {
  const TileRows out(job, held, a);
  for (int64_t m = first; m < last; m += Tiles::kRows)
    if (!prepare_strip(job, base, held, m, static_cast<int>(min_of<int64_t>(Tiles::kRows, last - m)), out, scratch)) return false;
  return true;
}

// For panels_multiply.
class TileOperands {
 public:
  static constexpr int kRows = Tiles::kRows;

  struct alignas(64) Panel {
    uint8_t q[kGroup * kPanelColumns];
    float scale[kGroupBlocks * kPanelColumns];  // as IntWeights has it
    uint16_t w[kGroup * kPanelColumns];
    float outer[kPanelColumns];
    bool window;  // whether q is in windows
  };

  TileOperands(const MxLinear& job, int64_t held, const uint8_t* a) : rows_(job, held, a) {}

  // To bytes, to bf16, or to both, as the strips need it.
  bool unpack(const WeightPanel& weights, int64_t g, int blocks, int64_t first, int64_t rows, const NextPanel* next, Panel& panel) {
    bool ints = false, floats = false;
    for (int64_t m = first; m < first + rows; m += kRows) (in_bytes(m) ? ints : floats) = true;
    if (ints) {
      const auto prefetch = [&](int block) __attribute__((always_inline)) {
        if (next) next->prefetch(g * kGroupBlocks + block);
      };
      panel.window = Vnni::unpack_window(weights, g, blocks, panel.q, panel.scale, prefetch);
      if (!panel.window) {
        if (!Vnni::unpack_scales(weights, g, blocks, panel.scale)) return false;
        for (int b = 0; b < blocks; b++)
          Vnni::unpack_weights(weights, g * kGroupBlocks + b, panel.q + b * kBlock * kPanelColumns);
      }
    }
    return !floats || bf16_panel(weights, g, blocks, panel.w, ints ? nullptr : next);
  }

  template <bool kOuter>
  void multiply(int64_t at, int rows, int blocks, const Panel& panel, float* sums) {
    const float* outer = rows_.outer + at;
    if (!in_bytes(at))
      tiles_.group<kOuter>(rows_.floats(at), rows, blocks, panel.w, outer, panel.outer, sums);
    else if (panel.window)
      tiles_.group<kOuter>(rows_.ints(at), rows_.windows + at, rows, blocks, panel.q, panel.scale, outer, panel.outer, sums);
    else  // weights far apart, which is rare
      int_panel<Vnni, kOuter>(rows_.ints(at), rows_.windows + at, outer, rows, {panel.q, panel.scale, panel.outer, blocks}, false,
                              sums);
  }

 private:
  bool in_bytes(int64_t at) const { return rows_.windows[at].scale != 0.0f; }

  TileRows rows_;
  Tiles tiles_;
};

Product fast(const MxLinear& job) {
  // A few rows leave the tiles mostly empty: then vectors are quicker, of bytes above all.
  const bool few = job.m < (four_bit(job) ? 8 : 2);
  if (few || !bf16_activations(job)) return avx512bf16_path().fast(job);
  if (!four_bit(job)) return bf16_product<Tiles>(job);
  Product product = panels_product<Tiles, TileOperands>(job);
  product.a_row_bytes = TileRows::row_bytes(job);
  product.prepare_bytes = strip_row_bytes(job) * Tiles::kRows;
  product.prepare = prepare;
  product.strip = Tiles::kRows;
  return product;
}

Attention attention(const MxAttention& job) {
  return job.method == MX_EXACT ? tile_attention(job) : avx512bf16_path().attention(job);
}

}  // namespace

Path amx_path() {
  Path path = avx512bf16_path();
  path.name = "amx";
  path.fast = fast;
  path.attention = attention;
  return path;
}

}  // namespace mxdit
