// What the files of the Kronecker transform share: one struct of arguments for both ops, and the
// launches that transform.cu chooses from.
#pragma once

#include "../ops.h"
#include "plan_transform.h"

namespace fq::cuda {

// kronecker_quantize; or, if out is given, kronecker, which has no gate, rms, clip, codes and
// scale. quantize.stride is never 0 here.
struct TransformArgs {
  KroneckerQuantize quantize;
  void* out;
  Dtype out_dtype;
};

TransformQuery query_of(const TransformArgs& args);

int transform_bf16(const TransformArgs& args, const TransformPlan& plan, void* stream);
int transform_fp16(const TransformArgs& args, const TransformPlan& plan, void* stream);
int transform_general(const TransformArgs& args, void* stream);

}  // namespace fq::cuda
