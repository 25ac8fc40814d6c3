// flatquant_cuda._native: the GEMM planner (../cuda/plan_gemm.h).
#include "introspect.h"

#include "../cuda/plan_gemm.h"

namespace fq::native {
namespace {

using cuda::GemmKernel;
using cuda::GemmPlan;
using cuda::GemmQuery;
using cuda::GemmTileEntry;

const char* name_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kNone:
      return "none";
    case GemmKernel::kMma:
      return "mma";
    case GemmKernel::kS4Sm8x:
      return "s4_sm8x";
    case GemmKernel::kS8S4Sm8x:
      return "s8s4_sm8x";
    case GemmKernel::kMixedSm90:
      return "mixed_sm90";
    case GemmKernel::kBytesSm90:
      return "bytes_sm90";
  }
  return "unknown";
}

constexpr GemmKernel kKernels[] = {GemmKernel::kNone,      GemmKernel::kMma,
                                   GemmKernel::kS4Sm8x,    GemmKernel::kS8S4Sm8x,
                                   GemmKernel::kMixedSm90, GemmKernel::kBytesSm90};

// A plan and the estimate that it was chosen for.
struct Chosen {
  GemmPlan plan;
  double clocks;
};

constexpr Field<Chosen> kFields[] = {
    {"kernel", [](const Chosen& c) { return static_cast<int64_t>(c.plan.kernel); }},
    {"tile_m", [](const Chosen& c) { return int64_t{c.plan.tile.m}; }},
    {"tile_n", [](const Chosen& c) { return int64_t{c.plan.tile.n}; }},
    {"tile_k", [](const Chosen& c) { return int64_t{c.plan.tile.k}; }},
    {"stages", [](const Chosen& c) { return int64_t{c.plan.tile.stages}; }},
    {"widen", [](const Chosen& c) { return int64_t{c.plan.widen}; }},
    {"shared_bytes", [](const Chosen& c) { return int64_t{c.plan.shared_bytes}; }},
    {"blocks", [](const Chosen& c) { return c.plan.blocks; }},
    {"clocks", [](const Chosen& c) { return static_cast<int64_t>(c.clocks); }},
};

Chosen choose(const cuda::Gpu& gpu, const GemmQuery& query, bool cutlass) {
  const GemmPlan plan = cuda::plan_gemm(gpu, query, cutlass);
  for (const GemmTileEntry& entry : cuda::kGemmTiles)
    if (entry.kernel == plan.kernel && entry.tile.m == plan.tile.m && entry.tile.n == plan.tile.n &&
        entry.tile.k == plan.tile.k && entry.tile.stages == plan.tile.stages)
      return {plan, cuda::gemm_clocks(gpu, query, entry)};
  return {plan, -1};
}

GemmQuery query_of(int64_t n, int64_t k, int a_bits, int w_bits, bool zero, bool residual,
                   const std::string& dtype, bool aligned) {
  return {0, n, k, a_bits, w_bits, zero, residual, dtype_of(dtype), aligned};
}

}  // namespace

void add_gemm(py::module_& m) {
  py::list names;
  for (const GemmKernel kernel : kKernels) names.append(name_of(kernel));
  m.attr("GEMM_KERNELS") = py::tuple(names);

  py::list tiles;
  for (const GemmTileEntry& entry : cuda::kGemmTiles) {
    py::dict tile;
    tile["kernel"] = name_of(entry.kernel);
    tile["tile_m"] = entry.tile.m;
    tile["tile_n"] = entry.tile.n;
    tile["tile_k"] = entry.tile.k;
    tile["stages"] = entry.tile.stages;
    tile["shared_bytes"] = entry.shared_bytes;
    tile["resident"] = entry.resident;
    tiles.append(tile);
  }
  m.attr("GEMM_TILES") = py::tuple(tiles);

  m.def(
      "plan_gemm",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> ms, int64_t n, int64_t k,
         int a_bits, int w_bits, bool zero, bool residual, const std::string& dtype, bool aligned,
         bool cutlass) {
        const cuda::Gpu target = gpu_of(gpu);
        GemmQuery query = query_of(n, k, a_bits, w_bits, zero, residual, dtype, aligned);
        std::vector<Chosen> plans;
        const auto values = ms.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i) {
          query.m = values(i);
          plans.push_back(choose(target, query, cutlass));
        }
        return columns(plans, kFields);
      },
      py::arg("gpu"), py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(),
      py::arg("a_bits") = 4, py::arg("w_bits") = 4, py::arg("zero") = false,
      py::arg("residual") = false, py::arg("dtype") = "bfloat16", py::arg("aligned") = true,
      py::arg("cutlass") = true,
      "The kernel (an index into GEMM_KERNELS) and tile for every token count "
      "in m, as arrays.");
}

}  // namespace fq::native
