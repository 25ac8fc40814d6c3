// 4-bit weights, 16 tokens x 64 features. All there is to say: cutlass_sm90.cuh.
#include "cutlass_sm90.cuh"

int fq::cuda::sm90::mixed_16x64(const GemmInteger& args, void* stream) {
  return Mixed16x64::run(args, stream);
}
