// The choice of an instruction set, made once. See pick.h.
#include "pick.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fq::cpu {
namespace {

Isa machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa lower(Isa a, Isa b) { return a < b ? a : b; }

Isa wanted() {
  const char* name = std::getenv("FLATQUANT_CPU_ISA");
  if (name == nullptr) return machine();
  for (Isa choice : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (std::strcmp(name, isa_name(choice)) == 0) return lower(choice, machine());
  return machine();  // an unknown name changes nothing; build_info says so
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{wanted()};
  return isa;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

Isa force_isa(Isa isa) {
  current().store(lower(isa, machine()), std::memory_order_relaxed);
  return cpu::isa();
}

}  // namespace fq::cpu
