// decoder_stack on the CPU: its threads, and the memory they share.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>
#include <stdexcept>

#include "decoder_plan.h"

namespace fq::binding {
namespace {

Tensor run(Tensor hidden, Tensor cos, Tensor sin, MaybeTensor mask, Tensor plan, Tensor cache,
           int64_t past, MaybeTensor slots, MaybeTensor lengths) {
  Prepared<DecoderStack, Tensor> prepared =
      decoder_stack(hidden, cos, sin, mask, plan, cache, past, slots, lengths);
  if (slots) throw std::runtime_error("decoder_stack: slots is given: the CPU kernel knows none");
  if (prepared.units == 0) return prepared.out;
  const DecoderStack& args = prepared.args;
  const int64_t threads = cpu::decoder_stack_threads(args, torch::stable::get_num_threads());
  const int64_t bytes = cpu::decoder_stack_workspace(args, threads);
  Tensor memory = torch::stable::new_empty(hidden, {bytes + 64}, ScalarType::Byte);
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  void* const workspace = reinterpret_cast<void*>((first + 63) / 64 * 64);
  cpu::decoder_stack_begin(args, threads, workspace);

  std::exception_ptr failure;  // must not leave a thread of the region
  std::mutex mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    try {
      cpu::decoder_stack(args, thread, threads, workspace);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  return prepared.out;
}

}  // namespace
}  // namespace fq::binding

STABLE_TORCH_LIBRARY_IMPL(flatquant_cuda, CPU, m) {
  m.impl("decoder_stack", TORCH_BOX(&fq::binding::run));
}
