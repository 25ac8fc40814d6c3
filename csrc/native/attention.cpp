// flatquant_cuda._native: the planner of attention_decode
// (../cuda/plan_attention.h).
#include "introspect.h"

#include "../cuda/plan_attention.h"

namespace fq::native {
namespace {

using cuda::AttentionPlan;

constexpr Field<AttentionPlan> kFields[] = {
    {"kernel", [](const AttentionPlan& p) { return static_cast<int64_t>(p.kernel); }},
    {"dim", [](const AttentionPlan& p) { return int64_t{p.dim}; }},
    {"k_granule", [](const AttentionPlan& p) { return int64_t{p.k_granule}; }},
    {"v_granule", [](const AttentionPlan& p) { return int64_t{p.v_granule}; }},
    {"stages", [](const AttentionPlan& p) { return int64_t{p.stages}; }},
    {"shared_bytes", [](const AttentionPlan& p) { return int64_t{p.shared_bytes}; }},
    {"chunks", [](const AttentionPlan& p) { return p.chunks; }},
    {"splits", [](const AttentionPlan& p) { return p.splits; }},
    {"tiles", [](const AttentionPlan& p) { return p.tiles; }},
    {"tiles_at_a_time", [](const AttentionPlan& p) { return p.tiles_at_a_time; }},
    {"blocks", [](const AttentionPlan& p) { return p.blocks; }},
    {"workspace_bytes", [](const AttentionPlan& p) { return p.workspace_bytes; }},
};

}  // namespace

void add_attention(py::module_& m) {
  m.attr("ATTENTION_KERNELS") = py::make_tuple("none", "general", "mma");
  m.attr("ATTENTION_CHUNK") = cuda::kChunk;
  m.attr("ATTENTION_TILE_ROWS") = cuda::kTileRows;
  m.attr("ATTENTION_THREADS") = cuda::kAttentionThreads;
  py::dict sizes;
  for (const cuda::AttentionSize& size : cuda::kAttentionSizes)
    sizes[py::int_(size.dim)] = size.resident;
  m.attr("ATTENTION_SIZES") = sizes;

  m.def(
      "plan_attention",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> length, int64_t batch,
         int64_t heads, int64_t kv_heads, int64_t tq, int64_t head_dim, int64_t capacity,
         int32_t k_bits, int32_t v_bits, const std::string& dtype, bool paged, int32_t alignment) {
        const cuda::Gpu target = gpu_of(gpu);
        std::vector<AttentionPlan> plans;
        const auto values = length.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i)
          plans.push_back(cuda::plan_attention(
              target, {batch, heads, kv_heads, tq, values(i), head_dim, capacity, k_bits, v_bits,
                       dtype_of(dtype), paged, alignment, alignment, alignment}));
        return columns(plans, kFields);
      },
      py::arg("gpu"), py::arg("length"), py::kw_only(), py::arg("batch") = 1, py::arg("heads") = 32,
      py::arg("kv_heads") = 8, py::arg("tq") = 1, py::arg("head_dim") = 128,
      py::arg("capacity") = int64_t{1} << 20, py::arg("k_bits") = 4, py::arg("v_bits") = 4,
      py::arg("dtype") = "bfloat16", py::arg("paged") = false, py::arg("alignment") = 16,
      "The kernel (an index into ATTENTION_KERNELS) and how the cache is cut, for every planned "
      "length, as arrays.");
}

}  // namespace fq::native
