// Random attention: shapes, strides, masks and dtypes, on every path and number of threads. Method exact against float64, INT8
// against path scalar, bit for bit.
#include <math.h>
#include <stdio.h>

#include "random.h"

namespace conformance {
namespace {

using namespace mxdit;

constexpr double kInfinite = HUGE_VAL;

struct Axes {
  int64_t batch, tokens, heads, width;
};

// Garbage with room for these axes, heads or tokens first, and the strides of batch, token and head.
Memory with_room(Random& random, const Axes& axes, int dtype, int64_t strides[3]) {
  const int64_t row = axes.width + (random.one_in(2) ? random.between(0, 9) : 0);
  const bool heads_first = random.one_in(2);
  strides[1] = heads_first ? row : row * axes.heads;
  strides[2] = heads_first ? row * axes.tokens : row;
  strides[0] = row * axes.tokens * axes.heads;
  const int64_t rows = axes.batch * axes.tokens * axes.heads;
  Memory memory(static_cast<size_t>(rows ? (rows - 1) * row + axes.width : 0) * element_size(dtype));
  fill_random(random, memory);
  return memory;
}

void fill(Random& random, const Axes& axes, int dtype, const int64_t strides[3], float size, Memory& memory) {
  with_dtype(dtype, [&]<class T>(const T*) {
    for (int64_t b = 0; b < axes.batch; b++)
      for (int64_t t = 0; t < axes.tokens; t++)
        for (int64_t h = 0; h < axes.heads; h++)
          for (int64_t d = 0; d < axes.width; d++)
            narrow(random.bell() * size, memory.as<T>() + b * strides[0] + t * strides[1] + h * strides[2] + d);
  });
}

void add_mask(Random& random, Attend& attend) {
  MxAttention& job = attend.job;
  job.mask_dtype = MX_NO_MASK;
  job.causal = random.one_in(4);
  if (job.causal || random.one_in(3)) return;
  const int64_t axes[4] = {job.batch, job.heads, job.queries, job.keys};
  int64_t size = 1;
  for (int i = 3; i >= 0; i--) {
    const bool broadcast = i < 3 ? random.one_in(2) : random.one_in(8);
    job.mask_strides[i] = broadcast ? 0 : size;
    if (!broadcast) size *= axes[i];
  }
  job.mask_dtype = static_cast<int32_t>(random.below(4));
  attend.mask = Memory(static_cast<size_t>(size) * (job.mask_dtype == MX_BOOL_MASK ? 1 : element_size(job.mask_dtype)));
  const int64_t padding = random.one_in(2) && job.mask_strides[3] && job.keys ? random.between(1, job.keys) : size;
  for (int64_t i = 0; i < size; i++) {
    const bool out = i % (job.keys ? job.keys : 1) >= padding || random.one_in(5);
    if (job.mask_dtype == MX_BOOL_MASK)
      attend.mask.as()[i] = !out;
    else
      with_dtype(job.mask_dtype, [&]<class T>(const T*) {
        narrow(out ? (random.one_in(2) ? -HUGE_VALF : -1000.0f) : random.bell(), attend.mask.as<T>() + i);
      });
  }
}

Attend some_attention(Random& random) {
  Attend attend;
  MxAttention& job = attend.job;
  job.dtype = static_cast<int32_t>(random.below(3));
  job.batch = random.between(1, 2);
  job.kv_heads = random.between(1, 2), job.heads = job.kv_heads * random.between(1, 2);
  job.width = random.one_in(4) ? random.between(1, 300) : random.between(1, 40);
  job.v_width = random.one_in(4) ? random.between(1, 150) : random.between(1, 40);
  job.queries = random.one_in(8) ? random.between(90, 110) : random.between(0, 30);
  job.keys = random.one_in(8) ? random.between(500, 1100) : random.between(0, 140);
  job.scale = random.one_in(10) ? -random.uniform() : 2.0f * random.uniform() / sqrtf(static_cast<float>(job.width));
  const Axes q = {job.batch, job.queries, job.heads, job.width}, k = {job.batch, job.keys, job.kv_heads, job.width};
  const Axes v = {job.batch, job.keys, job.kv_heads, job.v_width};
  attend.q = with_room(random, q, job.dtype, job.q_strides);
  attend.k = with_room(random, k, job.dtype, job.k_strides);
  attend.v = with_room(random, v, job.dtype, job.v_strides);
  fill(random, q, job.dtype, job.q_strides, random.one_in(3) ? 4.0f : 1.0f, attend.q);
  fill(random, k, job.dtype, job.k_strides, 1.0f, attend.k);
  fill(random, v, job.dtype, job.v_strides, 1.0f, attend.v);
  add_mask(random, attend);
  return attend;
}

double mask_of(const MxAttention& job, int64_t b, int64_t h, int64_t query, int64_t key) {
  if (job.causal && key > query) return -kInfinite;
  if (job.mask_dtype == MX_NO_MASK) return 0;
  const int64_t* strides = job.mask_strides;
  const int64_t at = b * strides[0] + h * strides[1] + query * strides[2] + key * strides[3];
  if (job.mask_dtype == MX_BOOL_MASK) return static_cast<const uint8_t*>(job.mask)[at] ? 0 : -kInfinite;
  return static_cast<double>(element(job.mask, job.mask_dtype, at));
}

struct Expected {
  double value, slack;
};

// One query of one head. What a logit may be off by is the rounding of its sum's, and of the mask's, magnitudes; what a weight
// may be off by is that, and the rounding to bf16 where there are bf16 numbers.
void expect(const MxAttention& job, int64_t b, int64_t query, int64_t h, std::vector<Expected>& out) {
  const int64_t source = h / (job.heads / job.kv_heads);
  std::vector<double> logits(static_cast<size_t>(job.keys));
  double highest = -kInfinite, off = 0, total = 0;
  for (int64_t key = 0; key < job.keys; key++) {
    double product = 0, size = 0;
    for (int64_t d = 0; d < job.width; d++) {
      const double x = static_cast<double>(element(job.q, job.dtype, b * job.q_strides[0] + query * job.q_strides[1] + h * job.q_strides[2] + d)) *
                       static_cast<double>(element(job.k, job.dtype, b * job.k_strides[0] + key * job.k_strides[1] + source * job.k_strides[2] + d));
      product += x, size += fabs(x);
    }
    const double mask = mask_of(job, b, h, query, key);
    logits[static_cast<size_t>(key)] = product * static_cast<double>(job.scale) + mask;
    highest = fmax(highest, logits[static_cast<size_t>(key)]);
    off = fmax(off, size * fabs(static_cast<double>(job.scale)) * 0x1p-20 + (isfinite(mask) ? fabs(mask) * 0x1p-22 : 0));
  }
  for (double& logit : logits) total += logit = highest == -kInfinite ? 0 : exp(logit - highest);
  const double relative = off + 0x1p-18 + (job.dtype == MX_BF16 ? 0x1p-8 : 0);
  for (int64_t d = 0; d < job.v_width; d++) {
    double sum = 0, size = 0;
    for (int64_t key = 0; key < job.keys; key++) {
      const int64_t at = b * job.v_strides[0] + key * job.v_strides[1] + source * job.v_strides[2] + d;
      const double x = total > 0 ? logits[static_cast<size_t>(key)] / total * static_cast<double>(element(job.v, job.dtype, at)) : 0;
      sum += x, size += fabs(x);
    }
    const double rounding = job.dtype == MX_BF16 ? 0x1p-8 : job.dtype == MX_FP16 ? 0x1p-11 : 0x1p-24;
    out.push_back({sum, 2 * size * relative + fabs(sum) * rounding + (total > 0 ? 0x1p-24 : 0)});
  }
}

void print_job(const MxAttention& job) {
  printf("  method %d, dtype %d, queries %lld, keys %lld, widths %lld and %lld, mask %d, causal %d, scale %g\n", job.method,
         job.dtype, static_cast<long long>(job.queries), static_cast<long long>(job.keys), static_cast<long long>(job.width),
         static_cast<long long>(job.v_width), job.mask_dtype, job.causal, static_cast<double>(job.scale));
}

void fuzz_exact(Attend& attend, const std::vector<Setting>& all, Group& group, const std::string& label) {
  MxAttention& job = attend.job;
  std::vector<Expected> expected;
  for (int64_t b = 0; b < job.batch; b++)
    for (int64_t query = 0; query < job.queries; query++)
      for (int64_t h = 0; h < job.heads; h++) expect(job, b, query, h, expected);
  for (const Setting& setting : all) {
    now_running(label + ", attention, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    prepare(attend, 0x5A);
    run(job, setting);
    group.add_outputs(static_cast<int64_t>(expected.size()), 0);
    for (size_t i = 0; i < expected.size(); i++) {
      const double got = static_cast<double>(element(job.out, job.dtype, static_cast<int64_t>(i)));
      if (fabs(got - expected[i].value) <= expected[i].slack) continue;
      char text[200];
      snprintf(text, sizeof text, "output %zu is %.9g and not %.9g to %.3g; ", i, got, expected[i].value, expected[i].slack);
      if (group.failed(setting, text + label)) print_job(job);
      break;
    }
  }
}

// Numbers that are none, and rows of tiny ones, in any operand.
void spoil(Random& random, Attend& attend) {
  const float special[] = {HUGE_VALF, -HUGE_VALF, __builtin_nanf(""), 0.0f, 0x1p-130f, 0x1p-100f};
  const Memory* operands[] = {&attend.q, &attend.k, &attend.v};
  for (int64_t i = random.between(1, 4); i > 0; i--) {
    const Memory& operand = *random.of(operands);
    const int64_t count = static_cast<int64_t>(operand.size() / element_size(attend.job.dtype));
    if (count == 0) continue;
    with_dtype(attend.job.dtype, [&]<class T>(const T*) {
      const float value = random.of(special);
      const int64_t at = random.below(count);
      for (int64_t j = at; j < min_of(at + (fabsf(value) < 1.0f ? 2 * attend.job.width : 1), count); j++)
        narrow(value, operand.as<T>() + j);
    });
  }
}

void fuzz_int8(Attend& attend, const std::vector<Setting>& all, Group& group, const std::string& label) {
  MxAttention& job = attend.job;
  const int64_t count = job.batch * job.queries * job.heads * job.v_width;
  now_running(label + ", attention in INT8, path scalar");
  run(job, {"scalar", 1});
  const Memory expected = std::move(attend.out);
  for (const Setting& setting : all) {
    now_running(label + ", attention in INT8, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    prepare(attend, 0x5A);
    run(job, setting);
    group.add_outputs(count, count);
    for (int64_t i = 0; i < count; i++) {
      if (same_element(job.out, expected.as(), job.dtype, i)) continue;
      char text[200];
      snprintf(text, sizeof text, "output %lld is %a and not %a; ", static_cast<long long>(i),
               static_cast<double>(element(job.out, job.dtype, i)), static_cast<double>(element(expected.as(), job.dtype, i)));
      if (group.failed(setting, text + label)) print_job(job);
      break;
    }
  }
}

}  // namespace

void fuzz_attention(Random& random, const std::vector<Setting>& all, Group& exact, Group& int8, const std::string& label) {
  Attend attend = some_attention(random);
  attend.job.method = random.one_in(2) ? MX_INT8 : MX_EXACT;
  if (attend.job.method == MX_INT8 && random.one_in(4)) spoil(random, attend);
  prepare(attend, 0xA5);
  Group& group = attend.job.method == MX_INT8 ? int8 : exact;
  group.add_case();
  (attend.job.method == MX_INT8 ? fuzz_int8 : fuzz_exact)(attend, all, group, label);
}

}  // namespace conformance
