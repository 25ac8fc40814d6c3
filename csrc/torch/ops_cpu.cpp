// The CPU kernels as torch ops: one line per op, and the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "args.h"

namespace fq::binding {
namespace {

constexpr int64_t kGrain = 20000;  // work worth a thread, in the unit of Prepared::work

// Run<prepare, kernel>::call has the signature of `prepare` and returns its `out`.
template <auto kPrepare, auto kKernel, class Signature = decltype(kPrepare)>
struct Run;

template <auto kPrepare, auto kKernel, class Args, class Out, class... Inputs>
struct Run<kPrepare, kKernel, Prepared<Args, Out> (*)(Inputs...)> {
  using Result = std::conditional_t<std::is_same_v<Out, Nothing>, void, Out>;

  static Result call(Inputs... inputs) {
    Prepared<Args, Out> prepared = kPrepare(inputs...);
    if (prepared.units > 0) {
      const int64_t grain = 1 + kGrain / (prepared.work > 0 ? prepared.work : 1);
      torch::stable::parallel_for(
          0, prepared.units, grain,
          [&](int64_t begin, int64_t end) { kKernel(prepared.args, begin, end); });
    }
    if constexpr (!std::is_same_v<Out, Nothing>) return std::move(prepared.out);
  }
};

}  // namespace
}  // namespace fq::binding

#define FQ_CPU_OP(op) m.impl(#op, TORCH_BOX((&fq::binding::Run<fq::binding::op, fq::cpu::op>::call)))

STABLE_TORCH_LIBRARY_IMPL(flatquant_cuda, CPU, m) {
  FQ_CPU_OP(quantize_activation);
  FQ_CPU_OP(kronecker);
  FQ_CPU_OP(kronecker_quantize);
  FQ_CPU_OP(hadamard);
#if __has_include("../cpu/gemm_w4a4.cpp")
  FQ_CPU_OP(gemm_w4a4);
#endif
#if __has_include("../cpu/gemm_w4a8.cpp")
  FQ_CPU_OP(gemm_w4a8);
#endif
#if __has_include("../cpu/gemm_w4a16.cpp")
  FQ_CPU_OP(gemm_w4a16);
#endif
#if __has_include("../cpu/kv_cache.cpp")
  FQ_CPU_OP(kv_quantize_append);
  FQ_CPU_OP(kv_dequantize);
#endif
#if __has_include("../cpu/attention.cpp")
  FQ_CPU_OP(attention_decode);
#endif
}
