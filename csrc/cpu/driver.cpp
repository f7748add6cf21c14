// The entry points: choose a path, cut a job into pieces, give the pieces to threads.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace mxdit {
namespace {

constexpr int64_t kThreadProducts = 1 << 20;  // that are worth waking a thread for
constexpr int64_t kThreadNumbers = 1 << 15;   // to encode or decode, likewise
// When threads do not share the activations, see multiply_rows_apart:
constexpr int64_t kApartColumns = 1024;       // of the weights, at most
constexpr int64_t kApartRows = 32;            // of the activations for each thread, at least
constexpr int64_t kApartBytes = 1 << 20;      // that they take when prepared, at most: of second level cache
constexpr int64_t kAttentionBytes = 8 << 20;  // of keys and values that are laid out at once

const std::vector<Path>& paths() {
  static const std::vector<Path> usable = [] {
    std::vector<Path> found;
#ifdef MXDIT_HAS_AMX
    if (cpu_runs_amx()) found.push_back(amx_path());
#endif
#ifdef MXDIT_HAS_AVX512BF16
    if (cpu_runs_avx512bf16()) found.push_back(avx512bf16_path());
#endif
#ifdef MXDIT_HAS_AVX512VNNI
    if (cpu_runs_avx512vnni()) found.push_back(avx512vnni_path());
#endif
#ifdef MXDIT_HAS_AVX2
    if (cpu_runs_avx2()) found.push_back(avx2_path());
#endif
#ifdef MXDIT_HAS_NEON
    if (cpu_runs_neon()) found.push_back(neon_path());
#endif
    found.push_back(scalar_path());
    return found;
  }();
  return usable;
}

std::atomic<const Path*> selected{nullptr};

const Path& path() {
  const Path* chosen = selected;
  return chosen ? *chosen : paths().front();
}

// Memory that a thread keeps for its next call: touching fresh pages would cost as much as a small product.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(bytes_); }

  // NULL where there is not enough.
  uint8_t* get(int64_t size) {
    if (size > size_) {
      free(bytes_);
      bytes_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>((size + 63) / 64 * 64)));
      size_ = bytes_ ? size : 0;
    }
    return bytes_;
  }

 private:
  uint8_t* bytes_ = nullptr;
  int64_t size_ = 0;
};

thread_local Buffer prepared, scratch;  // activations, where the thread called or has rows of its own; and what it works with

int useful_threads(int threads, int64_t work, int64_t worth) {
  return static_cast<int>(std::clamp<int64_t>(work / worth, 1, std::max(threads, 1)));
}

// Calls body(first, last) for ranges that cover [0, count), on several threads.
template <class F>
void over_ranges(int threads, int64_t count, F body) {
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, count / (threads * 4)));
  std::atomic<int64_t> next{0};
  parallel(threads, [&] {
    for (int64_t first = next.fetch_add(step); first < count; first = next.fetch_add(step))
      body(first, std::min(first + step, count));
  });
}

enum class Outcome { done, declined, no_memory };

// Threads prepare the activations together, then take a range of columns each.
Outcome multiply(const MxLinear& job, const Product& product, int threads) {
  const int64_t groups = (job.k + kGroup - 1) / kGroup;
  int64_t held = std::clamp<int64_t>(product.held_bytes / (groups * product.a_row_bytes), std::min<int64_t>(job.m, 64), job.m);
  if (held > product.rows) held -= held % product.rows;  // whole tasks
  uint8_t* const a = prepared.get(groups * held * product.a_row_bytes);
  const int64_t scratch_bytes = std::max(product.prepare_bytes, product.multiply_bytes);
  if (!a || !scratch.get(scratch_bytes)) return Outcome::no_memory;
  std::atomic<bool> declined{false};
  const int64_t column_tasks = (job.n + product.columns - 1) / product.columns;
  for (int64_t base = 0; base < job.m && !declined; base += held) {
    const int64_t rows = std::min(held, job.m - base);
    std::atomic<int64_t> next{0};
    const int64_t step = (std::clamp<int64_t>(rows / (threads * 4), 1, 64) + product.strip - 1) / product.strip * product.strip;
    parallel(threads, [&] {
      uint8_t* const own = scratch.get(scratch_bytes);
      if (!own) return;  // what this one leaves, the others do: the calling thread has its scratch
      for (int64_t m = next.fetch_add(step); m < rows && !declined; m = next.fetch_add(step))
        if (!product.prepare(job, base, rows, m, std::min(m + step, rows), a, own)) declined = true;
    });
    const int64_t row_tasks = (rows + product.rows - 1) / product.rows, tasks = row_tasks * column_tasks;
    const int64_t run = std::clamp<int64_t>(tasks / (threads * 8), 1, 16);  // neighbours, so that one prefetches for the next
    next = 0;
    parallel(threads, [&] {
      uint8_t* const own = scratch.get(scratch_bytes);
      if (!own) return;  // what this one leaves, the others do: the calling thread has its scratch
      for (int64_t first = next.fetch_add(run); first < tasks; first = next.fetch_add(run))
        for (int64_t task = first; task < std::min(first + run, tasks) && !declined; task++) {
          const int64_t n = task / row_tasks * product.columns, m = task % row_tasks * product.rows;
          if (!product.multiply(job, base, rows, a, m, std::min(m + product.rows, rows), n,
                                std::min(n + product.columns, job.n), own))
            declined = true;
        }
    });
  }
  return declined ? Outcome::declined : Outcome::done;
}

// Each thread prepares and multiplies rows of its own. That unpacks the weights once a thread; but prepared activations stay
// in their core's cache, where fetching another core's takes as long as multiplying them with some hundred columns.
Outcome multiply_rows_apart(const MxLinear& job, const Product& product, int threads) {
  const auto bytes = [](int dtype) { return dtype == MX_FP32 ? 4 : 2; };
  std::atomic<int> next{0};
  std::atomic<Outcome> outcome{Outcome::done};
  parallel(threads, [&] {
    for (int part = next.fetch_add(1); part < threads && outcome == Outcome::done; part = next.fetch_add(1)) {
      const int64_t first = job.m * part / threads;
      MxLinear own = job;
      own.m = job.m * (part + 1) / threads - first;
      own.x = static_cast<const uint8_t*>(job.x) + first * job.x_stride * bytes(job.x_dtype);
      own.out = static_cast<uint8_t*>(job.out) + first * job.n * bytes(job.out_dtype);
      const Outcome of_part = multiply(own, product, 1);
      if (of_part != Outcome::done) outcome = of_part;
    }
  });
  return outcome;
}

Outcome multiply_by(Product (*way)(const MxLinear&), const MxLinear& job, int threads) {
  const Product product = way(job);
  const int64_t rows = job.m / threads, groups = (job.k + kGroup - 1) / kGroup;
  const bool apart = threads > 1 && job.x && job.n <= kApartColumns && rows >= kApartRows &&
                     rows * groups * product.a_row_bytes <= kApartBytes;
  return apart ? multiply_rows_apart(job, product, threads) : multiply(job, product, threads);
}

// As many heads' keys and values are laid out at once as the caches are good for, or as give each thread a task; then their
// queries go by, a head's one after the other, so that threads read the same keys.
Outcome attend(const MxAttention& job, const Attention& way, int threads) {
  const int64_t sources = job.batch * job.kv_heads, group = job.heads / job.kv_heads;
  const int64_t key_tasks = (job.keys + way.keys - 1) / way.keys, query_tasks = (job.queries + way.queries - 1) / way.queries;
  const int64_t least = std::min((threads - 1) / (group * query_tasks) + 1, sources);
  const int64_t held = std::clamp(kAttentionBytes / way.prepared_bytes, least, sources);
  uint8_t* const kept = prepared.get(held * way.prepared_bytes);
  if (!kept || !scratch.get(way.scratch_bytes)) return Outcome::no_memory;
  for (int64_t base = 0; base < sources; base += held) {
    const int64_t here = std::min(held, sources - base);
    std::atomic<int64_t> next{0};
    for (const auto prepare : {way.survey, way.prepare}) {
      if (!prepare) continue;
      next = 0;
      parallel(threads, [&] {
        uint8_t* const own = scratch.get(way.scratch_bytes);
        if (!own) return;  // what this one leaves, the others do: the calling thread has its scratch
        for (int64_t task = next++; task < here * key_tasks; task = next++) {
          const int64_t source = base + task / key_tasks, first = task % key_tasks * way.keys;
          prepare(job, source / job.kv_heads, source % job.kv_heads, first, std::min(first + way.keys, job.keys),
                  kept + task / key_tasks * way.prepared_bytes, own);
        }
      });
    }
    next = 0;
    parallel(threads, [&] {
      uint8_t* const own = scratch.get(way.scratch_bytes);
      if (!own) return;
      for (int64_t task = next++; task < here * group * query_tasks; task = next++) {
        const int64_t source = base + task / query_tasks / group, first = task % query_tasks * way.queries;
        const int64_t head = source % job.kv_heads * group + task / query_tasks % group;
        way.attend(job, source / job.kv_heads, head, first, std::min(first + way.queries, job.queries),
                   kept + task / query_tasks / group * way.prepared_bytes, own);
      }
    });
  }
  return Outcome::done;
}

}  // namespace
}  // namespace mxdit

using namespace mxdit;

const char* mx_paths(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Path& each : paths()) joined.append(joined.empty() ? "" : " ").append(each.name);
    return joined;
  }();
  return names.c_str();
}

int mx_select(const char* name) {
  if (!name) {
    selected = nullptr;
    return 0;
  }
  for (const Path& each : paths())
    if (strcmp(each.name, name) == 0) {
      selected = &each;
      return 0;
    }
  return -1;
}

const char* mx_selected(void) { return path().name; }

void mx_encode(const MxEncode* job, int threads) {
  const auto encode = path().encode;
  over_ranges(useful_threads(threads, job->rows * job->k, kThreadNumbers), job->rows,
              [&](int64_t first, int64_t last) { encode(*job, first, last); });
}

void mx_decode(const MxDecode* job, int threads) {
  const auto decode = path().decode;
  over_ranges(useful_threads(threads, job->rows * job->k, kThreadNumbers), job->rows,
              [&](int64_t first, int64_t last) { decode(*job, first, last); });
}

int mx_linear(const MxLinear* job, int threads) {
  if (job->m == 0 || job->n == 0) return 0;
  const int workers = useful_threads(threads, job->m * job->n * job->k, kThreadProducts);
  Outcome outcome = multiply_by(path().fast, *job, workers);
  if (outcome == Outcome::declined) outcome = multiply_by(path().general, *job, workers);
  return outcome == Outcome::done ? 0 : -1;
}

int mx_attention(const MxAttention* job, int threads) {
  if (job->batch == 0 || job->queries == 0 || job->heads == 0) return 0;
  const int64_t products = job->batch * job->queries * job->heads * job->keys * (job->width + job->v_width);
  return attend(*job, path().attention(*job), useful_threads(threads, products, kThreadProducts)) == Outcome::done ? 0 : -1;
}

void mx_rms_norm(const MxRmsNorm* job, int threads) {
  const auto norm = path().rowwise.rms_norm;
  over_ranges(useful_threads(threads, job->rows * job->width, kThreadNumbers), job->rows,
              [&](int64_t first, int64_t last) { norm(*job, first, last); });
}

void mx_gelu(const MxGelu* job, int threads) {
  constexpr int64_t numbers = 1 << 12;  // of one task
  const auto gelu = path().rowwise.gelu;
  over_ranges(useful_threads(threads, job->count, kThreadNumbers), (job->count + numbers - 1) / numbers,
              [&](int64_t first, int64_t last) { gelu(*job, first * numbers, std::min(last * numbers, job->count)); });
}
