// flatquant_cuda._native: the planner of the Hadamard op
// (../cuda/plan_hadamard.h).
#include "introspect.h"

#include "../cuda/plan_hadamard.h"

namespace fq::native {
namespace {

using cuda::HadamardPlan;

constexpr Field<HadamardPlan> kFields[] = {
    {"kernel", [](const HadamardPlan& p) { return static_cast<int64_t>(p.kernel); }},
    {"log_power", [](const HadamardPlan& p) { return int64_t{p.log_power}; }},
    {"rows", [](const HadamardPlan& p) { return int64_t{p.rows}; }},
    {"tiles", [](const HadamardPlan& p) { return int64_t{p.tiles}; }},
    {"chunk", [](const HadamardPlan& p) { return int64_t{p.chunk}; }},
    {"threads", [](const HadamardPlan& p) { return int64_t{p.threads}; }},
    {"shared_bytes", [](const HadamardPlan& p) { return int64_t{p.shared_bytes}; }},
    {"blocks", [](const HadamardPlan& p) { return p.blocks; }},
};

}  // namespace

void add_hadamard(py::module_& m) {
  m.attr("HADAMARD_KERNELS") = py::make_tuple("plain", "power", "base");

  m.def(
      "plan_hadamard",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> rows, int64_t size,
         int64_t power, const std::string& dtype, bool base, bool aligned) {
        const cuda::Gpu target = gpu_of(gpu);
        std::vector<HadamardPlan> plans;
        const auto values = rows.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i)
          plans.push_back(cuda::plan_hadamard(
              target, {values(i), size, power, dtype_of(dtype), base, aligned}));
        return columns(plans, kFields);
      },
      py::arg("gpu"), py::arg("rows"), py::arg("size"), py::arg("power"), py::kw_only(),
      py::arg("dtype") = "bfloat16", py::arg("base") = true, py::arg("aligned") = true,
      "The kernel (an index into HADAMARD_KERNELS) and its shape for every row "
      "count in rows, for a "
      "base of `size` rows, as arrays.");
}

}  // namespace fq::native
