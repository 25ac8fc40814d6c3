// The CPU kernels as torch ops: one line per op, and the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#if defined(__unix__)
#include <pthread.h>
#endif

#include <stdexcept>
#include <string>

#include "../cpu/pick.h"
#include "args.h"

#if defined(__unix__)
// Of the OpenMP runtime that torch brought along; null if it has none, or none of OpenMP 5.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);
#endif

namespace fq::binding {
namespace {

#if defined(__unix__)
// fork copies the calling thread alone. GNU's OpenMP in the child would wait forever for the others
// of its pool, with any op that shares its work out, torch's own included. So the pool of a thread
// that is about to fork ends first; the next op on either side starts a new one.
void end_pool() {
  constexpr int kHard = 2;  // omp_pause_hard
  if (omp_pause_resource_all != nullptr) omp_pause_resource_all(kHard);
}
[[maybe_unused]] const int watching = pthread_atfork(end_pool, nullptr, nullptr);
#endif

constexpr int64_t kWorthAThread = 20000;  // in the unit of Prepared::work

// What the kernel's begin and end count.
template <class Args>
int64_t units_of(const Args&, int64_t units) {
  return units;
}
int64_t units_of(const GemmInteger& args, int64_t) { return cpu::gemm_tiles(args); }
int64_t units_of(const GemmW4A16& args, int64_t) { return cpu::gemm_tiles(args); }

// What the CPU kernels do not know; flatquant_cuda/ops.py asks the reference for it.
template <class Args>
void require_known(const Args&) {}
void require_known(const KvQuantizeAppend& args) {
  if (args.slots)
    throw std::runtime_error("kv_quantize_append: slots is given: the CPU kernel knows none");
}
template <class Args>
void require_no_pages(const char* op, const Args& args) {
  if (args.block_table || args.lengths)
    throw std::runtime_error(std::string(op) + ": " +
                             (args.block_table ? "block_table" : "lengths") +
                             " is given: the CPU kernel knows none");
}
void require_known(const KvDequantize& args) { require_no_pages("kv_dequantize", args); }
void require_known(const AttentionDecode& args) { require_no_pages("attention_decode", args); }

// Run<prepare, kernel>::call has the signature of `prepare` and returns its `out`.
template <auto kPrepare, auto kKernel, class Signature = decltype(kPrepare)>
struct Run;

template <auto kPrepare, auto kKernel, class Args, class Out, class... Inputs>
struct Run<kPrepare, kKernel, Prepared<Args, Out> (*)(Inputs...)> {
  using Result = std::conditional_t<std::is_same_v<Out, Nothing>, void, Out>;

  static Result call(Inputs... inputs) {
    Prepared<Args, Out> prepared = kPrepare(inputs...);
    require_known(prepared.args);
    if (prepared.units > 0) {
      const int64_t units = units_of(prepared.args, prepared.units);
      const int64_t chunks = 1 + prepared.work / kWorthAThread;
      const int64_t grain = (units + chunks - 1) / chunks;
      torch::stable::parallel_for(
          0, units, grain, [&](int64_t begin, int64_t end) { kKernel(prepared.args, begin, end); });
    }
    if constexpr (!std::is_same_v<Out, Nothing>) return std::move(prepared.out);
  }
};

}  // namespace
}  // namespace fq::binding

#define FQ_CPU_OP(op) \
  m.impl(#op, TORCH_BOX((&fq::binding::Run<fq::binding::op, fq::cpu::op>::call)))

STABLE_TORCH_LIBRARY_IMPL(flatquant_cuda, CPU, m) {
  FQ_CPU_OP(quantize_activation);
  FQ_CPU_OP(kronecker);
  FQ_CPU_OP(kronecker_quantize);
  FQ_CPU_OP(hadamard);
  FQ_CPU_OP(fake_quantize);
  FQ_CPU_OP(fake_quantize_backward);
  FQ_CPU_OP(gemm_w4a4);
  FQ_CPU_OP(gemm_w4a8);
  FQ_CPU_OP(gemm_w8a8);
  FQ_CPU_OP(gemm_w4a16);
  FQ_CPU_OP(kv_quantize_append);
  FQ_CPU_OP(kv_dequantize);
  FQ_CPU_OP(attention_decode);
}

// For tests and for build_info: lowers the instruction set if `isa` is 0..3, and names the one in
// force. Reached by ctypes.
extern "C" __attribute__((visibility("default"))) const char* flatquant_cpu_isa(int32_t isa) {
  if (isa >= 0) fq::cpu::force_isa(static_cast<fq::cpu::Isa>(isa));
  return fq::cpu::isa_name(fq::cpu::isa());
}
