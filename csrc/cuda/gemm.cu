// gemm_w4a4, gemm_w4a8, gemm_w8a8: ask the planner, launch what it says. The kernels: gemm.h. Here
// is only the one that widens packed activation codes for Hopper, whose tensor cores have no 4-bit
// type.
#include "gemm.h"

#include "gpu.h"
#include "launch.cuh"
#include "plan_gemm.h"

namespace fq::cuda {
namespace {

#ifdef FQ_CUTLASS
constexpr bool kHaveCutlass = true;
#else
constexpr bool kHaveCutlass = false;
#endif

constexpr int kWidenThreads = 256, kCodesPerThread = 16;

// Eight signed nibbles -> eight bytes in the same order.
__device__ __forceinline__ uint2 widened(uint32_t nibbles) {
  const auto extend = [](uint32_t codes) {  // 0x08 * 0x1e = 0xf0: no carry into the next byte
    return codes | (codes & 0x08080808u) * 0x1eu;
  };
  const uint32_t even = extend(nibbles & 0x0f0f0f0fu);
  const uint32_t odd = extend((nibbles >> 4) & 0x0f0f0f0fu);
  return uint2{__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362)};
}

// Bound by memory; the output stays in the L2 cache for the GEMM that follows.
__global__ void __launch_bounds__(kWidenThreads)
    widen_kernel(const uint2* packed, uint4* bytes, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWidenThreads + threadIdx.x;
  if (i >= count) return;
  const uint2 nibbles = packed[i];
  const uint2 first = widened(nibbles.x), second = widened(nibbles.y);
  bytes[i] = uint4{first.x, first.y, second.x, second.y};
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

GemmPlan plan_for(const GemmInteger& args, int a_bits, int w_bits) {
  GemmQuery query{};
  query.m = args.m, query.n = args.n, query.k = args.k;
  query.a_bits = a_bits, query.w_bits = w_bits;
  query.zero = args.a_zero != nullptr;
  query.residual = args.residual != nullptr;
  query.out = args.out_dtype;
  query.aligned = aligned(args.a) && aligned(args.w) && aligned(args.out) && aligned(args.residual);
  return plan_gemm(current_gpu(), query, kHaveCutlass);
}

int run(const GemmInteger& args, int a_bits, int w_bits, void* workspace, void* stream) {
  const GemmPlan plan = plan_for(args, a_bits, w_bits);
  GemmInteger task = args;
  if (plan.widen) {
    const int64_t count = args.m * args.k / kCodesPerThread;
    FQ_LAUNCH(widen_kernel, static_cast<unsigned>(ceil_div(count, kWidenThreads)), kWidenThreads, 0,
              stream, reinterpret_cast<const uint2*>(args.a), static_cast<uint4*>(workspace),
              count);
    const int error = static_cast<int>(cudaGetLastError());
    if (error != 0) return error;
    task.a = static_cast<const uint8_t*>(workspace);
  }
  switch (plan.kernel) {
    case GemmKernel::kMma:
      return gemm_mma(task, a_bits, w_bits, plan, stream);
    case GemmKernel::kStream:
      return gemm_stream(task, a_bits, w_bits, plan.stream, stream);
#ifdef FQ_CUTLASS
    case GemmKernel::kS4Sm8x:
      return gemm_s4_sm8x(task, plan.tile, stream);
    case GemmKernel::kS8S4Sm8x:
      return gemm_s8s4_sm8x(task, plan.tile, stream);
    case GemmKernel::kMixedSm90:
      return gemm_mixed_sm90(task, plan.tile, stream);
    case GemmKernel::kBytesSm90:
      return gemm_bytes_sm90(task, plan.tile, stream);
#endif
    default:
      return static_cast<int>(cudaErrorNoKernelImageForDevice);
  }
}

}  // namespace

int gemm_w4a4(const GemmInteger& args, void* workspace, void* stream) {
  return run(args, 4, 4, workspace, stream);
}

int gemm_w4a8(const GemmInteger& args, void* workspace, void* stream) {
  return run(args, 8, 4, workspace, stream);
}

int gemm_w8a8(const GemmInteger& args, void* workspace, void* stream) {
  return run(args, 8, 8, workspace, stream);
}

int64_t gemm_w4a4_workspace(const GemmInteger& args) {
  return plan_for(args, 4, 4).widen ? args.m * args.k : 0;
}

}  // namespace fq::cuda
