// quantize_activation: x [rows, k] -> codes, scale, zero per row. Arithmetic: ../contract.h.
//
// One block per row, two passes over it: the range (the row comes from memory), then the codes (it
// comes from the caches). Bound by memory, on every architecture. A thread makes whole bytes, so no
// two threads write the same one.
#include "../ops.h"
#include "launch.cuh"

namespace fq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;  // further rows are taken by the same blocks

struct RowGrid {
  float scale, lo, hi;
  int32_t zero;
};

__device__ RowGrid row_grid(const QuantizeActivation& args, float max_x, float min_x) {
  const float clip_max = args.clip ? args.clip[0] : 1.0f;
  const float clip_min = args.clip ? args.clip[1] : 1.0f;
  const int bits = args.grid.bits;
  if (args.grid.symmetric)
    return {symmetric_scale(max_x, min_x, clip_max, clip_min, bits),
            static_cast<float>(qmin(bits, args.grid.narrow)), static_cast<float>(qmax(bits)), 0};
  const ScaleZero row = asymmetric_scale(max_x, min_x, clip_max, clip_min, bits);
  return {row.scale, static_cast<float>(-row.zero), static_cast<float>(levels(bits) - row.zero),
          row.zero};
}

__device__ int32_t code_at(const QuantizeActivation& args, const RowGrid& grid, int64_t i) {
  if (!is_finite(grid.scale)) return 0;
  return code(load(args.x, args.dtype, i), grid.scale, grid.lo, grid.hi, grid.zero);
}

__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeActivation args) {
  __shared__ int32_t above_by_warp[kThreads / kWarp], below_by_warp[kThreads / kWarp];
  const int64_t bytes = activation_bytes(args.k, args.grid.bits);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t first = row * args.k;

    // Integer maxima over the bits of x and -x: see range_of in ../cpu/row_body.h.
    int32_t above = 0, below = 0;
    for (int64_t j = threadIdx.x; j < args.k; j += kThreads) {
      const uint32_t bits = bits_of(load(args.x, args.dtype, first + j));
      const int32_t plus = static_cast<int32_t>(bits);
      const int32_t minus = static_cast<int32_t>(bits ^ 0x80000000u);
      above = plus > above ? plus : above;
      below = minus > below ? minus : below;
    }
    above = block_max<kThreads>(above, above_by_warp);
    below = block_max<kThreads>(below, below_by_warp);
    const RowGrid grid = row_grid(args, float_of(static_cast<uint32_t>(above)),
                                  -float_of(static_cast<uint32_t>(below)));

    uint8_t* const codes = args.codes + row * bytes;
    for (int64_t j = threadIdx.x; j < bytes; j += kThreads) {
      if (args.grid.bits > 4) {
        codes[j] = static_cast<uint8_t>(code_at(args, grid, first + j));
      } else {
        const int32_t even = code_at(args, grid, first + 2 * j);
        const int32_t odd = 2 * j + 1 < args.k ? code_at(args, grid, first + 2 * j + 1) : 0;
        codes[j] = pack_nibbles(even, odd);
      }
    }
    if (threadIdx.x == 0) {
      args.scale[row] = grid.scale;
      if (args.zero) args.zero[row] = grid.zero;
    }
    __syncthreads();  // the next row reuses the shared words
  }
}

}  // namespace

int quantize_activation(const QuantizeActivation& args, void* stream) {
  const int64_t blocks = args.rows < kMostBlocks ? args.rows : kMostBlocks;
  FQ_LAUNCH(quantize_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, args);
  return static_cast<int>(cudaGetLastError());
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fq::cuda
