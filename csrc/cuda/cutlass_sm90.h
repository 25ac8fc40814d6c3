// The Hopper GEMMs that are compiled, and what all of them demand. No CUTLASS header.
#pragma once

#include <cuda_runtime.h>

#include "gemm.h"
#include "gpu.h"

namespace fq::cuda::sm90 {

// tokens x features; see cutlass_sm90.cuh.
int mixed_256x128(const GemmInteger& args, void* stream);
int mixed_128x128(const GemmInteger& args, void* stream);
int mixed_64x64(const GemmInteger& args, void* stream);
int mixed_16x64(const GemmInteger& args, void* stream);
int bytes_256x128(const GemmInteger& args, void* stream);
int bytes_128x128(const GemmInteger& args, void* stream);

constexpr bool in_table(GemmKernel kernel, GemmTile tile, int32_t shared_bytes) {
  for (const GemmTileEntry& entry : kGemmTiles)
    if (entry.kernel == kernel && entry.tile.m == tile.m && entry.tile.n == tile.n &&
        entry.tile.k == tile.k && entry.tile.stages == tile.stages)
      return entry.shared_bytes == shared_bytes;
  return false;
}

// The error for arguments that no tile takes, or 0. shift: the sums are 2^shift acc. The dispatcher
// sees to all of this; but with a descriptor for the copy engine that is wrong, a kernel hangs.
inline int refuse(const GemmInteger& args, int shift) {
  if (current_gpu().arch != 90) return cudaErrorNoKernelImageForDevice;
  const auto misaligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 != 0;
  };
  if (misaligned(args.a) || misaligned(args.w) || misaligned(args.out) || misaligned(args.residual))
    return cudaErrorMisalignedAddress;
  constexpr int64_t kMost = 0x7fffff00;  // an int, also when rounded up to a tile
  if (args.a_zero != nullptr || args.out_dtype == Dtype::kFloat32 || args.k % 32 != 0 ||
      args.n % 8 != 0 || args.k < 1 || args.n < 1 || args.m < 1 || args.n > kMost || args.m > kMost)
    return cudaErrorNotSupported;
  if (args.k > (shift > 0 ? kMostScaledK : kMaxGemmK)) return cudaErrorNotSupported;
  return cudaSuccess;
}

}  // namespace fq::cuda::sm90
