// The kernels behind cuda::gemm_w4a16. Pure C++, no CUDA header. gemm_w4a16.cu asks plan_w4a16.h
// which to take. They enqueue on a stream and return a cudaError_t.
#pragma once

#include "../ops.h"
#include "plan_w4a16.h"

namespace fq::cuda {

// On tensor cores: T bfloat16 or float16, one group or groups of whole blocks; any alignment.
int gemm_w4a16_bf16(const GemmW4A16& args, const W16Plan& plan, void* stream);
int gemm_w4a16_fp16(const GemmW4A16& args, const W16Plan& plan, void* stream);

W16Query query_of(const GemmW4A16& args);

}  // namespace fq::cuda
