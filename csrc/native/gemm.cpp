// flatquant_cuda._native: the GEMM planners (../cuda/plan_gemm.h, plan_w4a16.h).
#include "introspect.h"

#include "../cuda/plan_gemm.h"
#include "../cuda/plan_w4a16.h"

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
    case GemmKernel::kStream:
      return "stream";
  }
  return "unknown";
}

constexpr GemmKernel kKernels[] = {
    GemmKernel::kNone,      GemmKernel::kMma,       GemmKernel::kS4Sm8x, GemmKernel::kS8S4Sm8x,
    GemmKernel::kMixedSm90, GemmKernel::kBytesSm90, GemmKernel::kStream};

constexpr Field<GemmPlan> kFields[] = {
    {"kernel", [](const GemmPlan& p) { return static_cast<int64_t>(p.kernel); }},
    {"tile_m", [](const GemmPlan& p) { return int64_t{p.tile.m}; }},
    {"tile_n", [](const GemmPlan& p) { return int64_t{p.tile.n}; }},
    {"tile_k", [](const GemmPlan& p) { return int64_t{p.tile.k}; }},
    {"stages", [](const GemmPlan& p) { return int64_t{p.tile.stages}; }},
    {"widen", [](const GemmPlan& p) { return int64_t{p.widen}; }},
    {"shared_bytes", [](const GemmPlan& p) { return int64_t{p.shared_bytes}; }},
    {"blocks", [](const GemmPlan& p) { return p.blocks; }},
    {"clocks", [](const GemmPlan& p) { return static_cast<int64_t>(p.clocks); }},
    {"warps", [](const GemmPlan& p) { return int64_t{p.stream.warps}; }},  // these of "stream"
    {"cluster", [](const GemmPlan& p) { return int64_t{p.stream.cluster}; }},
    {"resident", [](const GemmPlan& p) { return int64_t{p.stream.resident}; }},
};

using cuda::W16Kernel;
using cuda::W16Plan;

constexpr const char* kW16Names[] = {"none", "general", "stream", "small_tile", "large_tile"};

constexpr Field<W16Plan> kW16Fields[] = {
    {"kernel", [](const W16Plan& p) { return static_cast<int64_t>(p.kernel); }},
    {"tokens", [](const W16Plan& p) { return int64_t{p.tokens}; }},
    {"rows", [](const W16Plan& p) { return int64_t{p.rows}; }},
    {"stages", [](const W16Plan& p) { return int64_t{p.stages}; }},
    {"shared_bytes", [](const W16Plan& p) { return int64_t{p.shared_bytes}; }},
    {"blocks", [](const W16Plan& p) { return p.blocks; }},
    {"clocks", [](const W16Plan& p) { return static_cast<int64_t>(p.clocks); }},
};

py::tuple names_of_w16() {
  py::list names;
  for (const char* name : kW16Names) names.append(name);
  return py::tuple(names);
}

void add_w4a16(py::module_& m) {
  m.attr("W4A16_KERNELS") = names_of_w16();
  py::list tiles;
  for (const cuda::W16Tile& tile : cuda::kW16Tiles) {
    py::dict entry;
    entry["kernel"] = kW16Names[static_cast<int>(tile.kernel)];
    entry["tokens"] = tile.tokens;
    entry["rows"] = tile.rows;
    entry["threads"] = tile.threads;
    entry["registers"] = tile.registers;
    tiles.append(entry);
  }
  m.attr("W4A16_TILES") = py::tuple(tiles);
  m.def(
      "plan_w4a16",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> ms, int64_t n, int64_t k,
         int64_t groups, int bits, const std::string& dtype) {
        const cuda::Gpu target = gpu_of(gpu);
        std::vector<W16Plan> plans;
        const auto values = ms.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i)
          plans.push_back(
              cuda::plan_w4a16(target, {values(i), n, k, groups, bits, dtype_of(dtype)}));
        return columns(plans, kW16Fields);
      },
      py::arg("gpu"), py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(),
      py::arg("groups") = 1, py::arg("bits") = 4, py::arg("dtype") = "bfloat16",
      "The kernel of gemm_w4a16 (an index into W4A16_KERNELS) and its launch for every token count "
      "in m, as arrays.");
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

  py::list streams;
  for (const cuda::StreamTile& entry : cuda::kStreamTiles) {
    py::dict tile;
    tile["tokens"] = entry.tokens;
    tile["rows"] = entry.rows;
    tile["registers"] = entry.registers;
    streams.append(tile);
  }
  m.attr("STREAM_TILES") = py::tuple(streams);
  m.attr("LATENCY_NS") = cuda::kLatencyNs;
  m.def("gigahertz", &cuda::gigahertz, py::arg("arch"), "The clock that the planners count in.");
  m.def("stream_instructions", &cuda::stream_instructions, py::arg("tokens"), py::arg("rows"),
        py::arg("a_bits"), py::arg("w_bits"),
        "Instructions of a warp of the streaming kernel for one slice.");
  add_w4a16(m);

  m.def(
      "plan_gemm",
      [](const py::dict& gpu, py::array_t<int64_t, py::array::forcecast> ms, int64_t n, int64_t k,
         int a_bits, int w_bits, bool zero, bool residual, const std::string& dtype, bool aligned,
         bool cutlass) {
        const cuda::Gpu target = gpu_of(gpu);
        GemmQuery query = query_of(n, k, a_bits, w_bits, zero, residual, dtype, aligned);
        std::vector<GemmPlan> plans;
        const auto values = ms.unchecked<1>();
        for (py::ssize_t i = 0; i < values.shape(0); ++i) {
          query.m = values(i);
          plans.push_back(cuda::plan_gemm(target, query, cutlass));
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
