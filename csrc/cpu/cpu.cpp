#include "cpu.h"

#if defined(MXDIT_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(MXDIT_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(MXDIT_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mxdit {

#if defined(MXDIT_X86)

// __builtin_cpu_supports asks the operating system too: whether it saves the registers.
bool cpu_runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool cpu_runs_avx512vnni() {
  return cpu_runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool cpu_runs_avx512bf16() {
  return cpu_runs_avx512vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

bool cpu_runs_amx() {
#if defined(MXDIT_EMULATE_TILES)
  return cpu_runs_avx512bf16();
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!cpu_runs_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d & (1u << 24), bf16 = d & (1u << 22), int8 = d & (1u << 25);
  if (!tiles || !bf16 || !int8) return false;
  // Linux hands out the 8 KB of tile state on request only, once per process (Documentation/arch/x86/xstate.rst).
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#elif defined(MXDIT_ARM)

bool cpu_runs_neon() {
#if defined(__linux__)
  constexpr unsigned long dot_products = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & dot_products;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

#endif

}  // namespace mxdit
