// ldmatrix; see ../../prelude.h.
#pragma once

#include "cutlass/array.h"
#include "cutlass/layout/matrix.h"
#include "emulated_ptx.h"

namespace cutlass::arch {

template <class Layout, int kMatrices>
void ldsm(Array<unsigned, kMatrices>& out, const void* shared) {
  uint32_t r[kMatrices];
  constexpr bool kTransposed = std::is_same_v<Layout, layout::ColumnMajor>;
  fq::emulated::ldmatrix<kMatrices, kTransposed>("ldsm", r, shared);
  for (int i = 0; i < kMatrices; ++i) out[i] = r[i];
}

unsigned cutlass_get_smem_pointer(const void* shared);  // of templates that nobody uses here

}  // namespace cutlass::arch
