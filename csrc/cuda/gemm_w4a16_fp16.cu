// gemm_w4a16 of T = float16 on tensor cores.
#include "gemm_w4a16.h"

#include "gemm_w4a16.cuh"

namespace fq::cuda {

int gemm_w4a16_fp16(const GemmW4A16& args, const W16Plan& plan, void* stream) {
  return launch_w4a16<Dtype::kFloat16>(args, plan, stream);
}

}  // namespace fq::cuda
