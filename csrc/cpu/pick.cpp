// The choice of an instruction set, made once. See pick.h.
#include "pick.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace fq::cpu {
namespace {

#if defined(__x86_64__)
// AMX (CPUID leaf 7, EDX: tiles 24, int8 25, bf16 22), and leave from the kernel to use its 8 KB of
// registers, which is given to the process and its children.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") && has_amx() ? Isa::kAmx : Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa lower(Isa a, Isa b) { return a < b ? a : b; }

Isa wanted() {
  const char* name = std::getenv("FLATQUANT_CPU_ISA");
  if (name == nullptr) return machine();
  for (Isa choice : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx})
    if (std::strcmp(name, isa_name(choice)) == 0) return lower(choice, machine());
  return machine();  // an unknown name changes nothing; build_info says so
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{wanted()};
  return isa;
}

int64_t machine_l2_cache_bytes() {
  constexpr int64_t kGuess = int64_t{1} << 20, kLeast = int64_t{1} << 18, kMost = int64_t{1} << 22;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes >= kLeast) return bytes < kMost ? bytes : kMost;
#endif
  return kGuess;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  return isa == Isa::kAmx      ? "amx"
         : isa == Isa::kAvx512 ? "avx512"
         : isa == Isa::kAvx2   ? "avx2"
                               : "portable";
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = machine_l2_cache_bytes();
  return bytes;
}

Isa force_isa(Isa isa) {
  current().store(lower(isa, machine()), std::memory_order_relaxed);
  return cpu::isa();
}

}  // namespace fq::cpu
