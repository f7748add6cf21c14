#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

#ifdef MXDIT_X86
#include <immintrin.h>
#endif

namespace mxdit {
namespace {

// GCC's OpenMP entry point, which LLVM's and Intel's runtimes offer too. torch brings one of them into the process;
// linking one ourselves would start a second team whose idle threads spin on the cores that the first one needs.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

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

void relax() {
#ifdef MXDIT_X86
  _mm_pause();
#elif defined(MXDIT_ARM)
  asm volatile("yield");
#endif
}

// -- whether sharing a call pays ----------------------------------------------------------------------------------------

int64_t now() {  // nanoseconds
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// What other threads took over, against what the calling one then waited for them. On cores that other programs use, a
// thread gets its turn milliseconds late, and a short call that waits for it takes ten to a hundred times as long.
// Callers on several threads may lose each other's entries, which does no harm.
class Account {
 public:
  bool open(int64_t time) const { return time >= closed_until_.load(std::memory_order_relaxed); }

  void enter(int64_t saved, int64_t waited) {
    const int64_t balance = std::min(kCredit, balance_.load(std::memory_order_relaxed) + saved - waited);
    balance_.store(std::max<int64_t>(balance, 0), std::memory_order_relaxed);
    if (balance < 0) closed_until_.store(now() + std::min(kRest * waited, kLongestRest), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kCredit = 10000000;  // nanoseconds: what other programs may take now and then, from calls that pay
  static constexpr int64_t kLongestRest = 10'000'000'000;  // ns: a process that was stopped waited for as long as it was
  static constexpr int64_t kRest = 32;          // times the last wait: so trying again costs one part in so many
  std::atomic<int64_t> balance_{kCredit}, closed_until_{0};
};

// -- threads of our own -------------------------------------------------------------------------------------------------

struct Call {
  void (*body)(void*);
  void* data;
};

void guarded(void* call) {
  const IeeeFloats guard;
  static_cast<Call*>(call)->body(static_cast<Call*>(call)->data);
}

// They sleep between calls. A call waits only for those that are at work on it, where a team waits for all its threads:
// what a thread does not come to, because another program has its core, the calling thread does.
class Pool {
 public:
  void run(int threads, Call* call) {
    if (!account_.open(now()) || busy_.exchange(true)) return guarded(call);  // busy: with another thread's call
    start(threads - 1);
    const uint32_t wanted = static_cast<uint32_t>(std::min(threads - 1, started_));
    call_ = call;
    const int64_t begin = now();
    state_ = wanted * kTicket;
    state_.notify_all();
    guarded(call);
    const int64_t end = now();
    const uint32_t before = state_.fetch_and(kTicket - 1);  // no one else begins
    wait();
    account_.enter((end - begin) * (wanted - before / kTicket), now() - end);
    busy_ = false;
  }

  // In a child process, where none of its threads are.
  void forget() {
    started_ = 0;
    state_ = 0;
    busy_ = false;
  }

 private:
  static constexpr uint32_t kTicket = 1 << 16;  // state_: threads that may begin, times this, and those at work
  static constexpr int kSpins = 2000;           // before sleeping: 0.05 to 0.15 ms, some times what waking takes

  void start(int wanted) {
    try {
      for (; started_ < wanted; started_++) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads to be had, or no memory for them: those there are do all of it.
    }
  }

  void wait() {
    for (int i = 0; i < kSpins && state_; i++) relax();
    while (state_) {
      const uint32_t seen = finished_;
      if (state_) finished_.wait(seen);
    }
  }

  [[noreturn]] void serve() {
    for (;;) {
      uint32_t state = state_;
      for (int i = 0; i < kSpins && state < kTicket; i++, state = state_) relax();
      for (; state < kTicket; state = state_) state_.wait(state);
      if (!state_.compare_exchange_strong(state, state - kTicket + 1)) continue;
      guarded(call_);
      if (state_.fetch_sub(1) == 1) {  // the last one
        finished_++;
        finished_.notify_one();
      }
    }
  }

  Account account_;
  std::atomic<bool> busy_{false};
  std::atomic<uint32_t> state_{0}, finished_{0};
  int started_ = 0;       // this and call_ belong to who made it busy
  Call* call_ = nullptr;  // for those that took a ticket
};

Pool pool;

// A child process has none of its parent's threads, and would wait for those of OpenMP.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  pool.forget();
});

// -- the host's threads -------------------------------------------------------------------------------------------------

Team host_team() {
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : team;
}

Account team_account;

struct TeamCall {
  Call call;
  pthread_t caller;
  int64_t end;  // of the caller's part
};

void timed(void* data) {
  TeamCall& own = *static_cast<TeamCall*>(data);
  guarded(&own.call);
  if (pthread_equal(pthread_self(), own.caller)) own.end = now();
}

}  // namespace

void parallel(int threads, void (*body)(void*), void* data) {
  Call call{body, data};
  if (threads <= 1) return guarded(&call);
  const Team team = host_team();
  const int64_t begin = now();
  if (!team || !team_account.open(begin)) return pool.run(threads, &call);
  TeamCall shared{call, pthread_self(), begin};
  team(timed, &shared, static_cast<unsigned>(threads), 0);
  team_account.enter((shared.end - begin) * (threads - 1), now() - shared.end);
}

}  // namespace mxdit
