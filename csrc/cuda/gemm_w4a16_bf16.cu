// gemm_w4a16 of T = bfloat16 on tensor cores.
#include "gemm_w4a16.h"

#include "gemm_w4a16.cuh"

namespace fq::cuda {

int gemm_w4a16_bf16(const GemmW4A16& args, const W16Plan& plan, void* stream) {
  return launch_w4a16<Dtype::kBFloat16>(args, plan, stream);
}

}  // namespace fq::cuda
