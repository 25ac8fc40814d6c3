// What every kernel file needs: launches and shared memory behind macros, so that the same sources
// also run on the host (-DFQ_EMULATED: tests/emulated/emulator.h), and reductions over a block.
//
// Rules that make that possible: blocks are whole warps; warp operations are for all 32 lanes; PTX
// is in ptx.cuh only; alignment is written `__shared__ __align__(16) int x[4]`.
#pragma once

#include <cstdint>

#ifdef FQ_EMULATED
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include "gpu.h"

// A kernel template with several arguments is put in parentheses: a macro splits at commas.
#define FQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Blocks in clusters of `cluster` along x, which must divide the grid (sm_90).
#define FQ_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::fq::cuda::launch_cluster(kernel, grid, block, cluster, shared_bytes,           \
                             static_cast<cudaStream_t>(stream), __VA_ARGS__)

// The same, and on sm_90 the kernel may begin while the one before it in the stream still runs: it
// calls wait_for_earlier_kernels() (ptx.cuh) before it touches what that one writes or reads. A
// cluster of 1 is none.
#define FQ_LAUNCH_EARLY(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::fq::cuda::launch_early(kernel, grid, block, cluster, shared_bytes,           \
                           static_cast<cudaStream_t>(stream), __VA_ARGS__)

// In a kernel: the shared memory whose size the launch gives, as `type*`, aligned to 128 bytes.
#define FQ_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char fq_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fq_dynamic_shared)

namespace fq::cuda {

template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                    size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = block;
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &size;
  launch.numAttrs = 1;
  cudaLaunchKernelEx(&launch, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                  size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = block;
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = attributes;
  // Only code for sm_90 waits: PTX for others, on newer cards too, must not begin early.
  if (current_gpu().arch == 90) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchKernelEx(&launch, kernel, static_cast<Parameters>(arguments)...);
}

// Before a launch with more than 48 KiB: lets the kernel have so many bytes of dynamic shared
// memory. A cudaError_t, which the next cudaGetLastError() does not report again.
template <class... Parameters>
int allow_shared(void (*kernel)(Parameters...), int bytes) {
  if (bytes <= 48 * 1024) return 0;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<int>(error);
}

}  // namespace fq::cuda

#endif  // FQ_EMULATED

namespace fq::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- over a warp; every lane gets the answer ---------------------------------------------------

static __device__ __forceinline__ int32_t warp_max(int32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}

static __device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}

// In a fixed order, the same in every lane: additions commute.
static __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// ---- over a block of kThreads; every thread gets the answer ------------------------------------

// In a fixed order. shared: kThreads / kWarp floats that nobody else uses until the block's next
// barrier.
template <int kThreads>
static __device__ __forceinline__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value += shared[warp];
  return value;
}

}  // namespace fq::cuda
