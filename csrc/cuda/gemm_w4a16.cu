// gemm_w4a16: which kernel, with what plan (plan_w4a16.h); and the kernel for what tensor cores
// cannot do: float32, groups that are no multiple of 32.
//
// There a warp makes one output feature of up to kTokens tokens; its lanes share k. Per output,
// lane l takes the codes k = l, l + 32, ...:  sum = fma(x, code * scale, sum) over 32 of them,
// ascending, from 0; lane = lane + sum; the lanes' sums meet in a tree. The same for every token in
// every batch. Bound by arithmetic.
#include "gemm_w4a16.h"

#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {
namespace {

constexpr int kWarps = 8, kTokens = 4;
constexpr unsigned kMostTokenTiles = 32768;  // of a grid in y; the kernel goes on to further ones

__device__ __forceinline__ float code_of(const uint8_t* row, int k, int bits) {
  return static_cast<float>(bits == 2 ? signed_crumb(row[k / 4], k) : signed_nibble(row[k / 2], k));
}

__global__ void __launch_bounds__(kWarps* kWarp)
    w4a16_general_kernel(const GemmW4A16 args, int group, int row_bytes) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (n >= args.n) return;
  const uint8_t* const w = args.w + n * row_bytes;
  const float* const scales = args.w_scale + n * args.groups;
  const int k = static_cast<int>(args.k);
  for (int64_t token0 = static_cast<int64_t>(blockIdx.y) * kTokens; token0 < args.m;
       token0 += static_cast<int64_t>(gridDim.y) * kTokens) {
    float totals[kTokens] = {};
#pragma unroll 1
    for (int begin = 0; begin < k; begin += kWarp * kWarp) {
      float sums[kTokens] = {};
      const int end = k - begin < kWarp * kWarp ? k : begin + kWarp * kWarp;
#pragma unroll 1
      for (int at = begin + lane; at < end; at += kWarp) {
        const float weight = code_of(w, at, args.bits) * scales[at / group];
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          if (token0 + i < args.m)
            sums[i] = fma(load(args.x, args.dtype, (token0 + i) * args.k + at), weight, sums[i]);
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) totals[i] = totals[i] + sums[i];
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float total = warp_sum(totals[i]);
      if (lane != 0 || token0 + i >= args.m) continue;
      if (args.bias) total = total + load(args.bias, args.bias_dtype, n);
      store(args.out, args.dtype, (token0 + i) * args.n + n, total);
    }
  }
}

int general(const GemmW4A16& args, void* stream) {
  const int64_t tiles = ceil_div(args.m, kTokens);
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kWarps)),
                  tiles < kMostTokenTiles ? static_cast<unsigned>(tiles) : kMostTokenTiles);
  FQ_LAUNCH(w4a16_general_kernel, grid, kWarps * kWarp, 0, stream, args,
            static_cast<int>(args.k / args.groups),
            static_cast<int>(packed_bytes(args.k, args.bits)));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

W16Query query_of(const GemmW4A16& args) {
  return {args.m, args.n, args.k, args.groups, args.bits, args.dtype};
}

int gemm_w4a16(const GemmW4A16& args, void* /*workspace*/, void* stream) {
  const W16Plan plan = plan_w4a16(current_gpu(), query_of(args));
  if (plan.kernel == W16Kernel::kNone) return static_cast<int>(cudaErrorNoKernelImageForDevice);
  if (plan.kernel == W16Kernel::kGeneral) return general(args, stream);
  return args.dtype == Dtype::kBFloat16 ? gemm_w4a16_bf16(args, plan, stream)
                                        : gemm_w4a16_fp16(args, plan, stream);
}

}  // namespace fq::cuda
