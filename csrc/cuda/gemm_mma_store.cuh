// Of the hand-written GEMM (gemm_mma.cuh): from int32 sums to the output.
#pragma once

#include "../ops.h"
#include "gemm_mma_slice.cuh"
#include "ptx.cuh"

namespace fq::cuda {

struct MmaParams {
  GemmInteger args;
  int32_t a_row_bytes, w_row_bytes;
  int32_t tiles_m, tiles_n;
  int32_t a_unit, w_unit;  // 16, 4 or 1: what divides the address of every row
  uint32_t flip;           // the top bits of the codes of `a`, if they are unsigned
  bool vectors;            // out and residual may be accessed 8 columns at a time
};

// ---- the output --------------------------------------------------------------------------------

// A lane's 8 columns of the output, and what is said per column.
struct Columns {
  int64_t first;
  int count;  // of them that exist
  float scale[8], bias[8];
  uint32_t colsum[8];
};

static __device__ __forceinline__ void load_columns(Columns& columns, const GemmInteger& args,
                                                    int64_t first) {
  columns.first = first;
  columns.count = args.n - first < 8 ? static_cast<int>(args.n - first) : 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool here = i < columns.count;
    columns.scale[i] = here ? args.w_scale[first + i] : 0.0f;
    columns.bias[i] = here && args.bias ? load(args.bias, args.bias_dtype, first + i) : 0.0f;
    columns.colsum[i] = here && args.a_zero ? static_cast<uint32_t>(args.w_colsum[first + i]) : 0u;
  }
}

// 8 columns of a 16-bit type that exist and are aligned.
template <Dtype kType>
__device__ __forceinline__ void store_vector(const float (&y)[8], const GemmInteger& args,
                                             int64_t at) {
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = pack2<kType>(y[2 * i], y[2 * i + 1]);
  if (args.residual) {
    const uint4 loaded =
        *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.residual) + at);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float residual[2], rounded[2];
      widen2<kType>(words[i], residual[0], residual[1]);
      widen2<kType>(out[i], rounded[0], rounded[1]);
      out[i] = pack2<kType>(residual[0] + rounded[0], residual[1] + rounded[1]);
    }
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.out) + at) =
      uint4{out[0], out[1], out[2], out[3]};
}

// One row of a lane's columns. sums: what the tensor cores made of it.
template <class Codes>
__device__ __forceinline__ void store_row(const uint32_t (&sums)[8], const Columns& columns,
                                          const MmaParams& params, int64_t row) {
  const GemmInteger& args = params.args;
  const float a_scale = args.a_scale[row];
  const uint32_t zero =
      args.a_zero ? static_cast<uint32_t>(args.a_zero[row]) - uint32_t{Codes::kOffset} : 0u;
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] =
        scaled(static_cast<int32_t>(sums[i] - zero * columns.colsum[i]), a_scale, columns.scale[i]);
    if (args.bias) y[i] = y[i] + columns.bias[i];
  }
  const int64_t at = row * args.n + columns.first;
  if (params.vectors && args.out_dtype == Dtype::kBFloat16) {
    store_vector<Dtype::kBFloat16>(y, args, at);
  } else if (params.vectors && args.out_dtype == Dtype::kFloat16) {
    store_vector<Dtype::kFloat16>(y, args, at);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= columns.count) break;
      float out = round_to(args.out_dtype, y[i]);
      if (args.residual) out = load(args.residual, args.out_dtype, at + i) + out;
      store(args.out, args.out_dtype, at + i, out);
    }
  }
}

// Where the sums of a lane wait in shared memory, as two int4: no bank conflicts.
template <class Tile>
__device__ __forceinline__ int scratch_index(int group, int part, int half, int thread) {
  return ((group * Tile::kParts + part) * 2 + half) * Tile::kGroupThreads + thread;
}

template <class Tile>
__device__ __forceinline__ void add_sums(uint32_t (&eight)[8], const uint4* scratch, int group,
                                         int part, int thread) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 four = scratch[scratch_index<Tile>(group, part, half, thread)];
    eight[4 * half] += four.x;
    eight[4 * half + 1] += four.y;
    eight[4 * half + 2] += four.z;
    eight[4 * half + 3] += four.w;
  }
}

}  // namespace fq::cuda
