#include "support.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef MXDIT_X86
#include <xmmintrin.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__  // as GCC says it
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

namespace conformance {

using namespace mxdit;

// -- memory -----------------------------------------------------------------------------------------------------------

bool Memory::on_heap = false;

Memory::Memory(size_t bytes, int fill) : size_(bytes) {
  if (kSanitized && on_heap) {
    data_ = static_cast<uint8_t*>(malloc(bytes));
  } else {
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t readable = (bytes + page - 1) / page * page;
    mapped_ = readable + page;
    void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(static_cast<uint8_t*>(all) + readable, page, PROT_NONE) != 0) {
      perror("mmap");
      exit(2);
    }
    data_ = static_cast<uint8_t*>(all) + readable - bytes;
  }
  memset(data_, fill, bytes);
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

Memory::~Memory() {
  if (!mapped_)
    free(data_);
  else
    munmap(data_ + size_ - (mapped_ - static_cast<size_t>(sysconf(_SC_PAGESIZE))), mapped_);
}

bool Memory::operator==(const Memory& other) const {
  return size_ == other.size_ && (size_ == 0 || memcmp(data_, other.data_, size_) == 0);
}

// -- jobs ---------------------------------------------------------------------------------------------------------------

void prepare(Encode& encode, bool dual, int fill) {
  MxEncode& job = encode.job;
  const auto bytes = [&](int64_t each) { return static_cast<size_t>(job.rows * each); };
  encode.codes = Memory(bytes(code_bytes(job.format, job.k)), fill);
  encode.scale = Memory(bytes(blocks_of(job.k)), fill);
  encode.outer = dual ? Memory(bytes(groups_of(job.k) * 4), fill) : Memory();
  job.x = encode.x.as();
  job.mul_scale = encode.mul_scale.as<float>();
  job.codes = encode.codes.as();
  job.scale = encode.scale.as();
  job.outer = encode.outer.as<float>();
}

void prepare(Decode& decode, int fill) {
  MxDecode& job = decode.job;
  decode.out = Memory(static_cast<size_t>(job.rows * job.k) * element_size(job.out_dtype), fill);
  job.codes = decode.codes.as();
  job.scale = decode.scale.as();
  job.outer = decode.outer.as<float>();
  job.out = decode.out.as();
}

void prepare(Linear& linear, int fill) {
  MxLinear& job = linear.job;
  linear.out = Memory(static_cast<size_t>(job.m * job.n) * element_size(job.out_dtype), fill);
  job.x = linear.x.as();
  job.mul_scale = linear.mul_scale.as<float>();
  job.a_codes = linear.a_codes.as();
  job.a_scale = linear.a_scale.as();
  job.a_outer = linear.a_outer.as<float>();
  job.w_codes = linear.w_codes.as();
  job.w_scale = linear.w_scale.as();
  job.w_outer = linear.w_outer.as<float>();
  job.bias = linear.bias.as();
  job.out = linear.out.as();
}

void prepare(Attend& attend, int fill) {
  MxAttention& job = attend.job;
  attend.out = Memory(static_cast<size_t>(job.batch * job.queries * job.heads * job.v_width) * element_size(job.dtype), fill);
  job.q = attend.q.as();
  job.k = attend.k.as();
  job.v = attend.v.as();
  job.mask = attend.mask.as();
  job.out = attend.out.as();
}

size_t element_size(int dtype) { return dtype == MX_FP32 ? 4 : 2; }

float element(const void* p, int dtype, int64_t i) {
  float value = 0;
  with_dtype(dtype, [&]<class T>(const T*) { value = widen(static_cast<const T*>(p)[i]); });
  return value;
}

bool same_element(const void* a, const void* b, int dtype, int64_t i) {
  const float x = element(a, dtype, i), y = element(b, dtype, i);
  return bits_of(x) == bits_of(y) || (x != x && y != y);
}

// -- runs -----------------------------------------------------------------------------------------------------------------

namespace {

char running[512];

// Only what a signal handler may call.
void say_what_runs() {
  const char text[] = "\nwhile running: ";
  if (write(2, text, sizeof text - 1) < 0 || write(2, running, strlen(running)) < 0 || write(2, "\n", 1) < 0) return;
}

struct sigaction previous[64];

void on_signal(int number) {
  say_what_runs();
  sigaction(number, &previous[number], nullptr);  // the instruction runs again, and meets who was there before
}

class HostileFloats {
 public:
  explicit HostileFloats(bool hostile) : before_(get()) {
    if (hostile) set(kHostile);
    during_ = get();
  }
  ~HostileFloats() {
    const bool changed = (get() & kControls) != (during_ & kControls);
    set(before_);
    if (changed) {
      printf("FAILED: the floating point state of the caller has changed while running: %s\n", running);
      exit(1);
    }
  }

 private:
#ifdef MXDIT_X86
  static constexpr unsigned kHostile = 0x1F80u | 0x8040u | 0x6000u, kControls = ~0x3Fu;
  static unsigned get() { return _mm_getcsr(); }
  static void set(unsigned value) { _mm_setcsr(value); }
  unsigned before_, during_;
#elif defined(MXDIT_ARM)
  static constexpr unsigned long kHostile = 1ul << 24 | 3ul << 22, kControls = ~0ul;
  static unsigned long get() {
    unsigned long value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(unsigned long value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
  unsigned long before_, during_;
#else
  static constexpr int kHostile = 0, kControls = 0;
  static int get() { return 0; }
  static void set(int) {}
  int before_, during_;
#endif
};

template <class Call>
void run_any(const Setting& setting, Call call) {
  if (mx_select(setting.path.c_str()) != 0 || setting.path != mx_selected()) {
    printf("FAILED: %s cannot be selected\n", setting.path.c_str());
    exit(1);
  }
  const HostileFloats floats(setting.threads > 1);
  call(setting.threads);
}

}  // namespace

void now_running(const std::string& what) { snprintf(running, sizeof running, "%s", what.c_str()); }

void report_crashes() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  struct sigaction action = {};
  action.sa_handler = on_signal;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) sigaction(number, &action, &previous[number]);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(say_what_runs);
#endif
}

std::vector<Setting> settings(const std::string& only_path) {
  std::vector<Setting> found;
  const std::string names = std::string(mx_paths()) + " ";
  for (size_t start = 0, end; (end = names.find(' ', start)) != std::string::npos; start = end + 1) {
    const std::string path = names.substr(start, end - start);
    if (only_path.empty() || path == only_path)
      for (int threads : {1, 3}) found.push_back({path, threads});
  }
  return found;
}

void run(const MxEncode& job, const Setting& setting) {
  run_any(setting, [&](int threads) { mx_encode(&job, threads); });
}
void run(const MxDecode& job, const Setting& setting) {
  run_any(setting, [&](int threads) { mx_decode(&job, threads); });
}
void run(const MxLinear& job, const Setting& setting) {
  run_any(setting, [&](int threads) {
    if (mx_linear(&job, threads) == 0) return;
    printf("FAILED: no memory while running: %s\n", running);
    exit(1);
  });
}
void run(const MxAttention& job, const Setting& setting) {
  run_any(setting, [&](int threads) {
    if (mx_attention(&job, threads) == 0) return;
    printf("FAILED: no memory while running: %s\n", running);
    exit(1);
  });
}
void run(const MxRmsNorm& job, const Setting& setting) {
  run_any(setting, [&](int threads) { mx_rms_norm(&job, threads); });
}
void run(const MxGelu& job, const Setting& setting) {
  run_any(setting, [&](int threads) { mx_gelu(&job, threads); });
}

// -- the report -------------------------------------------------------------------------------------------------------------

bool Group::failed(const Setting& setting, const std::string& what) {
  constexpr int64_t kPrinted = 3;
  if (++failures_ > kPrinted) return false;
  printf("FAILED %s, path %s, %d thread%s: %s\n", name_.c_str(), setting.path.c_str(), setting.threads,
         setting.threads == 1 ? "" : "s", what.c_str());
  return true;
}

void Group::print() const {
  printf("%-24s %7lld cases", name_.c_str(), static_cast<long long>(cases_));
  if (outputs_)
    printf(", %9lld results of which %9lld bit for bit", static_cast<long long>(outputs_), static_cast<long long>(exact_));
  if (failures_)
    printf("  %lld FAILURES\n", static_cast<long long>(failures_));
  else
    printf("  ok\n");
}

void print_hex(const char* name, const void* data, size_t bytes, size_t group) {
  if (!data) return;
  printf("  %s:", name);
  for (size_t i = 0; i < bytes; i += group) {
    printf(" ");
    for (size_t j = group; j-- > 0;) printf("%02x", static_cast<const uint8_t*>(data)[i + j]);  // as one number
  }
  printf("\n");
}

void print_difference(const Encode& got, const Encode& expected) {
  const MxEncode& job = got.job;
  const int64_t width = job.outer ? kGroup : kBlock, pieces = (job.k + width - 1) / width;
  const size_t size = element_size(job.x_dtype);
  for (int64_t row = 0; row < job.rows; row++)
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t k = piece * width, n = min_of(width, job.k - k);
      const size_t codes = static_cast<size_t>(row * code_bytes(job.format, job.k) + code_bytes(job.format, k));
      const size_t scale = static_cast<size_t>(row * blocks_of(job.k) + k / kBlock);
      const size_t outer = static_cast<size_t>(row * pieces + piece) * 4;
      const size_t code_count = static_cast<size_t>(code_bytes(job.format, n)), scale_count = static_cast<size_t>(blocks_of(n));
      const auto differ = [](const Memory& a, const Memory& b, size_t at, size_t count) {
        return a.as() && memcmp(a.as() + at, b.as() + at, count) != 0;
      };
      if (!differ(got.codes, expected.codes, codes, code_count) && !differ(got.scale, expected.scale, scale, scale_count) &&
          !differ(got.outer, expected.outer, outer, 4))
        continue;
      printf("  row %lld, k %lld to %lld of %lld; dtype %d format %d rule %d round %d\n", static_cast<long long>(row),
             static_cast<long long>(k), static_cast<long long>(k + n), static_cast<long long>(job.k), job.x_dtype,
             job.format, job.rule, job.round);
      print_hex("x", got.x.as() + static_cast<size_t>(row * job.x_stride + k) * size, static_cast<size_t>(n) * size, size);
      if (job.mul_scale) print_hex("mul_scale", job.mul_scale + k, static_cast<size_t>(n) * 4, 4);
      for (const Encode* side : {&got, &expected}) {
        printf(" %s\n", side == &got ? "got" : "expected");
        print_hex("codes", side->codes.as() + codes, code_count, 1);
        print_hex("scale", side->scale.as() + scale, scale_count, 1);
        if (job.outer) print_hex("outer", side->outer.as() + outer, 4, 4);
      }
      return;
    }
}

void print_difference(const Decode& got, const void* expected) {
  const MxDecode& job = got.job;
  for (int64_t i = 0; i < job.rows * job.k; i++) {
    if (same_element(job.out, expected, job.out_dtype, i)) continue;
    const int64_t row = i / job.k, k = i % job.k;
    const uint8_t code = job.codes[row * code_bytes(job.format, job.k) + code_bytes(job.format, k)];
    printf("  row %lld, k %lld of %lld; dtype %d format %d: code byte %02x, scale %02x", static_cast<long long>(row),
           static_cast<long long>(k), static_cast<long long>(job.k), job.out_dtype, job.format, code,
           job.scale[row * blocks_of(job.k) + k / kBlock]);
    if (job.outer) printf(", outer %08x", bits_of(job.outer[row * groups_of(job.k) + k / kGroup]));
    printf(": got %a, expected %a\n", static_cast<double>(element(job.out, job.out_dtype, i)),
           static_cast<double>(element(expected, job.out_dtype, i)));
    return;
  }
}

void print_output(const Linear& linear, int64_t m, int64_t n) {
  const MxLinear& job = linear.job;
  printf("  m %lld n %lld k %lld, output (%lld, %lld); x dtype %d stride %lld, formats %d x %d, rule %d, dual %d, out dtype "
         "%d\n",
         static_cast<long long>(job.m), static_cast<long long>(job.n), static_cast<long long>(job.k),
         static_cast<long long>(m), static_cast<long long>(n), job.x_dtype, static_cast<long long>(job.x_stride),
         job.a_format, job.w_format, job.rule, job.a_dual, job.out_dtype);
  const size_t k = static_cast<size_t>(job.k), size = element_size(job.x_dtype);
  const size_t blocks = static_cast<size_t>(blocks_of(job.k)), groups = static_cast<size_t>(groups_of(job.k)) * 4;
  const size_t a_codes = static_cast<size_t>(code_bytes(job.a_format, job.k));
  const size_t w_codes = static_cast<size_t>(code_bytes(job.w_format, job.k));
  const auto row = [](const Memory& memory, int64_t index, size_t bytes) {
    return memory.as() ? memory.as() + static_cast<size_t>(index) * bytes : nullptr;
  };
  print_hex("x", row(linear.x, m * job.x_stride, size), k * size, size);
  print_hex("mul_scale", linear.mul_scale.as(), k * 4, 4);
  print_hex("a codes", row(linear.a_codes, m, a_codes), a_codes, 1);
  print_hex("a scale", row(linear.a_scale, m, blocks), blocks, 1);
  print_hex("a outer", row(linear.a_outer, m, groups), groups, 4);
  print_hex("w codes", row(linear.w_codes, n, w_codes), w_codes, 1);
  print_hex("w scale", row(linear.w_scale, n, blocks), blocks, 1);
  print_hex("w outer", row(linear.w_outer, n, groups), groups, 4);
  const size_t bias = element_size(job.bias_dtype);
  print_hex("bias", row(linear.bias, n, bias), bias, bias);
}

}  // namespace conformance
