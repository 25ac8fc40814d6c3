// gemm_mixed_sm90 and gemm_bytes_sm90: the kernel for a tile. The kernels: cutlass_sm90.cuh.
#include "cutlass_sm90.h"

namespace fq::cuda {
namespace {

struct Choice {
  int32_t m, n;
  int (*run)(const GemmInteger& args, void* stream);
};

template <int kCount>
int pick(const Choice (&choices)[kCount], const GemmInteger& args, const GemmTile& tile,
         void* stream) {
  for (const Choice& choice : choices)
    if (choice.m == tile.m && choice.n == tile.n) return choice.run(args, stream);
  return cudaErrorNotSupported;
}

constexpr Choice kMixed[] = {{256, 128, sm90::mixed_256x128},
                             {128, 128, sm90::mixed_128x128},
                             {64, 64, sm90::mixed_64x64},
                             {16, 64, sm90::mixed_16x64}};
constexpr Choice kBytes[] = {{256, 128, sm90::bytes_256x128}, {128, 128, sm90::bytes_128x128}};

}  // namespace

int gemm_mixed_sm90(const GemmInteger& args, const GemmTile& tile, void* stream) {
  return pick(kMixed, args, tile, stream);
}

int gemm_bytes_sm90(const GemmInteger& args, const GemmTile& tile, void* stream) {
  return pick(kBytes, args, tile, stream);
}

}  // namespace fq::cuda
