// The ops of csrc/cuda as the torch library flatquant_emulated, run on the host: the schemas of
// csrc/torch/schema.cpp, the checks of csrc/torch/args.cpp, the CPU's dispatch key.
//
// Kernels write into buffers of this file, not into the tensors: with guard bands on either side
// that must stay as they are, poisoned before the launch, and off alignment if a test asks for it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/torch/args.h"
#include "../../csrc/torch/decoder_plan.h"
#include "emulator.h"
#include "fiber.h"

#ifdef FQ_COVERAGE
extern "C" void __gcov_dump();
extern "C" void __gcov_reset();
#endif

// An op whose kernels do not exist yet is not registered.
namespace fq::cuda {
__attribute__((weak)) int quantize_activation(const QuantizeActivation&, void*, void*);
__attribute__((weak)) int kronecker(const Kronecker&, void*, void*);
__attribute__((weak)) int kronecker_quantize(const KroneckerQuantize&, void*, void*);
__attribute__((weak)) int hadamard(const Hadamard&, void*, void*);
__attribute__((weak)) int gemm_w4a4(const GemmInteger&, void*, void*);
__attribute__((weak)) int gemm_w4a8(const GemmInteger&, void*, void*);
__attribute__((weak)) int gemm_w8a8(const GemmInteger&, void*, void*);
__attribute__((weak)) int kv_quantize_append(const KvQuantizeAppend&, void*, void*);
__attribute__((weak)) int kv_dequantize(const KvDequantize&, void*, void*);
__attribute__((weak)) int attention_decode(const AttentionDecode&, void*, void*);
__attribute__((weak)) int gemm_w4a16(const GemmW4A16&, void*, void*);
__attribute__((weak)) int decoder_stack(const DecoderStack&, void*, void*);
}  // namespace fq::cuda

namespace fq::binding {
namespace {

constexpr int64_t kBand = 512;  // bytes
constexpr uint8_t kBandByte = 0xa5;

int shift_of_outputs = 0;  // in elements

// A piece of global memory between two bands.
class Guarded {
 public:
  Guarded(int64_t bytes, int64_t element) : bytes_(bytes) {
    const int64_t shift = shift_of_outputs * element;
    memory_ = std::make_unique<uint8_t[]>(128 + kBand + shift + bytes + kBand);
    begin_ = memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) & 127);
    data_ = begin_ + kBand + shift;
    end_ = data_ + bytes + kBand;
    std::memset(begin_, kBandByte, end_ - begin_);
    for (int64_t i = 0; i < bytes; ++i)
      data_[i] = static_cast<uint8_t>(emulated::kPoison >> i % 4 * 8);
    emulated::forbid_access(begin_, data_ - begin_);
    emulated::forbid_access(data_ + bytes, kBand);
  }
  ~Guarded() { emulated::allow_access(begin_, end_ - begin_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* data() const { return data_; }

  void check(const char* name) const {
    emulated::allow_access(begin_, end_ - begin_);
    for (const uint8_t* p = begin_; p < end_; ++p)
      if ((p < data_ || p >= data_ + bytes_) && *p != kBandByte)
        throw std::runtime_error("emulated: a kernel wrote outside of " + std::string(name) +
                                 ", at byte " + std::to_string(p - data_) + " of " +
                                 std::to_string(bytes_));
  }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t *begin_, *data_, *end_;
  int64_t bytes_;
};

// The outputs of one call.
class Outputs {
 public:
  template <class T>
  void redirect(const char* name, T*& pointer, int64_t count, int64_t element) {
    if (!pointer) return;
    outputs_.push_back(
        {name, pointer, count * element, std::make_unique<Guarded>(count * element, element)});
    pointer = static_cast<T*>(outputs_.back().guarded->data());
  }
  void copy_back() const {
    for (const Output& output : outputs_) {
      output.guarded->check(output.name);
      if (output.bytes > 0) std::memcpy(output.tensor, output.guarded->data(), output.bytes);
    }
  }

 private:
  struct Output {
    const char* name;
    void* tensor;
    int64_t bytes;
    std::unique_ptr<Guarded> guarded;
  };
  std::vector<Output> outputs_;
};

template <class Args>
void redirect_codes(Args& args, Outputs& outputs) {
  outputs.redirect("codes", args.codes, args.rows * row_bytes(args.grid, args.k), 1);
  outputs.redirect("scale", args.scale, args.rows, 4);
  outputs.redirect("zero", args.zero, args.rows, 4);
}
void redirect(QuantizeActivation& args, Outputs& outputs) { redirect_codes(args, outputs); }
void redirect(KroneckerQuantize& args, Outputs& outputs) { redirect_codes(args, outputs); }
void redirect(Kronecker& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.rows * args.k, size_of(args.out_dtype));
}
void redirect(Hadamard& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.rows * args.n, size_of(args.dtype));
}
void redirect(GemmInteger& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.m * args.n, size_of(args.out_dtype));
}
void redirect(GemmW4A16& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.m * args.n, size_of(args.dtype));
}

void redirect(KvDequantize& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.batch_heads * args.length * args.head_dim,
                   size_of(args.out_dtype));
}
void redirect(AttentionDecode& args, Outputs& outputs) {
  outputs.redirect("out", args.out, args.batch * args.heads * args.tq * args.head_dim,
                   size_of(args.dtype));
}
// A cache is written in part: what is there must stay.
void redirect(KvQuantizeAppend& args, Outputs& outputs) {
  const int64_t rows = args.blocks * args.kv_heads * args.capacity;
  const void* const before[] = {args.codes, args.scale, args.zero};
  const int64_t bytes = rows * packed_bytes(args.head_dim, args.bits);
  outputs.redirect("codes", args.codes, bytes, 1);
  outputs.redirect("scale", args.scale, rows, 4);
  outputs.redirect("zero", args.zero, rows, 1);
  std::memcpy(args.codes, before[0], bytes);
  std::memcpy(args.scale, before[1], 4 * rows);
  std::memcpy(args.zero, before[2], rows);
}

// The residual stream, in and out. The caches are written in place: what is around them is theirs.
void redirect(DecoderStack& args, Outputs& outputs) {
  const int64_t count = args.batch * args.t * args.sizes.hidden, unit = size_of(args.dtype);
  const void* const before = args.hidden;
  outputs.redirect("hidden", args.hidden, count, unit);
  std::memcpy(args.hidden, before, count * unit);
}

template <class Args>
int64_t no_workspace(const Args&) {
  return 0;
}

template <auto kPrepare, auto kLaunch, auto kBytes, class Signature = decltype(kPrepare)>
struct Run;

template <auto kPrepare, auto kLaunch, auto kBytes, class Args, class Out, class... Inputs>
struct Run<kPrepare, kLaunch, kBytes, Prepared<Args, Out> (*)(Inputs...)> {
  using Result = std::conditional_t<std::is_same_v<Out, Nothing>, void, Out>;

  static Result call(Inputs... inputs) {
    Prepared<Args, Out> prepared = kPrepare(inputs...);
    if (prepared.units > 0) {
      Outputs outputs;
      redirect(prepared.args, outputs);
      const int64_t bytes = kBytes(prepared.args);
      const Guarded workspace(bytes, 0);
      const int error = kLaunch(prepared.args, bytes > 0 ? workspace.data() : nullptr, nullptr);
      if (error != 0)
        throw std::runtime_error(std::string("emulated: CUDA error: ") + cuda::error_string(error));
      workspace.check("the workspace");
      outputs.copy_back();
    }
    if constexpr (!std::is_same_v<Out, Nothing>) return std::move(prepared.out);
  }
};

}  // namespace
}  // namespace fq::binding

#define FQ_EMULATED_OP_WITH(op, bytes) \
  if (fq::cuda::op)                    \
  m.impl(#op, TORCH_BOX((&fq::binding::Run<fq::binding::op, fq::cuda::op, bytes>::call)))
#define FQ_EMULATED_OP(op, Args) FQ_EMULATED_OP_WITH(op, fq::binding::no_workspace<fq::Args>)

STABLE_TORCH_LIBRARY_IMPL(flatquant_emulated, CPU, m) {
  FQ_EMULATED_OP(quantize_activation, QuantizeActivation);
  FQ_EMULATED_OP(kronecker, Kronecker);
  FQ_EMULATED_OP(kronecker_quantize, KroneckerQuantize);
  FQ_EMULATED_OP(hadamard, Hadamard);
  FQ_EMULATED_OP_WITH(gemm_w4a4, fq::cuda::gemm_w4a4_workspace);
  FQ_EMULATED_OP(gemm_w4a8, GemmInteger);
  FQ_EMULATED_OP(gemm_w8a8, GemmInteger);
  FQ_EMULATED_OP(kv_quantize_append, KvQuantizeAppend);
  FQ_EMULATED_OP(kv_dequantize, KvDequantize);
  FQ_EMULATED_OP_WITH(attention_decode, fq::cuda::attention_decode_workspace);
  FQ_EMULATED_OP(gemm_w4a16, GemmW4A16);
  FQ_EMULATED_OP_WITH(decoder_stack, fq::cuda::decoder_stack_workspace);
}

// For tests, by ctypes.
extern "C" {

// Places the outputs of further calls so many elements off their alignment.
__attribute__((visibility("default"))) void flatquant_emulated_shift_outputs(int elements) {
  fq::binding::shift_of_outputs = elements;
}

// Writes what has run so far to the .gcda files.
__attribute__((visibility("default"))) void flatquant_emulated_dump_coverage() {
#ifdef FQ_COVERAGE
  __gcov_dump();
  __gcov_reset();
#endif
}
}
