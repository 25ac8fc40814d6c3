// 8-bit weights, 256 tokens x 128 features. All there is to say: cutlass_sm90.cuh.
#include "cutlass_sm90.cuh"

int fq::cuda::sm90::bytes_256x128(const GemmInteger& args, void* stream) {
  return Bytes256x128::run(args, stream);
}
