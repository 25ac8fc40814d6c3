// flatquant_cuda._native: the planner of the Kronecker transform
// (../cuda/plan_transform.h).
#include "introspect.h"

#include "../cuda/plan_transform.h"

namespace fq::native {
namespace {

using cuda::GeneralPlan;
using cuda::TransformKernel;
using cuda::TransformPlan;
using cuda::TransformQuery;

constexpr Field<TransformPlan> kFields[] = {
    {"path", [](const TransformPlan& p) { return static_cast<int64_t>(p.path); }},
    {"column_tiles", [](const TransformPlan& p) { return int64_t{p.column_tiles}; }},
    {"row_tiles", [](const TransformPlan& p) { return int64_t{p.row_tiles}; }},
    {"tiles_per_warp", [](const TransformPlan& p) { return int64_t{p.tiles_per_warp}; }},
    {"warps", [](const TransformPlan& p) { return int64_t{p.warps}; }},
    {"tokens", [](const TransformPlan& p) { return int64_t{p.tokens}; }},
    {"cluster", [](const TransformPlan& p) { return int64_t{p.cluster}; }},
    {"left_shared", [](const TransformPlan& p) { return int64_t{p.left_shared}; }},
    {"right_shared", [](const TransformPlan& p) { return int64_t{p.right_shared}; }},
    {"threads", [](const TransformPlan& p) { return int64_t{p.threads}; }},
    {"shared_bytes", [](const TransformPlan& p) { return int64_t{p.shared_bytes}; }},
    {"blocks", [](const TransformPlan& p) { return p.blocks; }},
};

constexpr Field<GeneralPlan> kGeneralFields[] = {
    {"strip", [](const GeneralPlan& p) { return int64_t{p.strip}; }},
    {"row_shared", [](const GeneralPlan& p) { return int64_t{p.row_shared}; }},
    {"y_shared", [](const GeneralPlan& p) { return int64_t{p.y_shared}; }},
    {"shared_bytes", [](const GeneralPlan& p) { return int64_t{p.shared_bytes}; }},
    {"blocks", [](const GeneralPlan& p) { return p.blocks; }},
};

// Factors are float32, as checkpoints store them.
TransformQuery query_of(int64_t rows, int64_t n1, int64_t n2, const std::string& dtype, bool left,
                        bool right, bool vectors) {
  TransformQuery query{};
  query.rows = rows, query.n1 = n1, query.n2 = n2;
  query.dtype = dtype_of(dtype);
  query.left = left, query.right = right;
  query.vectors = query.left_vectors = query.right_vectors = vectors;
  query.factors_are_floats = query.dtype == Dtype::kFloat32;
  return query;
}

}  // namespace

void add_transform(py::module_& m) {
  m.attr("TRANSFORM_PATHS") = py::make_tuple("general", "tensor_core");

  py::list kernels;
  for (const TransformKernel& kernel : cuda::kTransformKernels) {
    py::dict entry;
    entry["column_tiles"] = kernel.column_tiles;
    entry["tiles_per_warp"] = kernel.tiles_per_warp;
    entry["warps"] = kernel.warps;
    entry["registers"] = kernel.registers;
    kernels.append(entry);
  }
  m.attr("TRANSFORM_KERNELS") = py::tuple(kernels);

  m.def(
      "plan_transform",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> rows, int64_t n1,
         int64_t n2, const std::string& dtype, bool left, bool right, bool vectors) {
        const cuda::Gpu target = gpu_of(gpu);
        TransformQuery query = query_of(0, n1, n2, dtype, left, right, vectors);
        std::vector<TransformPlan> plans;
        const auto values = rows.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i) {
          query.rows = values(i);
          plans.push_back(cuda::plan_transform(target, query));
        }
        return columns(plans, kFields);
      },
      py::arg("gpu"), py::arg("rows"), py::arg("n1"), py::arg("n2"), py::kw_only(),
      py::arg("dtype") = "bfloat16", py::arg("left") = true, py::arg("right") = true,
      py::arg("vectors") = true,
      "The path (an index into TRANSFORM_PATHS) and its shape for every row count in rows, as "
      "arrays.");

  m.def(
      "plan_general",
      [](const py::dict& gpu, int64_t rows, int64_t n1, int64_t n2, const std::string& dtype,
         bool left, bool right) {
        const TransformQuery query = query_of(rows, n1, n2, dtype, left, right, false);
        return numbers(cuda::plan_general(gpu_of(gpu), query), kGeneralFields);
      },
      py::arg("gpu"), py::arg("rows"), py::arg("n1"), py::arg("n2"), py::kw_only(),
      py::arg("dtype") = "bfloat16", py::arg("left") = true, py::arg("right") = true,
      "The general path's shape, as numbers.");
}

}  // namespace fq::native
