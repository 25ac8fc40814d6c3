// For test_cutlass_sm8x.py, by ctypes: the tiles of the CUTLASS kernels of sm_8x, and launches.
#include <exception>
#include <string>

#include "../../../csrc/cuda/gemm.h"

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

static_assert(sizeof(fq::GemmInteger) == 9 * 8 + 3 * 8 + 2 * 4, "the test has this struct, too");

// A launch that fails throws in the emulator, so there is never an error left.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

// Writes m, n, k, stages of tile number `index` of a kernel. 0: there is no such tile.
FQ_EXPORT int cutlass_tile(int s4, int index, fq::cuda::GemmTile* tile) {
  const auto kernel = s4 ? fq::cuda::GemmKernel::kS4Sm8x : fq::cuda::GemmKernel::kS8S4Sm8x;
  for (const fq::cuda::GemmTileEntry& entry : fq::cuda::kGemmTiles)
    if (entry.kernel == kernel && index-- == 0) {
      *tile = entry.tile;
      return 1;
    }
  return 0;
}

// An empty text, or what went wrong.
FQ_EXPORT const char* cutlass_gemm(int s4, const fq::GemmInteger* args,
                                   const fq::cuda::GemmTile* tile) {
  static std::string answer;
  try {
    const int error = s4 ? fq::cuda::gemm_s4_sm8x(*args, *tile, nullptr)
                         : fq::cuda::gemm_s8s4_sm8x(*args, *tile, nullptr);
    answer = error ? "CUDA error " + std::to_string(error) : "";
  } catch (const std::exception& failure) {
    answer = failure.what();
  }
  return answer.c_str();
}
