// Random jobs: every path and number of threads against the scalar path on one thread, and products against their exact
// sums in float64. Iteration i of seed S is iteration 0 of seed S + i.
#include <math.h>
#include <stdio.h>

#include <limits>

#include "random.h"

namespace conformance {
namespace {

using namespace mxdit;

const Setting kPlain = {"scalar", 1};

int64_t some_k(Random& random, bool even) {
  int64_t k;
  switch (random.below(4)) {
    case 0: k = random.between(1, 70); break;
    case 1: k = kBlock * random.between(1, 20) + random.between(-2, 2); break;
    case 2: k = kGroup * random.between(1, 3) + random.between(-34, 34); break;
    default: k = random.between(1, 800);
  }
  return even ? (k + 1) / 2 * 2 : k;
}

// -- floats ---------------------------------------------------------------------------------------------------------------

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

enum Style { kAnyBits, kBell, kGrid, kZeros, kTiny, kSpecial, kStyles };

// A number for a block of this style whose numbers are about 2^exponent.
float some_float(Random& random, int style, int exponent) {
  static const float points[] = {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f,
                                 4.0f, 5.0f,  6.0f, 7.0f,  7.25f, 7.5f, 448.0f, 464.0f, 0x1p-9f, 0x1.8p-10f};
  const float sign = random.one_in(2) ? 1.0f : -1.0f;
  switch (style) {
    case kBell: return ldexpf(random.bell(), exponent);
    case kGrid: {
      const uint32_t bits = bits_of(ldexpf(random.of(points), exponent));
      const int64_t nudge = random.one_in(3) ? random.between(-1, 1) << (random.one_in(2) ? 16 : 0) : 0;
      return sign * float_of(static_cast<uint32_t>(bits + nudge) & kMagnitude);
    }
    case kZeros: return sign * 0.0f;
    case kTiny: return sign * ldexpf(random.uniform(), random.one_in(2) ? -126 : -16);
    case kSpecial: return random.one_in(20) ? sign * (random.one_in(2) ? kInfinity : kNan) : random.bell();
    default: return float_of(static_cast<uint32_t>(random.bits() >> 32));
  }
}

// Rows of floats with garbage between them, in blocks of differing style.
Memory some_floats(Random& random, int dtype, int64_t rows, int64_t k, int64_t stride, bool calm) {
  Memory memory(static_cast<size_t>(rows ? (rows - 1) * stride + k : 0) * element_size(dtype));
  fill_random(random, memory);
  const int exponent = static_cast<int>(random.one_in(3) ? random.between(-140, 127) : random.between(-12, 8));
  with_dtype(dtype, [&]<class T>(const T*) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t first = 0; first < k; first += kBlock) {
        const int style = calm ? (random.one_in(2) ? kBell : kGrid) : static_cast<int>(random.below(kStyles));
        const int about = calm ? static_cast<int>(random.below(3)) : exponent + static_cast<int>(random.between(-3, 3));
        T* x = memory.as<T>() + row * stride + first;
        for (int64_t i = 0; i < min_of<int64_t>(kBlock, k - first); i++) {
          if (style == kAnyBits)
            memcpy(x + i, memory.as() + random.below(static_cast<int64_t>(memory.size() / sizeof(T))) * sizeof(T), sizeof(T));
          else
            narrow(some_float(random, style, about), x + i);
        }
      }
  });
  return memory;
}

Memory some_mul_scale(Random& random, int dtype, int64_t k, bool calm) {
  Memory memory(static_cast<size_t>(k) * 4);
  with_dtype(dtype, [&]<class T>(const T*) {
    for (int64_t i = 0; i < k; i++)
      memory.as<float>()[i] =
          rounded_to<T>(calm || !random.one_in(50) ? random.uniform() + 0.5f : some_float(random, kSpecial, 0));
  });
  return memory;
}

// -- encoding and decoding ----------------------------------------------------------------------------------------------

void fuzz_encode(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label) {
  Encode expected;
  MxEncode& job = expected.job;
  const bool dual = random.one_in(3);
  job.format = !dual && random.one_in(2) ? MX_FP8 : MX_FP4;
  job.x_dtype = static_cast<int32_t>(random.below(dual ? 2 : 3));
  static const int single[] = {MX_OCP, MX_UOS, MX_EVEN6, MX_EVEN7}, eight[] = {MX_OCP, MX_CUBLAS};
  job.rule = dual ? MX_OCP : job.format == MX_FP4 ? random.of(single) : random.of(eight);
  job.round = job.format == MX_FP4 ? static_cast<int32_t>(random.below(3)) : MX_RINT;
  job.k = some_k(random, job.format == MX_FP4);
  job.rows = random.one_in(25) ? random.between(98304 / job.k, 98304 / job.k + 70) : random.between(0, 12);
  job.x_stride = job.k + (random.one_in(2) ? random.between(0, 9) : 0);
  expected.x = some_floats(random, job.x_dtype, job.rows, job.k, job.x_stride, false);
  if (random.one_in(3)) expected.mul_scale = some_mul_scale(random, job.x_dtype, job.k, false);
  prepare(expected, dual, 0xA5);
  now_running(label);
  run(job, kPlain);
  group.add_case();
  for (const Setting& setting : all) {
    now_running(label + ", encode, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    Encode got;
    got.job = job;
    std::swap(got.x, expected.x), std::swap(got.mul_scale, expected.mul_scale);
    prepare(got, dual, 0x5A);
    run(got.job, setting);
    if (!(got.codes == expected.codes && got.scale == expected.scale && got.outer == expected.outer) &&
        group.failed(setting, "other codes or scales than the scalar path; " + label))
      print_difference(got, expected);
    std::swap(got.x, expected.x), std::swap(got.mul_scale, expected.mul_scale);
  }
}

void fuzz_decode(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label) {
  Decode expected;
  MxDecode& job = expected.job;
  job.format = random.one_in(2) ? MX_FP8 : MX_FP4;
  job.out_dtype = static_cast<int32_t>(random.below(3));
  job.k = some_k(random, job.format == MX_FP4);
  job.rows = random.one_in(25) ? random.between(98304 / job.k, 98304 / job.k + 70) : random.between(0, 12);
  expected.codes = Memory(static_cast<size_t>(job.rows * code_bytes(job.format, job.k)));
  expected.scale = Memory(static_cast<size_t>(job.rows * blocks_of(job.k)));
  fill_random(random, expected.codes), fill_random(random, expected.scale);
  if (job.format == MX_FP4 && random.one_in(2)) {
    expected.outer = Memory(static_cast<size_t>(job.rows * groups_of(job.k)) * 4);
    fill_random(random, expected.outer);
  }
  prepare(expected, 0xA5);
  now_running(label);
  run(job, kPlain);
  group.add_case();
  for (const Setting& setting : all) {
    now_running(label + ", decode, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    Decode got;
    got.job = job;
    std::swap(got.codes, expected.codes), std::swap(got.scale, expected.scale), std::swap(got.outer, expected.outer);
    prepare(got, 0x5A);
    run(got.job, setting);
    for (int64_t i = 0; i < job.rows * job.k; i++)
      if (!same_element(got.job.out, expected.job.out, job.out_dtype, i)) {
        if (group.failed(setting, "other values than the scalar path; " + label)) print_difference(got, expected.job.out);
        break;
      }
    std::swap(got.codes, expected.codes), std::swap(got.scale, expected.scale), std::swap(got.outer, expected.outer);
  }
}

// -- products -------------------------------------------------------------------------------------------------------------

// How the numbers of a product are spread. Wherever a result overflows it does so by far, so that no order of the sum
// matters to whether and how.
enum Spread { kNear, kWide, kNans, kLowScales, kHighScales, kSpreads };

struct Scales {
  int64_t low, high;
  int rare;  // byte of a few blocks, or -1
};

Memory some_scales(Random& random, int64_t rows, int64_t k, const Scales& scales) {
  Memory memory(static_cast<size_t>(rows * blocks_of(k)));
  for (size_t i = 0; i < memory.size(); i++) {
    const bool rare = scales.rare >= 0 && random.one_in(60);
    memory.as()[i] = static_cast<uint8_t>(rare ? scales.rare : random.between(scales.low, scales.high));
  }
  return memory;
}

Memory some_codes(Random& random, int format, int64_t rows, int64_t k, bool nans) {
  Memory memory(static_cast<size_t>(rows * code_bytes(format, k)));
  fill_random(random, memory);
  const bool few = random.one_in(2);
  for (size_t i = 0; format == MX_FP8 && i < memory.size(); i++) {
    uint8_t& code = memory.as()[i];
    if (few) code = static_cast<uint8_t>((code & 0x84u) | 0x30u | (code & 8u));  // 0.5, 0.75, 1, 1.5: sums are exact
    if (!nans && (code & 0x7F) == 0x7F) code ^= 1;
  }
  return memory;
}

// Makes some blocks zeros, under any scale that is a number.
void empty_blocks(Random& random, int format, int64_t rows, int64_t k, Memory& codes, Memory& scale) {
  const int64_t row_codes = code_bytes(format, k), block = code_bytes(format, kBlock);
  for (int64_t b = 0; b < rows * blocks_of(k); b++) {
    if (!random.one_in(6)) continue;
    const int64_t first = b / blocks_of(k) * row_codes + b % blocks_of(k) * block;
    const int64_t count = min_of(block, row_codes - b % blocks_of(k) * block);
    memset(codes.as() + first, random.one_in(2) ? 0 : format == MX_FP4 ? 0x88 : 0x80, static_cast<size_t>(count));
    scale.as()[b] = static_cast<uint8_t>(random.below(255));
  }
}

Memory some_outer(Random& random, int64_t rows, int64_t k, bool special) {
  static const float specials[] = {0.0f, 1e-40f, 1e-30f, 1e30f, kInfinity, kNan};
  Memory memory(static_cast<size_t>(rows * groups_of(k)) * 4);
  for (size_t i = 0; i < memory.size() / 4; i++) {
    const float ordinary = ldexpf(random.uniform() + 0.5f, static_cast<int>(random.between(-9, 3)));
    memory.as<float>()[i] = special && random.one_in(10) ? random.of(specials) : ordinary;
  }
  return memory;
}

Memory some_bias(Random& random, int64_t n, int dtype, bool special) {
  static const float specials[] = {0.0f, -0.0f, 1e-40f, 65504.0f, -65520.0f, 3e38f, -3e38f, kInfinity, kNan};
  Memory memory(static_cast<size_t>(n) * element_size(dtype));
  for (int64_t i = 0; i < n; i++) {
    const float value = special && random.one_in(5) ? random.of(specials) : random.bell();
    with_dtype(dtype, [&]<class T>(const T*) { narrow(value, memory.as<T>() + i); });
  }
  return memory;
}

Linear some_product(Random& random) {
  Linear linear;
  MxLinear& job = linear.job;
  const bool dual = random.one_in(3);
  job.w_format = dual || !random.one_in(3) ? MX_FP4 : MX_FP8;
  static const int over_four[] = {MX_FP4, MX_FP4, MX_FP8, MX_FLOAT};
  job.a_format = random.of(over_four);
  if (job.w_format == MX_FP8) job.a_format = random.one_in(2) ? MX_FLOAT : MX_FP8;
  const bool two_levels = dual && job.a_format == MX_FP4;
  job.k = some_k(random, job.w_format == MX_FP4);
  job.m = random.between(1, random.one_in(3) ? 40 : 9);
  job.n = random.between(1, random.one_in(4) ? 70 : 20);
  if (random.one_in(25)) {  // enough for several threads
    if (random.one_in(2))
      job.m = random.between(40, 90), job.n = random.between(40, 110);
    else  // and so many rows that each takes some of its own
      job.m = random.between(192, 260), job.n = random.between(10, 40);
    job.k = (3 << 20) / (job.m * job.n) / 2 * 2 + 2;
  } else if (random.one_in(60)) {
    (random.one_in(2) ? job.m : job.n) = 0;
  }
  int spread = static_cast<int>(random.one_in(2) ? static_cast<int64_t>(kNear) : random.below(kSpreads));
  if (job.a_format == MX_FLOAT && spread == kHighScales) spread = kNear;
  const bool packed = job.a_format != MX_FLOAT && (random.one_in(2) || spread == kLowScales || spread == kHighScales);
  job.x_dtype = static_cast<int32_t>(random.below(job.a_format == MX_FLOAT || !(two_levels || dual) ? 3 : 2));
  job.out_dtype = static_cast<int32_t>(random.below(two_levels ? 2 : 3));
  static const int single[] = {MX_OCP, MX_UOS, MX_EVEN6, MX_EVEN7}, eight[] = {MX_OCP, MX_CUBLAS};
  job.rule = two_levels ? MX_OCP : job.a_format == MX_FP4 ? random.of(single) : random.of(eight);
  job.a_dual = two_levels;
  job.x_stride = job.k + (random.one_in(2) ? random.between(0, 9) : 0);

  const int64_t a_base = random.between(100, 140), w_base = random.between(100, 140);
  Scales a = {a_base, a_base + random.between(0, 4), -1}, w = {w_base, w_base + random.between(0, 4), -1};
  if (spread == kWide) a.high += 9, w.low -= 9;
  if (spread == kNans) (random.one_in(2) ? a : w).rare = 255;
  if (spread == kLowScales) {
    const bool first = random.one_in(2);
    const int64_t other = random.between(100, 160);
    (first ? a : w) = {0, random.between(0, 9), -1};  // in one window or not
    (first ? w : a) = {other, other + 1, -1};
  }
  if (spread == kHighScales) {
    const bool first = random.one_in(2);
    const int64_t high = random.between(236, 252), other = random.between(2, 20);
    (first ? a : w) = {high, high + random.between(0, 2), -1};
    (first ? w : a) = {other, other + 1, -1};
  }
  if (packed) {
    linear.a_codes = some_codes(random, job.a_format, job.m, job.k, spread == kNans);
    linear.a_scale = some_scales(random, job.m, job.k, a);
    if (random.one_in(4)) empty_blocks(random, job.a_format, job.m, job.k, linear.a_codes, linear.a_scale);
    if (two_levels) linear.a_outer = some_outer(random, job.m, job.k, spread == kNear && random.one_in(4));
  } else {
    linear.x = some_floats(random, job.x_dtype, job.m, job.k, job.x_stride, true);
    if (spread == kNans && linear.x.size())
      for (int64_t row = 0; row < job.m; row++)
        if (random.one_in(4))
          with_dtype(job.x_dtype, [&]<class T>(const T*) {
            narrow(random.one_in(2) ? kNan : -kInfinity, linear.x.as<T>() + row * job.x_stride + random.below(job.k));
          });
    if (job.w_format == MX_FP4 && random.one_in(2)) linear.mul_scale = some_mul_scale(random, job.x_dtype, job.k, true);
  }
  linear.w_codes = some_codes(random, job.w_format, job.n, job.k, spread == kNans);
  linear.w_scale = some_scales(random, job.n, job.k, w);
  if (random.one_in(4)) empty_blocks(random, job.w_format, job.n, job.k, linear.w_codes, linear.w_scale);
  if (dual) linear.w_outer = some_outer(random, job.n, job.k, spread == kNear && random.one_in(4));
  job.bias_dtype = static_cast<int32_t>(random.between(MX_BF16, MX_FP32));
  if (random.one_in(2)) linear.bias = some_bias(random, job.n, job.bias_dtype, spread == kNear && random.one_in(3));
  return linear;
}

// Rows of an operand as fp32, without their outer scale, and what is known of them by row and step of the sum.
struct Operand {
  int64_t k, width, steps;
  std::vector<float> values;
  std::vector<int> lowest;  // exponent of a power of two of which all finite numbers are multiples
  std::vector<float> outer;  // by row and step, or empty

  float at(int64_t row, int64_t i) const { return values[static_cast<size_t>(row * k + i)]; }
  size_t step(int64_t row, int64_t g) const { return static_cast<size_t>(row * steps + g); }

  void find_lowest(int64_t rows) {
    lowest.assign(static_cast<size_t>(rows * steps), 1000);
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < k; i++) {
        const uint32_t bits = bits_of(at(row, i)) & kMagnitude;
        if (bits == 0 || bits >= kInf) continue;
        const uint32_t mantissa = bits < 0x800000u ? bits : (bits & 0x7FFFFFu) | 0x800000u;
        const int exponent = (bits < 0x800000u ? 1 : static_cast<int>(bits >> 23)) - 150 + __builtin_ctz(mantissa);
        int& least = lowest[step(row, i / width)];
        least = min_of(least, exponent);
      }
  }
};

void decode_operand(int format, int64_t rows, const uint8_t* codes, const uint8_t* scale, Operand* out) {
  Memory values(static_cast<size_t>(rows * out->k) * 4);
  const MxDecode job = {codes, scale, nullptr, rows, out->k, format, MX_FP32, values.as()};
  run(job, kPlain);
  out->values.assign(values.as<float>(), values.as<float>() + rows * out->k);
  out->find_lowest(rows);
}

std::vector<float> floats(const float* p, int64_t count) {
  return p ? std::vector<float>(p, p + count) : std::vector<float>();
}

Operand empty_operand(const MxLinear& job) {
  Operand operand;
  operand.k = job.k;
  operand.width = job.w_outer ? kGroup : job.k;
  operand.steps = job.w_outer ? groups_of(job.k) : 1;
  return operand;
}

Operand weights(const MxLinear& job) {
  Operand w = empty_operand(job);
  decode_operand(job.w_format, job.n, job.w_codes, job.w_scale, &w);
  w.outer = floats(job.w_outer, job.n * w.steps);
  return w;
}

Operand activations_of(const MxLinear& job) {
  Operand a = empty_operand(job);
  if (!job.x) {
    decode_operand(job.a_format, job.m, job.a_codes, job.a_scale, &a);
    a.outer = floats(job.a_outer, job.m * a.steps);
  } else if (job.a_format == MX_FLOAT) {
    with_dtype(job.x_dtype, [&]<class T>(const T*) {
      for (int64_t m = 0; m < job.m; m++)
        for (int64_t i = 0; i < job.k; i++) {
          const float x = widen(static_cast<const T*>(job.x)[m * job.x_stride + i]);
          a.values.push_back(job.mul_scale ? rounded_to<T>(x * job.mul_scale[i]) : x);
        }
    });
    a.find_lowest(job.m);
  } else {
    Encode encode;
    encode.job.rows = job.m, encode.job.k = job.k, encode.job.x_stride = job.x_stride;
    encode.job.x_dtype = job.x_dtype, encode.job.format = job.a_format, encode.job.rule = job.rule;
    encode.job.round = MX_RINT;
    prepare(encode, job.a_dual, 0xA5);
    encode.job.x = job.x;
    encode.job.mul_scale = job.mul_scale;
    run(encode.job, kPlain);
    decode_operand(job.a_format, job.m, encode.job.codes, encode.job.scale, &a);
    a.outer = floats(encode.job.outer, job.m * a.steps);
  }
  return a;
}

float to_result(const MxLinear& job, double value) {
  float result = static_cast<float>(value);
  with_dtype(job.out_dtype, [&]<class T>(const T* type) {
    const float limit = largest(type);
    if (!job.w_outer && job.out_dtype != MX_FP32) result = fminf(fmaxf(result, -limit), limit);
    result = rounded_to<T>(result);
  });
  return result;
}

// Of the sum of magnitudes. The cases ask for 2^-20, which sums of Gaussians meet; but once in a million results a random job
// adds hundreds of numbers to a large one, with a rounding of the large one each time.
constexpr double kTolerance = 0x1p-17;

// What may come out for one output.
struct Expected {
  bool one;  // the sums are exact in any order, or inf or NaN in any: only one result is right
  bool finite;      // and so is the sum on its way; then these are the ends of what is right
  float low, high;
};

Expected expect(const MxLinear& job, const Operand& a, const Operand& w, int64_t m, int64_t n) {
  const double start = job.bias ? static_cast<double>(element(job.bias, job.bias_dtype, n)) : 0.0;
  double total = start, magnitudes = fabs(start);
  bool exact = true, overflow = false;
  for (int64_t g = 0; g < a.steps; g++) {
    double p = 0, size = 0;
    for (int64_t i = g * a.width; i < min_of((g + 1) * a.width, a.k); i++) {
      const double product = static_cast<double>(a.at(m, i)) * static_cast<double>(w.at(n, i));
      p += product;
      size += fabs(product);
    }
    const int quantum = a.lowest[a.step(m, g)] + w.lowest[w.step(n, g)];
    exact &= size == 0 || (quantum >= -149 && size < 0x1p127 && size <= ldexp(1.0, quantum + 24));
    float outer = 1.0f;
    if (!w.outer.empty()) outer = w.outer[w.step(n, g)];
    if (!a.outer.empty()) outer *= a.outer[a.step(m, g)];
    total += p * static_cast<double>(outer);
    overflow |= fabs(total) >= 0x1p127;  // inf from here on in fp32, whatever follows
    magnitudes += (size + static_cast<double>(job.k) * 0x1p-149) * static_cast<double>(outer);
  }
  const double slack = magnitudes * kTolerance + static_cast<double>(job.k + 1) * 0x1p-149;
  return {exact || !isfinite(total), isfinite(total) && !overflow, to_result(job, total - slack),
          to_result(job, total + slack)};
}

// For every output.
std::vector<Expected> expect(const MxLinear& job) {
  const Operand a = activations_of(job), w = weights(job);
  std::vector<Expected> all;
  for (int64_t m = 0; m < job.m; m++)
    for (int64_t n = 0; n < job.n; n++) all.push_back(expect(job, a, w, m, n));
  return all;
}

// Output (m, n) of a product as one of its own, over the first k elements.
Linear slice(const Linear& from, int64_t m, int64_t n, int64_t k) {
  const MxLinear& whole = from.job;
  Linear to;
  to.job = whole;
  to.job.m = to.job.n = 1, to.job.k = to.job.x_stride = k;
  const auto part = [](const Memory& memory, int64_t first, int64_t count) {
    if (!memory.as()) return Memory();
    Memory copy(static_cast<size_t>(count));
    memcpy(copy.as(), memory.as() + first, copy.size());
    return copy;
  };
  const int64_t size = static_cast<int64_t>(element_size(whole.x_dtype));
  const int64_t blocks = blocks_of(whole.k), groups = groups_of(whole.k) * 4;
  to.x = part(from.x, m * whole.x_stride * size, k * size);
  to.mul_scale = part(from.mul_scale, 0, k * 4);
  to.a_codes = part(from.a_codes, m * code_bytes(whole.a_format, whole.k), code_bytes(whole.a_format, k));
  to.a_scale = part(from.a_scale, m * blocks, blocks_of(k));
  to.a_outer = part(from.a_outer, m * groups, groups_of(k) * 4);
  to.w_codes = part(from.w_codes, n * code_bytes(whole.w_format, whole.k), code_bytes(whole.w_format, k));
  to.w_scale = part(from.w_scale, n * blocks, blocks_of(k));
  to.w_outer = part(from.w_outer, n * groups, groups_of(k) * 4);
  const int64_t of_bias = static_cast<int64_t>(element_size(whole.bias_dtype));
  to.bias = part(from.bias, n * of_bias, of_bias);
  prepare(to, 0x5A);
  return to;
}

struct Wrong {
  int64_t m = -1, n = -1;
  std::string text;
};

// The first output of `got` that is not right. `plain` has what the scalar path gave.
Wrong first_wrong(const MxLinear& job, const std::vector<Expected>& all, const void* got, const void* plain) {
  for (int64_t i = 0; i < job.m * job.n; i++) {
    const Expected& expected = all[static_cast<size_t>(i)];
    const float value = element(got, job.out_dtype, i);
    if ((!expected.one || same_element(got, plain, job.out_dtype, i)) &&
        (!expected.finite || (expected.low <= value && value <= expected.high)))
      continue;
    char text[160];
    snprintf(text, sizeof text, "%a, the scalar path %a, %s in [%a, %a]", static_cast<double>(value),
             static_cast<double>(element(plain, job.out_dtype, i)), expected.one ? "one number" : "any",
             static_cast<double>(expected.low), static_cast<double>(expected.high));
    return {i / job.n, i % job.n, text};
  }
  return {};
}

// A product on the scalar path and on another: what is wrong with it.
Wrong try_product(Linear& linear, const Setting& setting) {
  Linear plain = slice(linear, 0, 0, linear.job.k);
  run(plain.job, kPlain);
  run(linear.job, setting);
  return first_wrong(linear.job, expect(linear.job), linear.job.out, plain.job.out);
}

// Prints the shortest beginning of one output's operands that goes wrong by itself.
void print_smallest(const Linear& linear, const Wrong& wrong, const Setting& setting) {
  const int64_t unit = linear.job.w_format == MX_FP4 ? 2 : 1;
  for (int64_t k = 0; k < linear.job.k;) {
    k = min_of(k + (k < kBlock ? unit : kBlock), linear.job.k);
    Linear one = slice(linear, wrong.m, wrong.n, k);
    const Wrong again = try_product(one, setting);
    if (again.m < 0) continue;
    printf("  by itself, and cut to k %lld: %s\n", static_cast<long long>(k), again.text.c_str());
    return print_output(one, 0, 0);
  }
  printf("  right by itself, wrong in its place\n");
  print_output(linear, wrong.m, wrong.n);
}

void check_product(Linear& plain, const std::vector<Setting>& all, Group& group, const std::string& label) {
  MxLinear& job = plain.job;
  prepare(plain, 0xA5);
  now_running(label);
  run(job, kPlain);
  group.add_case();
  const std::vector<Expected> all_expected = expect(job);
  int64_t exact = 0;
  for (const Expected& each : all_expected) exact += each.one;
  const Memory expected = std::move(plain.out);
  for (const Setting& setting : all) {
    now_running(label + ", product, path " + setting.path + ", " + std::to_string(setting.threads) + " threads");
    prepare(plain, 0x5A);
    run(job, setting);
    const Wrong wrong = first_wrong(job, all_expected, job.out, expected.as());
    group.add_outputs(job.m * job.n, exact);
    if (wrong.m < 0) continue;
    const std::string where = "output (" + std::to_string(wrong.m) + ", " + std::to_string(wrong.n) + ") is ";
    if (group.failed(setting, where + wrong.text + "; " + label)) print_smallest(plain, wrong, setting);
  }
}

}  // namespace

bool fuzz(int64_t count, uint64_t seed, const std::string& only_path) {
  const std::vector<Setting> all = settings(only_path);
  Group encodes("fuzz encode"), decodes("fuzz decode"), products("fuzz products"), attentions("fuzz attention");
  Group int8_attentions("fuzz attention in INT8"), norms("fuzz rms_norm"), gelus("fuzz gelu");
  Group* const groups[] = {&encodes, &decodes, &products, &attentions, &int8_attentions, &norms, &gelus};
  for (int64_t i = 0; i < count; i++) {
    Random random(seed + static_cast<uint64_t>(i));
    const std::string label = "--fuzz 1 --seed " + std::to_string(seed + static_cast<uint64_t>(i));
    Memory::on_heap = random.one_in(2);
    const int64_t kind = random.below(10);
    if (kind < 3) {
      fuzz_encode(random, all, encodes, label);
    } else if (kind == 3) {
      fuzz_decode(random, all, decodes, label);
    } else if (kind == 4) {
      fuzz_attention(random, all, attentions, int8_attentions, label);
    } else if (kind == 5) {
      if (random.one_in(3))
        fuzz_gelu(random, all, gelus, label);
      else
        fuzz_rms_norm(random, all, norms, label);
    } else {
      Linear product = some_product(random);
      check_product(product, all, products, label);
    }
  }
  bool passed = true;
  for (const Group* group : groups) {
    group->print();
    passed &= group->failures() == 0;
  }
  return passed;
}

// Products that are cut into pieces. Tall ones: activations that are more than the driver holds at once, and rows that are
// more than one task. Wide ones: columns that are enough for tasks of several panels, and rows of which some, the first or
// the others, have scales too far apart for windows.
bool large(bool tall, bool wide, const std::string& only_path) {
  Group group("large products");
  Random random(1);
  struct Size {
    int format;
    int64_t m, n, k;
    bool dual;
    int64_t apart_from = 0, apart_to = 0;  // those rows
  };
  std::vector<Size> sizes;
  if (tall) sizes.insert(sizes.end(), {{MX_FP4, 3300, 3, 8704, false}, {MX_FP8, 1200, 2, 8192, false}});
  if (wide) sizes.insert(sizes.end(), {{MX_FP4, 43, 2117, 1058, true}, {MX_FP8, 43, 2117, 545, false},
                                        {MX_FP4, 75, 70, 1058, false, 0, 32}, {MX_FP4, 75, 70, 1058, true, 32, 75}});
  for (const Size& size : sizes) {
    Linear linear;
    MxLinear& job = linear.job;
    job.m = size.m, job.n = size.n, job.k = size.k;
    job.a_format = job.w_format = size.format;
    job.a_dual = size.dual;
    linear.a_codes = some_codes(random, size.format, job.m, job.k, false);
    linear.a_scale = some_scales(random, job.m, job.k, {126, 127, -1});
    for (int64_t i = size.apart_from * blocks_of(job.k); i < size.apart_to * blocks_of(job.k); i++)
      linear.a_scale.as()[i] = static_cast<uint8_t>(random.between(122, 132));
    linear.w_codes = some_codes(random, size.format, job.n, job.k, false);
    linear.w_scale = some_scales(random, job.n, job.k, {126, 127, -1});
    if (size.dual) {
      linear.a_outer = some_outer(random, job.m, job.k, false);
      linear.w_outer = some_outer(random, job.n, job.k, false);
    }
    check_product(linear, settings(only_path), group, size.m > 1000 ? "--tall" : "--wide");
  }
  group.print();
  return group.failures() == 0;
}

}  // namespace conformance
