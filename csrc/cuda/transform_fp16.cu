// The Kronecker transform of float16 rows: transform_mma.cuh, compiled.
#include "transform_mma.cuh"

namespace fq::cuda {

int transform_fp16(const TransformArgs& args, const TransformPlan& plan, void* stream) {
  return launch_transform<Dtype::kFloat16>(args, plan, stream);
}

}  // namespace fq::cuda
