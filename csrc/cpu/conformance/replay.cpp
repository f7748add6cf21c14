// Replays the cases that tests/native_cases.py wrote; its docstring says how such a file is laid out.
#include <stdio.h>
#include <stdlib.h>

#include <fstream>
#include <iterator>
#include <map>

#include "support.h"

namespace conformance {
namespace {

using namespace mxdit;

class Reader {
 public:
  explicit Reader(const std::string& file) {
    std::ifstream stream(file, std::ios::binary);
    all_.assign(std::istreambuf_iterator<char>(stream), {});
  }

  const uint8_t* bytes(uint64_t count) {
    if (count > all_.size() - at_) {
      printf("FAILED: the case file is missing or cut short\n");
      exit(1);
    }
    at_ += count;
    return reinterpret_cast<const uint8_t*>(all_.data()) + at_ - count;
  }

  template <class T>
  T number() {
    T value;
    memcpy(&value, bytes(sizeof value), sizeof value);
    return value;
  }

  std::string text(uint64_t count) { return std::string(reinterpret_cast<const char*>(bytes(count)), count); }

 private:
  std::string all_;
  size_t at_ = 0;
};

struct Blob {
  const uint8_t* data = nullptr;
  uint64_t size = 0;
};

struct Record {
  std::string name;
  uint32_t kind;
  std::vector<int64_t> fields;
  std::vector<Blob> blobs;
};

enum Kind { kEncode, kDecode, kLinear, kRmsNorm, kGelu, kAttention };

Memory copy(const Blob& blob) {
  if (!blob.data) return Memory();
  Memory memory(blob.size);
  memcpy(memory.as(), blob.data, blob.size);
  return memory;
}

void must_have(const Record& record, size_t fields, size_t blobs) {
  if (record.fields.size() == fields && record.blobs.size() == blobs) return;
  printf("FAILED: a case of %s has other parts than this program expects\n", record.name.c_str());
  exit(1);
}

void expect_size(const Record& record, const Memory& memory, const Blob& blob) {
  if (memory.size() == blob.size) return;
  printf("FAILED: a case of %s has results of another size\n", record.name.c_str());
  exit(1);
}

void replay_encode(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 7, 5);
  const auto& f = record.fields;
  const auto& b = record.blobs;
  Encode got, expected;
  got.job.rows = f[0], got.job.k = f[1], got.job.x_stride = f[2];
  got.job.x_dtype = static_cast<int32_t>(f[3]), got.job.format = static_cast<int32_t>(f[4]);
  got.job.rule = static_cast<int32_t>(f[5]), got.job.round = static_cast<int32_t>(f[6]);
  got.x = copy(b[0]), got.mul_scale = copy(b[1]);
  prepare(got, b[4].data != nullptr, 0xA5);
  expect_size(record, got.codes, b[2]), expect_size(record, got.scale, b[3]), expect_size(record, got.outer, b[4]);
  run(got.job, setting);
  expected.codes = copy(b[2]), expected.scale = copy(b[3]), expected.outer = copy(b[4]);
  if (got.codes == expected.codes && got.scale == expected.scale && got.outer == expected.outer) return;
  if (group.failed(setting, "other codes or scales")) print_difference(got, expected);
}

void replay_decode(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 4, 4);
  const auto& f = record.fields;
  const auto& b = record.blobs;
  Decode got;
  got.job.rows = f[0], got.job.k = f[1];
  got.job.format = static_cast<int32_t>(f[2]), got.job.out_dtype = static_cast<int32_t>(f[3]);
  got.codes = copy(b[0]), got.scale = copy(b[1]), got.outer = copy(b[2]);
  prepare(got, 0xA5);
  expect_size(record, got.out, b[3]);
  const Memory expected = copy(b[3]);
  run(got.job, setting);
  for (int64_t i = 0; i < got.job.rows * got.job.k; i++)
    if (!same_element(got.job.out, expected.as(), got.job.out_dtype, i)) {
      if (group.failed(setting, "other values")) print_difference(got, expected.as());
      return;
    }
}

// Every number between two others, or, where they are the same, that one.
template <class Print>
void within(const Memory& low, const Memory& high, const void* out, int dtype, const Setting& setting, Group& group, Print print) {
  const int64_t count = static_cast<int64_t>(low.size() / element_size(dtype));
  int64_t exact = 0;
  for (int64_t i = 0; i < count; i++) {
    const float least = element(low.as(), dtype, i), most = element(high.as(), dtype, i), value = element(out, dtype, i);
    const bool one = same_element(low.as(), high.as(), dtype, i);
    exact += one;
    if (one ? same_element(low.as(), out, dtype, i) : least <= value && value <= most) continue;
    char text[160];
    snprintf(text, sizeof text, "%a is not in [%a, %a]", static_cast<double>(value), static_cast<double>(least),
             static_cast<double>(most));
    if (group.failed(setting, text)) print(i);
    return;
  }
  group.add_outputs(count, exact);
}

void replay_linear(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 10, 11);
  const auto& f = record.fields;
  const auto& b = record.blobs;
  Linear got;
  MxLinear& job = got.job;
  job.m = f[0], job.n = f[1], job.k = f[2], job.x_stride = f[3];
  job.x_dtype = static_cast<int32_t>(f[4]), job.a_format = static_cast<int32_t>(f[5]), job.rule = static_cast<int32_t>(f[6]);
  job.w_format = static_cast<int32_t>(f[7]), job.out_dtype = static_cast<int32_t>(f[8]);
  job.bias_dtype = MX_FP32;
  job.a_dual = static_cast<int32_t>(f[9]);
  got.x = copy(b[0]), got.mul_scale = copy(b[1]);
  got.a_codes = copy(b[2]), got.a_scale = copy(b[3]), got.a_outer = copy(b[4]);
  got.w_codes = copy(b[5]), got.w_scale = copy(b[6]), got.w_outer = copy(b[7]), got.bias = copy(b[8]);
  prepare(got, 0xA5);
  expect_size(record, got.out, b[9]), expect_size(record, got.out, b[10]);
  const Memory low = copy(b[9]), high = copy(b[10]);
  run(job, setting);
  within(low, high, job.out, job.out_dtype, setting, group, [&](int64_t i) { print_output(got, i / job.n, i % job.n); });
}

void expect_numbers(const Memory& got, const Memory& expected, int dtype, const Setting& setting, Group& group) {
  for (int64_t i = 0; i < static_cast<int64_t>(got.size() / element_size(dtype)); i++) {
    if (same_element(got.as(), expected.as(), dtype, i)) continue;
    char text[160];
    snprintf(text, sizeof text, "number %lld is %a, not %a", static_cast<long long>(i),
             static_cast<double>(element(got.as(), dtype, i)), static_cast<double>(element(expected.as(), dtype, i)));
    group.failed(setting, text);
    return;
  }
}

// Into new memory, then in place.
void replay_rms_norm(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 8, 5);
  const auto& f = record.fields;
  const auto& b = record.blobs;
  MxRmsNorm job = {};
  job.rows = f[0], job.width = job.x_stride = job.out_stride = f[1], job.head = f[2], job.tokens = f[3], job.token_rows = f[4];
  job.dtype = static_cast<int32_t>(f[5]), job.rounded = static_cast<int32_t>(f[6]);
  const uint32_t eps = static_cast<uint32_t>(f[7]);
  memcpy(&job.eps, &eps, sizeof eps);
  const Memory x = copy(b[0]), weight = copy(b[1]), cos = copy(b[2]), sin = copy(b[3]), expected = copy(b[4]);
  Memory out(x.size());
  expect_size(record, out, b[4]);
  job.x = x.as(), job.weight = weight.as<float>(), job.cos = cos.as<float>(), job.sin = sin.as<float>(), job.out = out.as();
  run(job, setting);
  expect_numbers(out, expected, job.dtype, setting, group);
  job.out = x.as();
  run(job, setting);
  expect_numbers(x, expected, job.dtype, setting, group);
}

void replay_gelu(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 2, 2);
  const Memory x = copy(record.blobs[0]), expected = copy(record.blobs[1]);
  MxGelu job = {x.as(), record.fields[0], static_cast<int32_t>(record.fields[1])};
  expect_size(record, x, record.blobs[1]);
  run(job, setting);
  expect_numbers(x, expected, job.dtype, setting, group);
}

void replay_attention(const Record& record, const Setting& setting, Group& group) {
  must_have(record, 16, 6);
  const auto& f = record.fields;
  const auto& b = record.blobs;
  Attend got;
  MxAttention& job = got.job;
  job.batch = f[0], job.queries = f[1], job.keys = f[2], job.heads = f[3], job.kv_heads = f[4], job.width = f[5], job.v_width = f[6];
  const auto dense = [](int64_t tokens, int64_t heads, int64_t width, int64_t* strides) {
    strides[0] = tokens * heads * width, strides[1] = heads * width, strides[2] = width;
  };
  dense(job.queries, job.heads, job.width, job.q_strides);
  dense(job.keys, job.kv_heads, job.width, job.k_strides);
  dense(job.keys, job.kv_heads, job.v_width, job.v_strides);
  for (size_t i = 0; i < 4; i++) job.mask_strides[i] = f[7 + i];
  job.dtype = static_cast<int32_t>(f[11]), job.mask_dtype = static_cast<int32_t>(f[12]);
  job.causal = static_cast<int32_t>(f[13]), job.method = static_cast<int32_t>(f[14]);
  const uint32_t scale = static_cast<uint32_t>(f[15]);
  memcpy(&job.scale, &scale, sizeof scale);
  got.q = copy(b[0]), got.k = copy(b[1]), got.v = copy(b[2]), got.mask = copy(b[3]);
  prepare(got, 0xA5);
  expect_size(record, got.out, b[4]), expect_size(record, got.out, b[5]);
  run(job, setting);
  within(copy(b[4]), copy(b[5]), job.out, job.dtype, setting, group, [&](int64_t i) {
    printf("  number %lld; dtype %d, queries %lld, keys %lld, widths %lld and %lld, mask %d, causal %d\n", static_cast<long long>(i),
           job.dtype, static_cast<long long>(job.queries), static_cast<long long>(job.keys), static_cast<long long>(job.width),
           static_cast<long long>(job.v_width), job.mask_dtype, job.causal);
  });
}

}  // namespace

bool replay(const std::string& file, const std::string& only_path) {
  Reader reader(file);
  if (reader.text(8) != "mxcases1") {
    printf("FAILED: %s holds no cases\n", file.c_str());
    return false;
  }
  std::vector<Blob> blobs(reader.number<uint32_t>());
  for (Blob& blob : blobs) {
    blob.size = reader.number<uint64_t>();
    blob.data = reader.bytes(blob.size);
  }
  std::map<std::string, Group> groups;
  const std::vector<Setting> all = settings(only_path);
  const uint32_t records = reader.number<uint32_t>();
  for (uint32_t index = 0; index < records; index++) {
    Record record;
    record.name = reader.text(reader.number<uint32_t>());
    record.kind = reader.number<uint32_t>();
    record.fields.resize(reader.number<uint32_t>());
    for (int64_t& field : record.fields) field = reader.number<int64_t>();
    record.blobs.resize(reader.number<uint32_t>());
    for (Blob& blob : record.blobs) {
      const int32_t which = reader.number<int32_t>();
      if (which >= 0) blob = blobs.at(static_cast<size_t>(which));
    }
    Group& group = groups.try_emplace(record.name, record.name).first->second;
    group.add_case();
    Memory::on_heap = index % 2;
    for (const Setting& setting : all) {
      now_running("case " + std::to_string(index) + " (" + record.name + "), path " + setting.path + ", " +
                  std::to_string(setting.threads) + " threads");
      if (record.kind == kEncode) replay_encode(record, setting, group);
      if (record.kind == kDecode) replay_decode(record, setting, group);
      if (record.kind == kLinear) replay_linear(record, setting, group);
      if (record.kind == kRmsNorm) replay_rms_norm(record, setting, group);
      if (record.kind == kGelu) replay_gelu(record, setting, group);
      if (record.kind == kAttention) replay_attention(record, setting, group);
    }
  }
  bool passed = true;
  for (const auto& [name, group] : groups) {
    group.print();
    passed &= group.failures() == 0;
  }
  return passed;
}

}  // namespace conformance
