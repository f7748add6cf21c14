// Random numbers for jobs, and what makes some.
#pragma once
#include "support.h"

namespace conformance {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u) {}

  uint64_t bits() {  // SplitMix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }  // both included
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T, size_t N>
  T of(const T (&choices)[N]) {
    return choices[below(N)];
  }
  float uniform() { return static_cast<float>(static_cast<double>(bits() >> 11) * 0x1p-53); }
  float bell() { return uniform() + uniform() + uniform() + uniform() - uniform() - uniform() - uniform() - uniform(); }

 private:
  uint64_t state_;
};

inline void fill_random(Random& random, Memory& memory) {
  for (size_t i = 0; i < memory.size(); i++) memory.as()[i] = static_cast<uint8_t>(random.bits() >> 56);
}

// A random attention on every path and number of threads, of either method; fuzz_attention.cpp.
void fuzz_attention(Random& random, const std::vector<Setting>& all, Group& exact, Group& int8, const std::string& label);

// A random norm, with rotary embedding or without, or GELU, against path scalar; fuzz_rowwise.cpp.
void fuzz_rms_norm(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label);
void fuzz_gelu(Random& random, const std::vector<Setting>& all, Group& group, const std::string& label);

}  // namespace conformance
