// The Kronecker transform of bfloat16 rows: transform_mma.cuh, compiled.
#include "transform_mma.cuh"

namespace fq::cuda {

int transform_bf16(const TransformArgs& args, const TransformPlan& plan, void* stream) {
  return launch_transform<Dtype::kBFloat16>(args, plan, stream);
}

}  // namespace fq::cuda
