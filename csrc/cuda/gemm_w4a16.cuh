// gemm_w4a16 on tensor cores: T bfloat16 or float16 times codes of 2, 3 or 4 bits, which become T
// in registers, exactly; scales multiply the float32 sums and are never rounded to T.
//
// Order of the additions, per output. k is cut into slices of 128 codes and blocks of 32. A segment
// is a slice, or a block where scales may change inside of a slice; the slices are shared out to
// kW16Spans spans of as many consecutive ones each (the last have fewer, or none).
//
//   sum = the products of a segment, block after block (gemm_w4a16_slice.cuh), from 0
//   span = over its segments, ascending:   span = fma(sum, w_scale[group], span), from 0
//   total = over all spans, ascending:     total = total + span, from 0
//   out = round_T(total + bias)
//
// It says nothing of m, of tiles or of the GPU: a token's bits are the same alone and in any batch,
// whichever of the kernels below answers. Tensor cores add the 16 products of an instruction in an
// order of their own, always the same. Error: that of the CPU (docs/numerics.md), with segments of
// 128 codes at most.
//
// stream_kernel, for few tokens: as gemm_stream.cuh, a warp a span. Floor: the bytes of w and its
// scales over the memory's bandwidth. tile_kernel, for more: the warps of a block share a ring and
// have parts of the tile; they go through the spans one after the other. Floor: products over half
// of the tensor cores' rate, since every weight is widened for as many tokens as a warp has.
#pragma once

#include "gemm_w4a16_slice.cuh"

namespace fq::cuda {

// Waits until `pending` groups of copies, at most kW16Stages - 2, are under way.
static __device__ __forceinline__ void wait_for_slices(int pending) {
  if (pending == 0)
    copy_async_wait<0>();
  else if (pending == 1)
    copy_async_wait<1>();
  else
    copy_async_wait<2>();
}

template <Dtype kType>
__device__ __forceinline__ void store_output(float total, const GemmW4A16& args, int64_t token,
                                             int64_t n) {
  if (token >= args.m || n >= args.n) return;
  if (args.bias) total = total + load(args.bias, args.bias_dtype, n);
  store(args.out, kType, token * args.n + n, total);
}

// A warp's sums to shared memory, [token][row].
template <int kRow, int kDown, int kTiles>
__device__ __forceinline__ void lay_down(float* to, const W16Sums<kDown, kTiles>& sums, int tiles,
                                         int lane) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= tiles) break;
#pragma unroll
    for (int down = 0; down < kDown; ++down)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[(tile * 8 + lane % 4 * 2 + i % 2) * kRow + down * 16 + lane / 4 + i / 2 * 8] =
            sums[down][tile][i];
  }
}

template <Dtype kType, int kDown, int kTiles>
__global__ void __launch_bounds__(kW16Spans* kWarp, 2) w4a16_stream_kernel(const W16Params params) {
  constexpr int kRows = 16 * kDown, kRow = stream_sums_row(kRows);
  FQ_DYNAMIC_SHARED(uint8_t, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * params.tokens;
  const int stage_bytes = w16_stage_bytes(params.tokens, kRows, params.fine);
  const int ring_bytes = w16_ring_bytes(params.tokens, kRows, params.stages, params.fine);
  uint8_t* const ring = shared + warp * ring_bytes;
  const int first = warp * params.per_span, left = params.slices - first;
  const int steps = left < 0 ? 0 : left < params.per_span ? left : params.per_span;
  const auto load_slice = [&](int step, int slot) {
    load_w16_slice(ring + slot * stage_bytes, params, first + step, n0, kRows, token0, lane, kWarp);
  };

  // The first weights are on their way to L2 while an earlier kernel ends.
  const int ahead = params.stages - 1;
  for (int step = 0; step < ahead && step < steps; ++step)
    if (lane < kRows && n0 + lane < params.args.n)
      prefetch_l2(params.args.w + (n0 + lane) * params.w_row_bytes +
                  (first + step) * kW16Slice * (params.args.bits == 2 ? 2 : 4) / 8);
  wait_for_earlier_kernels();
#pragma unroll 1
  for (int step = 0; step < ahead; ++step) {
    if (step < steps) load_slice(step, step);
    copy_async_commit();
  }
  W16Sums<kDown, kTiles> span = {};
  int read = 0, write = ahead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_slices(ahead - 1);
    __syncwarp();  // this slice is here for all lanes; the one before it has been read by all
    if (step + ahead < steps) load_slice(step + ahead, write);
    copy_async_commit();
    multiply_w16<kType, kDown, kTiles>(span, ring + read * stage_bytes, params, kRows, 0, 0,
                                       params.tokens / 8, lane);
    read = read == ahead ? 0 : read + 1;
    write = write == ahead ? 0 : write + 1;
  }
  copy_async_wait<0>();
  __syncwarp();  // from here on the warp's ring is scratch
  lay_down<kRow, kDown, kTiles>(reinterpret_cast<float*>(ring), span, params.tokens / 8, lane);
  __syncthreads();

  const float* const all = reinterpret_cast<const float*>(shared);
#pragma unroll 1
  for (int i = threadIdx.x; i < params.tokens * kRows; i += blockDim.x) {
    const int token = i / kRows, row = i % kRows;
    float total = 0.0f;
    for (int w = 0; w < kW16Spans; ++w)
      total = total + all[w * (ring_bytes / 4) + token * kRow + row];
    store_output<kType>(total, params.args, token0 + token, n0 + row);
  }
}

// A tile of kWarpsM x kDown x 16 rows of w and kWarpsN x kTiles x 8 tokens.
template <Dtype kType, int kWarpsM, int kWarpsN, int kDown, int kTiles>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * kWarp, kWarpsM* kWarpsN > 4 ? 1 : 4)
    w4a16_tile_kernel(const W16Params params) {
  constexpr int kRows = kWarpsM * kDown * 16, kTokens = kWarpsN * kTiles * 8;
  constexpr int kThreads = kWarpsM * kWarpsN * kWarp, kRow = stream_sums_row(kRows);
  FQ_DYNAMIC_SHARED(uint8_t, shared);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  // Blocks that run together share tokens, and their weights stay in L2 for the next ones.
  const int row_tiles = static_cast<int>((params.args.n + kRows - 1) / kRows);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x % row_tiles) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / row_tiles) * kTokens;
  const int row = warp % kWarpsM * kDown * 16, tile = warp / kWarpsM * kTiles;
  const int stage_bytes = w16_stage_bytes(kTokens, kRows, params.fine);
  const auto load_slice = [&](int slice, int slot) {
    load_w16_slice(shared + slot * stage_bytes, params, slice, n0, kRows, token0, thread, kThreads);
  };

  wait_for_earlier_kernels();
  const int ahead = params.stages - 1;
#pragma unroll 1
  for (int slice = 0; slice < ahead; ++slice) {
    if (slice < params.slices) load_slice(slice, slice);
    copy_async_commit();
  }
  W16Sums<kDown, kTiles> totals = {}, span = {};
  int read = 0, write = ahead, left = params.per_span;
#pragma unroll 1
  for (int slice = 0; slice < params.slices; ++slice) {
    wait_for_slices(ahead - 1);
    __syncthreads();  // this slice is here for all; the one before it has been read by all
    if (slice + ahead < params.slices) load_slice(slice + ahead, write);
    copy_async_commit();
    multiply_w16<kType, kDown, kTiles>(span, shared + read * stage_bytes, params, kRows, row, tile,
                                       kTiles, lane);
    read = read == ahead ? 0 : read + 1;
    write = write == ahead ? 0 : write + 1;
    if (--left == 0 || slice == params.slices - 1) {
      left = params.per_span;
#pragma unroll
      for (int i = 0; i < kDown * kTiles * 4; ++i) {
        float& sum = span[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
        totals[i / (kTiles * 4)][i / 4 % kTiles][i % 4] += sum;
        sum = 0.0f;
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // from here on the ring is scratch
  float* const all = reinterpret_cast<float*>(shared);
  lay_down<kRow, kDown, kTiles>(all + tile * 8 * kRow + row, totals, kTiles, lane);
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kTokens * kRows; i += kThreads)
    store_output<kType>(all[i / kRows * kRow + i % kRows], params.args, token0 + i / kRows,
                        n0 + i % kRows);
}

// ---- launches ----------------------------------------------------------------------------------

template <Dtype kType>
int launch_w4a16(const GemmW4A16& args, const W16Plan& plan, void* stream) {
  const W16Query query = query_of(args);
  const auto unit_of = [](const void* first_row, int64_t row_bytes) {
    const uint64_t both = reinterpret_cast<uintptr_t>(first_row) | static_cast<uint64_t>(row_bytes);
    return both % 16 == 0 ? 16 : both % 4 == 0 ? 4 : 1;
  };
  W16Params params{};
  params.args = args;
  params.x_row_bytes = static_cast<int32_t>(2 * args.k);
  params.w_row_bytes = static_cast<int32_t>(packed_bytes(args.k, args.bits));
  params.x_unit = unit_of(args.x, params.x_row_bytes);
  params.w_unit = unit_of(args.w, params.w_row_bytes);
  params.tokens = plan.tokens;
  params.stages = plan.stages;
  params.slices = static_cast<int32_t>(ceil_div(args.k, kW16Slice));
  params.per_span = static_cast<int32_t>(ceil_div(params.slices, kW16Spans));
  params.group = static_cast<int32_t>(w16_group(query));
  params.fine = w16_fine(query);
  constexpr bool kBf16 = kType == Dtype::kBFloat16;
  const uint32_t sign = args.bits == 2 ? 2 : 8, one = kBf16 ? 0x4300 : 0x6400;
  params.offset = (one | sign) * 0x10001u;
  const float minus = -static_cast<float>((kBf16 ? 128 : 1024) + sign);
  params.minus = (kBf16 ? float_to_bf16(minus) : float_to_fp16(minus)) * 0x10001u;

  const auto launch = [&](auto* kernel, dim3 grid, int threads) {
    const int error = allow_shared(kernel, plan.shared_bytes);
    if (error != 0) return error;
    FQ_LAUNCH_EARLY(kernel, grid, threads, 1, plan.shared_bytes, stream, params);
    return static_cast<int>(cudaGetLastError());
  };
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(args.n, plan.rows));
  const unsigned token_tiles = static_cast<unsigned>(ceil_div(args.m, plan.tokens));
  static_assert(kW16Tiles[0].rows == 32 && kW16Tiles[0].tokens == 16);
  static_assert(kW16Tiles[1].rows == 64 && kW16Tiles[1].tokens == 32);
  static_assert(kW16Tiles[2].rows == 128 && kW16Tiles[2].tokens == 64);
  if (plan.kernel == W16Kernel::kStream)
    return launch(w4a16_stream_kernel<kType, 2, 2>, dim3(row_tiles, token_tiles),
                  kW16Tiles[0].threads);
  const dim3 grid(row_tiles * token_tiles);
  return plan.kernel == W16Kernel::kSmallTile
             ? launch(w4a16_tile_kernel<kType, 4, 1, 1, 4>, grid, kW16Tiles[1].threads)
             : launch(w4a16_tile_kernel<kType, 4, 2, 2, 4>, grid, kW16Tiles[2].threads);
}

}  // namespace fq::cuda
