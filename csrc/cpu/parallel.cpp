#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#ifdef MXDIT_X86
#include <immintrin.h>
#endif

namespace mxdit {
namespace {

// GCC's OpenMP entry point, which LLVM's and Intel's runtimes offer too. torch brings one of them into the process;
// linking one ourselves would start a second team whose idle threads spin on the cores that the first one needs.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A child process has none of its parent's OpenMP threads, and would wait for them.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Team host_team() {
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : team;
}

class IeeeFloats {
 public:
#ifdef MXDIT_X86
  IeeeFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~IeeeFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(MXDIT_ARM)
  IeeeFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(0UL));
  }
  ~IeeeFloats() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long saved_;
#endif
};

struct Call {
  void (*body)(void*);
  void* data;
};

void guarded(void* call) {
  const IeeeFloats guard;
  static_cast<Call*>(call)->body(static_cast<Call*>(call)->data);
}

}  // namespace

void parallel(int threads, void (*body)(void*), void* data) {
  Call call{body, data};
  if (threads <= 1) return guarded(&call);
  if (const Team team = host_team()) return team(guarded, &call, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; i++) others.emplace_back(guarded, &call);
  } catch (const std::exception&) {
    // No more threads to be had, or no memory for them: those there are do all of it.
  }
  guarded(&call);
  for (std::thread& other : others) other.join();
}

}  // namespace mxdit
