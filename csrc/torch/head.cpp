// head: the output head in bfloat16 for few rows, on a CPU. See ../cpu/head.h.
#include "../cpu/head.h"

#include <torch/csrc/stable/library.h>

#include "args.h"
#include "checks.h"

namespace fq::binding {
namespace {

constexpr int64_t kPieces = 8;  // of the columns, per thread

Tensor head(Tensor x, Tensor weight, MaybeTensor bias) {
  const Checks check("head", "x", x);
  check.require(x.dim() > 0, "x has no dimension: it must have one or more");
  check.dtype("x", x, ScalarType::BFloat16);
  const int64_t k = x.size(x.dim() - 1);
  check.require(k > 0, "x has no columns: it must have one or more");
  cpu::Head args{};
  args.x = static_cast<const uint16_t*>(x.const_data_ptr());
  args.w =
      static_cast<const uint16_t*>(check.input("weight", weight, ScalarType::BFloat16, {kAny, k}));
  args.n = weight.size(0);
  args.k = k;
  args.rows = x.numel() / k;
  if (bias)
    args.bias =
        static_cast<const uint16_t*>(check.input("bias", *bias, ScalarType::BFloat16, {args.n}));
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = args.n;
  Tensor out = torch::stable::new_empty(x, shape);
  args.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  if (args.rows == 0 || args.n == 0) return out;
  constexpr int64_t kWorthAThread = 1 << 16;  // numbers of w
  const int64_t units = cpu::head_units(args), threads = torch::stable::get_num_threads();
  const int64_t least = 1 + kWorthAThread / (k * cpu::kHeadColumns);
  const int64_t share = (units + threads * kPieces - 1) / (threads * kPieces);
  torch::stable::parallel_for(0, units, share < least ? least : share,
                              [&](int64_t begin, int64_t end) { cpu::head(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fq::binding

STABLE_TORCH_LIBRARY_FRAGMENT(flatquant_cuda, m) {
  m.def("head(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flatquant_cuda, CPU, m) { m.impl("head", TORCH_BOX(&fq::binding::head)); }
