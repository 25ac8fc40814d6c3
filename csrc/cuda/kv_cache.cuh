// What the kernels of the KV cache share on the host.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "gpu.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {

constexpr int kPlainThreads = 128;
constexpr int64_t kMostBlocks = 1 << 20;  // further rows are taken by the same blocks
constexpr int64_t kMost32 = int64_t{1} << 31;

inline unsigned blocks_for(int64_t rows, int64_t rows_of_block) {
  const int64_t blocks = (rows + rows_of_block - 1) / rows_of_block;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

inline bool is_aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// kv_quantize_append of two sides of the same sizes, with a launch for both. A cudaError_t.
int append_both(const KvQuantizeAppend& keys, const KvQuantizeAppend& values, void* stream);

}  // namespace fq::cuda
