// Random norms and GELU: shapes, strides, dtypes, in place and not, on every path and number of threads, against path scalar.
#include <stdio.h>

#include "random.h"

namespace conformance {
namespace {

using namespace mxdit;

// Numbers of all sizes, some of which are none: NaN spreads over its row, so it is rare.
Memory numbers(Random& random, int64_t count, int dtype) {
  Memory memory(static_cast<size_t>(count) * element_size(dtype));
  const bool any = random.one_in(8);
  if (any) fill_random(random, memory);
  with_dtype(dtype, [&]<class T>(const T*) {
    const float size = random.one_in(4) ? 30.0f : 1.0f;
    for (int64_t i = 0; i < count && !any; i++)
      narrow(random.one_in(5000) ? random.of({0.0f, -0.0f, __builtin_inff()}) : random.bell() * size, memory.as<T>() + i);
  });
  return memory;
}

void compare(const Memory& got, const Memory& expected, int dtype, const Setting& setting, Group& group, const std::string& label) {
  const int64_t count = static_cast<int64_t>(got.size() / element_size(dtype));
  group.add_outputs(count, count);
  for (int64_t i = 0; i < count; i++) {
    if (same_element(got.as(), expected.as(), dtype, i)) continue;
    char text[160];
    snprintf(text, sizeof text, "number %lld of %lld, dtype %d, is %a, not %a; ", static_cast<long long>(i),
             static_cast<long long>(count), dtype, static_cast<double>(element(got.as(), dtype, i)),
             static_cast<double>(element(expected.as(), dtype, i)));
    group.failed(setting, text + label);
    return;
  }
}

void copy(const Memory& from, Memory& to) { memcpy(to.as(), from.as(), from.size()); }

}  // namespace

void fuzz_rms_norm(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label) {
  MxRmsNorm job = {};
  job.dtype = static_cast<int32_t>(random.below(3));
  job.rounded = random.one_in(2);
  job.eps = random.one_in(3) ? 0.0f : random.uniform() * 1e-3f;
  const bool turned = random.one_in(2), in_place = random.one_in(2);
  job.head = turned ? 2 * random.between(1, 70) : random.one_in(5) ? random.between(1, 2000) : random.between(1, 100);
  job.width = job.head * (turned ? random.between(1, 5) : 1);
  job.tokens = turned ? random.between(1, 9) : 1, job.token_rows = random.between(1, 3);
  // Tokens follow each other more than once: batch entries. Some jobs are enough for several threads.
  job.rows = random.one_in(10) ? 0 : job.tokens * job.token_rows * random.between(1, random.one_in(8) ? 120 : 3);
  job.x_stride = job.width + (random.one_in(2) ? random.between(0, 9) : 0);
  job.out_stride = in_place ? job.x_stride : job.width + (random.one_in(2) ? random.between(0, 9) : 0);
  const auto room = [&](int64_t stride) { return job.rows ? (job.rows - 1) * stride + job.width : 0; };
  const Memory x = numbers(random, room(job.x_stride), job.dtype);
  const Memory weight = numbers(random, job.width, MX_FP32);
  const Memory cos = numbers(random, job.tokens * job.head, MX_FP32), sin = numbers(random, job.tokens * job.head, MX_FP32);
  job.weight = weight.as<float>();
  if (turned) job.cos = cos.as<float>(), job.sin = sin.as<float>();
  const size_t bytes = static_cast<size_t>(room(job.out_stride)) * element_size(job.dtype);
  // Between rows nothing is written: both memories hold x there, or the same garbage.
  const auto norm = [&](const Setting& setting, Memory& out) {
    if (in_place) copy(x, out);
    job.x = in_place ? out.as() : x.as(), job.out = out.as();
    run(job, setting);
  };
  Memory expected(bytes);
  now_running(label + ", rms_norm, path scalar");
  norm({"scalar", 1}, expected);
  group.add_case();
  for (const Setting& setting : all) {
    now_running(label + ", rms_norm, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    Memory out(bytes);
    norm(setting, out);
    compare(out, expected, job.dtype, setting, group, label);
  }
}

void fuzz_gelu(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label) {
  const int dtype = static_cast<int>(random.below(3));
  const int64_t count = random.one_in(5) ? random.between(30000, 150000) : random.between(0, 200);
  const Memory x = numbers(random, count, dtype);
  Memory expected(x.size());
  copy(x, expected);
  now_running(label + ", gelu, path scalar");
  run(MxGelu{expected.as(), count, dtype}, {"scalar", 1});
  group.add_case();
  for (const Setting& setting : all) {
    now_running(label + ", gelu, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    Memory out(x.size());
    copy(x, out);
    run(MxGelu{out.as(), count, dtype}, setting);
    compare(out, expected, dtype, setting, group, label);
  }
}

}  // namespace conformance
