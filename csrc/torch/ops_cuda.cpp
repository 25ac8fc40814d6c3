// The CUDA kernels as torch ops: one line per op, on the current stream of the tensors' device.
// Compiled wherever the kernels are, with a CPU-only torch too: nothing here needs libcuda or
// libtorch_cuda to load.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

#include "args.h"
#include "decoder_plan.h"

// Exported by libtorch_cuda only; null under a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fq::binding {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("flatquant_cuda: this torch gives no CUDA stream");
  return stream;
}

template <class Args>
int64_t no_workspace(const Args&) {
  return 0;
}

// kBytes: how much scratch memory the op needs. It comes from torch's caching allocator, which
// hands it on only to work that is queued behind this op.
template <auto kPrepare, auto kLaunch, auto kBytes, class Signature = decltype(kPrepare)>
struct Run;

template <auto kPrepare, auto kLaunch, auto kBytes, class Args, class Out, class... Inputs>
struct Run<kPrepare, kLaunch, kBytes, Prepared<Args, Out> (*)(Tensor, Inputs...)> {
  using Result = std::conditional_t<std::is_same_v<Out, Nothing>, void, Out>;

  static Result call(Tensor first, Inputs... rest) {
    const int32_t device = first.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Prepared<Args, Out> prepared = kPrepare(first, rest...);
    if (prepared.units > 0) {
      const int64_t bytes = kBytes(prepared.args);
      std::optional<Tensor> workspace;
      if (bytes > 0) workspace = torch::stable::new_empty(first, {bytes}, ScalarType::Byte);
      const int error = kLaunch(prepared.args, workspace ? workspace->mutable_data_ptr() : nullptr,
                                current_stream(device));
      if (error != 0)
        throw std::runtime_error(std::string("flatquant_cuda: CUDA error: ") +
                                 cuda::error_string(error));
    }
    if constexpr (!std::is_same_v<Out, Nothing>) return std::move(prepared.out);
  }
};

}  // namespace
}  // namespace fq::binding

#define FQ_CUDA_OP_WITH(op, bytes) \
  m.impl(#op, TORCH_BOX((&fq::binding::Run<fq::binding::op, fq::cuda::op, bytes>::call)))
#define FQ_CUDA_OP(op, Args) FQ_CUDA_OP_WITH(op, fq::binding::no_workspace<fq::Args>)

STABLE_TORCH_LIBRARY_IMPL(flatquant_cuda, CUDA, m) {
  FQ_CUDA_OP(quantize_activation, QuantizeActivation);
  FQ_CUDA_OP(kronecker, Kronecker);
  FQ_CUDA_OP(kronecker_quantize, KroneckerQuantize);
  FQ_CUDA_OP(hadamard, Hadamard);
  FQ_CUDA_OP_WITH(gemm_w4a4, fq::cuda::gemm_w4a4_workspace);
  FQ_CUDA_OP(gemm_w4a8, GemmInteger);
  FQ_CUDA_OP(gemm_w8a8, GemmInteger);
  FQ_CUDA_OP(kv_quantize_append, KvQuantizeAppend);
  FQ_CUDA_OP(kv_dequantize, KvDequantize);
  FQ_CUDA_OP_WITH(attention_decode, fq::cuda::attention_decode_workspace);
  FQ_CUDA_OP(gemm_w4a16, GemmW4A16);
  FQ_CUDA_OP_WITH(decoder_stack, fq::cuda::decoder_stack_workspace);
}
