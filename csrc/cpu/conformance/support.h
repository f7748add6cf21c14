// What replaying and fuzzing share: memory that ends where its contents end, jobs on it, runs of them, complaints.
#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../numerics.h"

namespace conformance {

using mxdit::kBlock;
using mxdit::kGroup;

// Bytes with an unreadable page right behind the last one; in a build with AddressSanitizer perhaps on the heap instead,
// where that sees an access in front of the first one too. (It does not see into masked vector loads, which the page does.)
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes, int fill = 0xA5);
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  // NULL where nothing was asked for, as the jobs want it; memory of no bytes has an address.
  template <class T = uint8_t>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }
  bool operator==(const Memory& other) const;

  static bool on_heap;  // whether the next ones are on the heap, where AddressSanitizer watches it

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

// A job and the memory that its pointers name: inputs first, then results, in the order of its struct.
struct Encode {
  MxEncode job = {};
  Memory x, mul_scale, codes, scale, outer;
};
struct Decode {
  MxDecode job = {};
  Memory codes, scale, outer, out;
};
struct Linear {
  MxLinear job = {};
  Memory x, mul_scale, a_codes, a_scale, a_outer, w_codes, w_scale, w_outer, bias, out;
};
struct Attend {
  MxAttention job = {};
  Memory q, k, v, mask, out;
};

// Point the job at its inputs, and at new memory for its results, filled with `fill`.
void prepare(Encode& encode, bool dual, int fill);
void prepare(Decode& decode, int fill);
void prepare(Linear& linear, int fill);
void prepare(Attend& attend, int fill);

size_t element_size(int dtype);
float element(const void* p, int dtype, int64_t i);  // widened
bool same_element(const void* a, const void* b, int dtype, int64_t i);  // bit for bit, any NaN for another

// What runs now, for the message of a crash.
void now_running(const std::string& what);
void report_crashes();
#ifdef MXDIT_EMULATE_TILES
void emulate_tiles();  // from now on; after report_crashes
#endif

// One run on a path, with `threads`. With three, the calling thread flushes subnormals and rounds toward zero, which
// must neither matter nor change.
struct Setting {
  std::string path;
  int threads;
};
std::vector<Setting> settings(const std::string& only_path);
void run(const MxEncode& job, const Setting& setting);
void run(const MxDecode& job, const Setting& setting);
void run(const MxLinear& job, const Setting& setting);
void run(const MxAttention& job, const Setting& setting);
void run(const MxRmsNorm& job, const Setting& setting);
void run(const MxGelu& job, const Setting& setting);

// Counts for one line of the report.
class Group {
 public:
  explicit Group(std::string name) : name_(std::move(name)) {}
  void add_case() { cases_++; }
  void add_outputs(int64_t outputs, int64_t exact) { outputs_ += outputs, exact_ += exact; }
  // Counts a failure and says whether it is one of the first, which are worth printing; prints the heading then.
  bool failed(const Setting& setting, const std::string& what);
  void print() const;
  int64_t failures() const { return failures_; }

 private:
  std::string name_;
  int64_t cases_ = 0, outputs_ = 0, exact_ = 0, failures_ = 0;
};

// Prints the block or group of an encoding whose results differ, or the operands of one output of a product.
void print_difference(const Encode& got, const Encode& expected);
void print_difference(const Decode& got, const void* expected);
void print_output(const Linear& linear, int64_t m, int64_t n);
void print_hex(const char* name, const void* data, size_t bytes, size_t group);

bool replay(const std::string& file, const std::string& only_path);
bool fuzz(int64_t count, uint64_t seed, const std::string& only_path);
bool large(bool tall, bool wide, const std::string& only_path);

}  // namespace conformance
