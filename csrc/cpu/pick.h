// Which instruction set a CPU kernel runs on: the best one this machine has (and its operating
// system has enabled), or a lower one named by FLATQUANT_CPU_ISA = portable | avx2 | avx512 | amx.
// Results are the same on all of them, bit for bit; only the time differs.
//
// A kernel has one table entry per variant, for example
//   using Kernel = void (*)(const Args&, int64_t, int64_t);
//   Kernel const kernel = pick<Kernel>(portable, nullptr, gemm_avx512);   // a null variant falls
//   back to the next lower one
#pragma once

#include <cstdint>

namespace fq::cpu {

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// avx2 means AVX2 + FMA; avx512 means F, BW, DQ, VL and VNNI; amx means tiles, int8 and bf16 as
// well, and leave from the system to use them.
Isa isa();  // what kernels run on now: read once from the machine and the environment
const char* isa_name(Isa isa);  // "portable", "avx2", "avx512", "amx"

// Lowers the choice for tests (never raises it above the machine's); returns what is now in force.
Isa force_isa(Isa isa);

// Bytes of the level 2 cache of a core; a guess if the system does not tell.
int64_t l2_cache_bytes();

template <class Kernel>
Kernel pick(Kernel portable, Kernel avx2, Kernel avx512, Kernel amx = nullptr) {
  const Isa best = isa();
  if (best >= Isa::kAmx && amx) return amx;
  if (best >= Isa::kAvx512 && avx512) return avx512;
  if (best >= Isa::kAvx2 && avx2) return avx2;
  return portable;
}

}  // namespace fq::cpu
