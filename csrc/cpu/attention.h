// Attention in tiles: some keys at a time, for all queries of a task, with a softmax that is corrected when a later key's
// logit is the highest so far. Logits, weights and sums are fp32; a template over the unit that multiplies, `U`:
//   Number, kStep          what it multiplies, and how many neighbours in the summed axis lie side by side in a register
//   kLanes, kVectors       of its registers: columns of a panel are their product
//   kTileRows, kParts      rows of a tile, and whether it can be cut in three
//   kKeys                  keys at a time
//   kChain                 Numbers of a query or a row of weights that are summed at once: of a query, they lie side by side
//   products<R, C, stride> of R rows and C registers of columns, see tile_products
//   Session                lives as long as a task
//   kWhole                 what it needs the summed axis to be a multiple of
//   keep                   rounds some weights to Numbers, and adds them to their sum
//   keys, values           lay out a panel
// In an unnamed namespace on purpose, see kernels.h.
#pragma once
#include "exp2.h"
#include "numerics.h"

namespace mxdit {
namespace {

constexpr int kTaskQueries = 96;  // a multiple of every unit's rows
constexpr float kLowest = -0x1.FFFFFEp127f, kNever = -__builtin_inff(), kLog2e = 0x1.715476p0f;

// Where each thing is, in Numbers.
template <class U>
struct AttentionLayout {
  using Number = typename U::Number;
  static constexpr int kColumns = U::kLanes * U::kVectors;
  // Rows are padded, so that they do not fall on the same cache sets.
  static constexpr int kChainStride = U::kChain + 64 / static_cast<int>(sizeof(Number));
  static constexpr int kLogitStride = U::kKeys + 16, kWeightStride = kLogitStride * U::kStep;

  int64_t keys, width, v_width;  // padded

  explicit AttentionLayout(const MxAttention& job) {
    const auto padded = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
    keys = padded(job.keys, kColumns), width = padded(job.width, U::kWhole), v_width = padded(job.v_width, kColumns);
  }
  int64_t prepared_bytes() const { return (keys * (width + v_width) * static_cast<int64_t>(sizeof(Number)) + 64) / 64 * 64; }

  // (panel of keys, step of the width, key, kStep), then (panel of v's width, step of keys, column, kStep).
  template <class P>
  auto keys_at(P* prepared, int64_t key) const {
    return with_number(prepared) + key * width;
  }
  template <class P>
  auto values_at(P* prepared, int64_t column, int64_t key) const {
    return with_number(prepared) + keys * width + column * keys + key * kColumns;
  }

  static Number* with_number(uint8_t* p) { return reinterpret_cast<Number*>(p); }
  static const Number* with_number(const uint8_t* p) { return reinterpret_cast<const Number*>(p); }
};

// A row of the mask over some keys, as what it adds to logits of base 2.
inline void mask_row(const MxAttention& job, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t count, float* out) {
  const int64_t step = job.mask_strides[3];
  const int64_t at = batch * job.mask_strides[0] + head * job.mask_strides[1] + query * job.mask_strides[2] + key * step;
  const auto each = [&](auto* mask, auto value) {
    if (step == 1)
      for (int64_t i = 0; i < count; i++) out[i] = value(mask[i]);
    else
      for (int64_t i = 0; i < count; i++) out[i] = value(mask[i * step]);
  };
  if (job.mask_dtype == MX_BOOL_MASK)
    each(static_cast<const uint8_t*>(job.mask) + at, [](uint8_t x) { return x ? 0.0f : kNever; });
  else
    with_dtype(job.mask_dtype, [&]<class T>(const T*) {
      each(static_cast<const T*>(job.mask) + at, [](T x) { return widen(x) * kLog2e; });
    });
}

// The keys and values [first, last) of a head; `first` begins a panel.
template <class U>
void attention_keys(const MxAttention& job, int64_t batch, int64_t kv_head, int64_t first, int64_t last, uint8_t* prepared,
                    uint8_t*) {
  using Layout = AttentionLayout<U>;
  const Layout layout(job);
  const int64_t element = job.dtype == MX_FP32 ? 4 : 2;
  const auto from = [&](const void* x, const int64_t* strides, int64_t key) {
    return static_cast<const uint8_t*>(x) + (batch * strides[0] + key * strides[1] + kv_head * strides[2]) * element;
  };
  for (int64_t key = first; key < last; key += Layout::kColumns) {
    const int count = static_cast<int>(min_of<int64_t>(Layout::kColumns, last - key));
    const uint8_t *k[Layout::kColumns], *v[Layout::kColumns];  // behind the last key, that one again
    for (int i = 0; i < Layout::kColumns; i++) {
      k[i] = from(job.k, job.k_strides, key + min_of(i, count - 1));
      v[i] = from(job.v, job.v_strides, key + min_of(i, count - 1));
    }
    U::keys(k, job.dtype, job.width, layout.keys_at(prepared, key));
    for (int64_t column = 0; column < layout.v_width; column += Layout::kColumns) {
      const int columns = static_cast<int>(min_of<int64_t>(Layout::kColumns, job.v_width - column));
      U::values(v, count, job.dtype, column, columns, layout.values_at(prepared, column, key));
    }
  }
}

// Products of R rows and C registers of columns, or these and what is in `sums`, by U::multiply. A function of its own, so
// that compilers keep its registers apart from others'.
template <class U, int R, int C, int kStride>
[[gnu::noinline]] void tile_products(const typename U::Number* a, const typename U::Number* w, int64_t steps, bool add,
                                     float* sums, int64_t stride) {
  typename U::F products[R][C] = {};
  U::template multiply<R, C, kStride>(a, w, steps, products);
#pragma GCC unroll 16
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      float* at = sums + m * stride + c * U::kLanes;
      U::store(at, add ? products[m][c] + U::load(at) : products[m][c]);
    }
}

// Logits of R queries and some keys, not scaled; behind the last key, of half a panel or a whole one.
template <class U, int R>
void tile_logits(const typename U::Number* q, const AttentionLayout<U>& layout, const typename U::Number* k, int64_t keys,
                 float* logits) {
  using Layout = AttentionLayout<U>;
  for (int64_t key = 0; key < keys; key += Layout::kColumns) {
    const auto products = keys - key > Layout::kColumns / 2 ? U::template products<R, U::kVectors, Layout::kChainStride>
                                                            : U::template products<R, U::kVectors / 2, Layout::kChainStride>;
    for (int64_t d = 0; d < layout.width; d += U::kChain) {
      const int64_t numbers = min_of<int64_t>(U::kChain, layout.width - d);
      products(q + d / U::kChain * kTaskQueries * Layout::kChainStride, k, numbers / U::kStep, d > 0, logits + key,
               Layout::kLogitStride);
      k += numbers * Layout::kColumns;
    }
  }
}

// sums = correction sums + weights v, for R queries and C registers of columns.
template <class U, int R, int C>
void tile_values(const typename U::Number* weights, const typename U::Number* v, int64_t keys, const float* correction,
                 int64_t stride, float* sums) {
  using Layout = AttentionLayout<U>;
  constexpr int columns = C * U::kLanes;
  alignas(64) float some[R * columns];  // what is summed at once is not much, or small numbers would be lost beside the sum
  for (int64_t key = 0; key < keys; key += U::kChain) {
    const int64_t steps = min_of<int64_t>(U::kChain, keys - key) / U::kStep;
    U::template products<R, C, Layout::kWeightStride>(weights + key, v + key * Layout::kColumns, steps, key > 0, some, columns);
  }
  for (int m = 0; m < R; m++)
    for (int c = 0; c < columns; c += U::kLanes) {
      float* at = sums + m * stride + c;
      U::store(at, U::multiply_add(U::all(correction[m]), U::load(at), U::load(some + m * columns + c)));
    }
}

// What is known of a query while its keys go by.
struct Softmax {
  float highest = kLowest, total = 0.0f, correction = 0.0f;  // logit; sum of weights; of what was summed before
};

// Logits to weights 2^(scale (logit - highest)), in their place. With `bias`, logits become scale logit + bias first.
template <class U>
void softmax_row(float* row, int64_t keys, float scale, const float* bias, Softmax& state) {
  using F = typename U::F;
  constexpr int64_t step = U::kLanes;
  F highest[2] = {U::all(kLowest), U::all(kLowest)};
  for (int64_t i = 0; i < keys; i += 2 * step)
    for (int j = 0; j < 2; j++) {
      F logit = U::load(row + i + j * step);
      if (bias) {
        logit = U::multiply_add(logit, U::all(scale), U::load(bias + i + j * step));
        U::store(row + i + j * step, logit);
      }
      highest[j] = larger(logit, highest[j]);
    }
  if (bias) scale = 1.0f;
  float lanes[U::kLanes];
  U::store(lanes, larger(highest[0], highest[1]));
  const float before = state.highest;
  for (int i = 0; i < U::kLanes; i++) state.highest = lanes[i] > state.highest ? lanes[i] : state.highest;
  const F top = U::all(state.highest), factor = U::all(scale);
  F total = U::all(0.0f);
  auto* out = reinterpret_cast<typename U::Number*>(row);
  for (int64_t i = 0; i < keys; i += U::kStep * step, out += U::kStep * step) {
    F weights[U::kStep];
    for (int j = 0; j < U::kStep; j++)
      weights[j] = exp2_of<U>((U::load(row + i + j * step) - top) * factor);
    U::keep(weights, total, out);
  }
  U::store(lanes, total);
  for (int count = U::kLanes / 2; count > 0; count /= 2)
    for (int i = 0; i < count; i++) lanes[i] += lanes[i + count];
  state.correction = exp2_of<U>(U::all((before - state.highest) * scale))[0];
  state.total = state.total * state.correction + lanes[0];
}

// A task: some queries of a head, all of its keys.
template <class U>
class AttentionTask {
  using Layout = AttentionLayout<U>;
  using Number = typename U::Number;

 public:
  static int64_t scratch_bytes(const MxAttention& job) {
    const Layout layout(job);
    return chains(layout) * kTaskQueries * Layout::kChainStride * static_cast<int64_t>(sizeof(Number)) +
           (kTaskQueries * layout.v_width + (U::kTileRows + 1) * Layout::kLogitStride) * 4;
  }

  AttentionTask(const MxAttention& job, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared,
                uint8_t* scratch)
      : job_(job), layout_(job), batch_(batch), head_(head), first_(first), count_(static_cast<int>(last - first)),
        prepared_(prepared) {
    q_ = reinterpret_cast<Number*>(scratch);
    sums_ = reinterpret_cast<float*>(q_ + chains(layout_) * kTaskQueries * Layout::kChainStride);
    logits_ = sums_ + kTaskQueries * layout_.v_width;
    bias_ = logits_ + U::kTileRows * Layout::kLogitStride;
    rows_ = (count_ + U::kTileRows - 1) / U::kTileRows * U::kTileRows;
    scale_ = job.scale * kLog2e;
    masked_ = job.mask_dtype != MX_NO_MASK;
    shared_ = masked_ && job.mask_strides[2] == 0;
    biased_ = masked_ || !(scale_ > 0.0f);  // logits are compared as they are only where the scale keeps their order
  }

  void run() {
    load_queries();
    memset(sums_, 0, static_cast<size_t>(rows_ * layout_.v_width) * 4);
    const int64_t keys = job_.causal ? min_of(job_.keys, first_ + count_) : job_.keys;
    for (int64_t key = 0; key < keys; key += U::kKeys) {
      int64_t here = min_of<int64_t>(U::kKeys, keys - key);
      if (shared_) mask_row(job_, batch_, head_, 0, key, here, bias_);
      while (shared_ && here > 0 && bias_[here - 1] == kNever) here--;  // padding
      if (here == 0) continue;
      for (int row = 0; row < count_; row += U::kTileRows) {
        const int rows = min_of(U::kTileRows, count_ - row);
        if (rows <= U::kTileRows / U::kParts)
          tile<U::kTileRows / U::kParts>(row, rows, key, here);
        else if (rows <= U::kTileRows / U::kParts * 2)
          tile<U::kTileRows / U::kParts * (U::kParts > 1 ? 2 : 1)>(row, rows, key, here);
        else
          tile<U::kTileRows>(row, rows, key, here);
      }
    }
    store();
  }

 private:
  static int64_t chains(const Layout& layout) { return (layout.width + U::kChain - 1) / U::kChain; }

  void load_queries() {
    const int64_t element = job_.dtype == MX_FP32 ? 4 : 2;
    for (int64_t d = 0; d < layout_.width; d += U::kChain) {
      Number* to = q_ + d / U::kChain * kTaskQueries * Layout::kChainStride;
      const int64_t numbers = min_of<int64_t>(U::kChain, job_.width - d), padded = min_of<int64_t>(U::kChain, layout_.width - d);
      for (int i = 0; i < rows_; i++, to += Layout::kChainStride) {
        memset(to + (i < count_ ? numbers : 0), 0, sizeof(Number) * static_cast<size_t>(padded - (i < count_ ? numbers : 0)));
        if (i >= count_) continue;
        const int64_t at = batch_ * job_.q_strides[0] + (first_ + i) * job_.q_strides[1] + head_ * job_.q_strides[2] + d;
        U::numbers(static_cast<const uint8_t*>(job_.q) + at * element, job_.dtype, numbers, to);
      }
    }
  }

  // `rows` queries, in a tile of R, and the keys [key, key + here).
  template <int R>
  void tile(int row, int rows, int64_t key, int64_t here) {
    const int64_t first = first_ + row;
    if (job_.causal && (here = min_of(here, first + rows - key)) <= 0) return;
    const int64_t padded = (here + Layout::kColumns - 1) / Layout::kColumns * Layout::kColumns;
    tile_logits<U, R>(q_ + row * Layout::kChainStride, layout_, layout_.keys_at(prepared_, key), here, logits_);
    float correction[R] = {};
    for (int m = 0; m < R; m++) {
      float* logits = logits_ + m * Layout::kLogitStride;
      if (m >= rows) {  // no query
        memset(logits, 0, static_cast<size_t>(padded) * 4);
        continue;
      }
      int64_t seen = job_.causal ? min_of(here, first + m + 1 - key) : here;
      if (seen < 0) seen = 0;
      if (biased_) {
        if (!masked_) memset(bias_, 0, static_cast<size_t>(seen) * 4);
        if (masked_ && !shared_) mask_row(job_, batch_, head_, first + m, key, here, bias_);
        memset(logits + seen, 0, static_cast<size_t>(padded - seen) * 4);
      }
      for (int64_t i = seen; i < padded; i++) (biased_ ? bias_ : logits)[i] = kNever;
      softmax_row<U>(logits, padded, scale_, biased_ ? bias_ : nullptr, state_[row + m]);
      correction[m] = state_[row + m].correction;
    }
    const Number* weights = reinterpret_cast<const Number*>(logits_);
    const int64_t whole = (here + U::kWhole - 1) / U::kWhole * U::kWhole;
    for (int64_t column = 0; column < job_.v_width; column += Layout::kColumns) {
      const Number* v = layout_.values_at(prepared_, column, key);
      float* sums = sums_ + row * layout_.v_width + column;
      if (job_.v_width - column <= Layout::kColumns / 2)
        tile_values<U, R, U::kVectors / 2>(weights, v, whole, correction, layout_.v_width, sums);
      else
        tile_values<U, R, U::kVectors>(weights, v, whole, correction, layout_.v_width, sums);
    }
  }

  void store() {
    with_dtype(job_.dtype, [&]<class T>(const T*) {
      for (int i = 0; i < count_; i++) {
        const float *sums = sums_ + i * layout_.v_width, total = state_[i].total;
        T* out = static_cast<T*>(job_.out) + ((batch_ * job_.queries + first_ + i) * job_.heads + head_) * job_.v_width;
        if (total == 0.0f)
          for (int64_t d = 0; d < job_.v_width; d++) narrow(0.0f, out + d);
        else
          for (int64_t d = 0; d < job_.v_width; d++) narrow(sums[d] / total, out + d);
      }
    });
  }

  const MxAttention& job_;
  const Layout layout_;
  const int64_t batch_, head_, first_;
  const int count_;
  const uint8_t* const prepared_;
  Number* q_;
  int rows_;  // of whole tiles
  float *sums_, *logits_, *bias_, scale_;
  bool masked_, shared_, biased_;
  Softmax state_[kTaskQueries];
};

template <class U>
void attention_queries(const MxAttention& job, int64_t batch, int64_t head, int64_t first, int64_t last, const uint8_t* prepared,
                       uint8_t* scratch) {
  [[maybe_unused]] const typename U::Session session;
  AttentionTask<U>(job, batch, head, first, last, prepared, scratch).run();
}

template <class U>
Attention tiled_attention(const MxAttention& job) {
  const AttentionLayout<U> layout(job);
  return {layout.prepared_bytes(), 256, kTaskQueries, AttentionTask<U>::scratch_bytes(job), attention_keys<U>,
          attention_queries<U>};
}

}  // namespace
}  // namespace mxdit
