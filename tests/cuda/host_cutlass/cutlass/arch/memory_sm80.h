// cp.async; see ../../prelude.h.
#pragma once

#include "cutlass/arch/cache_operation.h"
#include "cutlass/arch/memory.h"
#include "cutlass/arch/memory_sm75.h"
#include "cutlass/complex.h"
#include "cutlass/cutlass.h"

namespace cutlass::arch {

template <int kBytes, CacheOperation::Kind kCache = CacheOperation::Always>
struct cp_async {
  cp_async(void* shared, const void* global, bool guard = true) {
    if (guard) fq::emulated::copy_async(shared, global, kBytes, kBytes);
  }
};

// Zeros where the guard is false.
template <int kBytes, CacheOperation::Kind kCache = CacheOperation::Always>
struct cp_async_zfill {
  cp_async_zfill(void* shared, const void* global, bool guard = true) {
    // Nothing is read then, and the address may be any.
    fq::emulated::copy_async(shared, guard ? global : shared, kBytes, guard ? kBytes : 0);
  }
};

inline void cp_async_fence() { fq::emulated::copy_async_commit(); }

template <int kPending>
void cp_async_wait() {
  fq::emulated::copy_async_wait(kPending);
}

}  // namespace cutlass::arch
