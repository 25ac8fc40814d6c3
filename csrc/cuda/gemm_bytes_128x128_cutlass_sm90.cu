// 8-bit weights, 128 tokens x 128 features. All there is to say: cutlass_sm90.cuh.
#include "cutlass_sm90.cuh"

int fq::cuda::sm90::bytes_128x128(const GemmInteger& args, void* stream) {
  return Bytes128x128::run(args, stream);
}
