// What every kernel file needs: the launch, behind one macro so that the same sources can also be
// run on the host (tests/emulated), and reductions over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef FQ_LAUNCH
#define FQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace fq::cuda {

constexpr int kWarp = 32;

static __device__ __forceinline__ int32_t warp_max(int32_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The maximum over a block of kThreads, known to all its threads. shared: kThreads / kWarp words
// that nobody else uses until the block's next barrier.
template <int kThreads>
static __device__ __forceinline__ int32_t block_max(int32_t value, int32_t* shared) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp)
    value = shared[warp] > value ? shared[warp] : value;
  return value;
}

}  // namespace fq::cuda
