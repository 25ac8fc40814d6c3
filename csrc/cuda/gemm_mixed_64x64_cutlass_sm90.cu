// 4-bit weights, 64 tokens x 64 features. All there is to say: cutlass_sm90.cuh.
#include "cutlass_sm90.cuh"

int fq::cuda::sm90::mixed_64x64(const GemmInteger& args, void* stream) {
  return Mixed64x64::run(args, stream);
}
