// The head sizes that attention_mma.cuh is compiled for.
#include "attention_mma.cuh"

namespace fq::cuda {
namespace {

template <int kSize>
int launch(const AttentionParams& params, void* stream) {
  constexpr AttentionSize kOf = kAttentionSizes[kSize];
  const auto kernel = attention_mma_kernel<kOf.dim, kOf.resident>;
  const int error = allow_shared(kernel, params.plan.shared_bytes);
  if (error != 0) return error;
  const int64_t heads = params.args.batch * params.args.kv_heads;
  FQ_LAUNCH(kernel, static_cast<unsigned>(heads * params.tiles * params.plan.splits),
            unsigned{kAttentionThreads}, params.plan.shared_bytes, stream, params);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int attention_mma(const AttentionParams& params, void* stream) {
  return params.plan.dim == kAttentionSizes[0].dim   ? launch<0>(params, stream)
         : params.plan.dim == kAttentionSizes[1].dim ? launch<1>(params, stream)
                                                     : launch<2>(params, stream);
}

}  // namespace fq::cuda
