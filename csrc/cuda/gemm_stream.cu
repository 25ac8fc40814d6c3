// gemm_stream: the launch of the weight-streaming GEMM. The kernel: gemm_stream.cuh; its shape:
// plan_stream.h.
#include "gemm_stream.cuh"

#include "gemm.h"

namespace fq::cuda {
namespace {

template <class Codes, int kDown, int kTiles>
int launch(const GemmInteger& args, const StreamPlan& plan, void* stream) {
  StreamParams params{};
  params.args = args;
  params.a_row_bytes = static_cast<int32_t>(activation_bytes(args.k, Codes::kA));
  params.w_row_bytes = static_cast<int32_t>(activation_bytes(args.k, Codes::kW));
  params.tokens = plan.tokens;
  params.warps = plan.warps;
  params.stages = plan.stages;
  params.cluster = plan.cluster;
  params.flip = args.a_zero ? 0x80808080u : 0u;
  const int error = allow_shared(gemm_stream_kernel<Codes, kDown, kTiles>, plan.shared_bytes);
  if (error != 0) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, plan.rows) * plan.cluster),
                  static_cast<unsigned>(ceil_div(args.m, plan.tokens)));
  FQ_LAUNCH_EARLY((gemm_stream_kernel<Codes, kDown, kTiles>), grid, plan.warps * kWarp,
                  plan.cluster, plan.shared_bytes, stream, params);
  return static_cast<int>(cudaGetLastError());
}

template <class Codes>
int launch_tile(const GemmInteger& args, const StreamPlan& plan, void* stream) {
  static_assert(kStreamTiles[0].rows == 16 && kStreamTiles[0].tokens == 8);
  static_assert(kStreamTiles[1].rows == 32 && kStreamTiles[1].tokens == 32);
  return plan.rows == 16 ? launch<Codes, 1, 1>(args, plan, stream)
                         : launch<Codes, 2, 4>(args, plan, stream);
}

}  // namespace

int gemm_stream(const GemmInteger& args, int a_bits, int w_bits, const StreamPlan& plan,
                void* stream) {
  if (a_bits == 4) return launch_tile<StreamCodes<4, 4>>(args, plan, stream);
  if (w_bits == 4) return launch_tile<StreamCodes<8, 4>>(args, plan, stream);
  return launch_tile<StreamCodes<8, 8>>(args, plan, stream);
}

}  // namespace fq::cuda
