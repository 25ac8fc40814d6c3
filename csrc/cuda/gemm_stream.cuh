// The integer GEMM for few tokens: the weights stream past the tensor cores once, packed as they
// are stored. Exact like all integer GEMMs, so that its answers are those of gemm_mma.cuh.
//
// The operands are swapped: 16 rows of `w` are the first one of an mma and 8 tokens the second, so
// that one token wastes 7/8 of a product and not 15/16. A block makes rows x tokens outputs. Its
// warps split k: warp i of the cluster's takes the slices i, i + warps, ... of kStreamRow bytes of
// every row of `w`, through a ring of its own in shared memory. cp.async fills it, 64 consecutive
// bytes of a row by four lanes, past L1 and first to leave L2; there is no barrier but the warp's,
// and the planner makes the ring as deep as latency times bandwidth asks (plan_stream.h).
// Activations come the same way but through L1: the blocks of an SM read the same ones.
//
// Fragments and nibbles: as in gemm_mma_slice.cuh. Lane (g, t) reads the 16 bytes at 16 t of row g,
// and each word becomes the even and the odd codes, times 16. Floor: the bytes of `w` over the
// memory's bandwidth.
#pragma once

#include "../ops.h"
#include "gemm_mma_slice.cuh"
#include "launch.cuh"
#include "plan_stream.h"
#include "ptx.cuh"

namespace fq::cuda {

struct StreamParams {
  GemmInteger args;
  int32_t a_row_bytes, w_row_bytes;
  int32_t tokens, warps, stages, cluster;  // of the plan
  uint32_t flip;                           // the top bits of unsigned codes of `a`
};

// The codes: bits of `a` and `w` in memory. Offset and shift are those of gemm_mma.
template <int kABits, int kWBits>
struct StreamCodes : MmaCodes<kABits, kWBits> {
  static constexpr int kARow = kStreamRow * kABits / kWBits;  // bytes of a slice
  static constexpr int kAWords = kARow / 16;                  // of a lane
  static constexpr int kProducts = kWBits == 4 ? 4 : 2;       // over k, in a slice
};

// ---- a slice in shared memory ------------------------------------------------------------------

// Rows of 64 bytes: a quarter of a warp reads two of them, all banks once. Rows of 128 bytes: a
// lane reads the chunks 2t and 2t + 1, and bit 0 of the row swaps them, so that both halves of a
// pair of rows are in different banks.
template <int kRowBytes>
__device__ __forceinline__ int stream_offset(int row, int chunk) {
  if constexpr (kRowBytes == 64) return row * 64 + chunk * 16;
  return row * 128 + ((chunk ^ (row & 1)) * 16);
}

// One lane's part in the copies of rows of a matrix, slice after slice; what is outside becomes 0.
template <int kRowBytes, bool kWeights>
struct StreamLoader {
  static constexpr int kChunks = kRowBytes / kChunk, kRowsAtOnce = kWarp / kChunks;
  static_assert(kRowsAtOnce % 2 == 0, "stream_offset(row) + kRowsAtOnce rows must hold");

  const uint8_t* from;  // in its first row, of the next slice
  int64_t step;         // bytes from there to its next row
  int left;             // bytes of a row from there on
  int rows;             // that exist, from its first one on
  int to;               // in a slice

  // first: byte of a row where the first slice begins.
  __device__ __forceinline__ StreamLoader(const uint8_t* matrix, int64_t row0, int64_t count,
                                          int row_bytes, int first, int lane) {
    const int row = lane / kChunks, byte = first + lane % kChunks * kChunk;
    from = matrix + (row0 + row) * row_bytes + byte;
    step = static_cast<int64_t>(row_bytes) * kRowsAtOnce;
    left = row_bytes - byte;
    rows = count - row0 > (1 << 20) ? 1 << 20 : static_cast<int>(count - row0) - row;
    to = stream_offset<kRowBytes>(row, lane % kChunks);
  }

  // So many rows into `slice`; stride: bytes of a row from this slice to the next.
  __device__ __forceinline__ void load(uint8_t* slice, int count, int stride) {
    uint8_t* place = slice + to;
    const uint8_t* row = from;
    const int here = left > 0 ? rows : 0;
#pragma unroll 4
    for (int i = 0; i < count; i += kRowsAtOnce) {
      if constexpr (kWeights)
        copy_async_once(place, row, here > i ? kChunk : 0);
      else
        copy_async_kept(place, row, here > i ? kChunk : 0);
      place += kRowsAtOnce * kRowBytes;
      row += step;
    }
    from += stride;
    left -= stride;
  }
};

// copy_async_wait for a number that is not known before the launch: at most kMostStreamStages - 2.
static __device__ __forceinline__ void copy_async_wait_but(int pending) {
  switch (pending) {
    case 0:
      return copy_async_wait<0>();
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    case 3:
      return copy_async_wait<3>();
    default:
      return copy_async_wait<4>();
  }
}

// ---- products ----------------------------------------------------------------------------------

// The two halves of k of one token, for product `step` of a slice.
template <class Codes>
__device__ __forceinline__ void token_halves(uint32_t* first, uint32_t* second,
                                             const uint32_t (&words)[Codes::kAWords], int step,
                                             uint32_t flip) {
  if constexpr (Codes::kA == 4) {
    *first = low_nibbles(words[step]) ^ flip;
    *second = high_nibbles(words[step]) ^ flip;
  } else if constexpr (Codes::kW == 4) {
    *first = __byte_perm(words[2 * step], words[2 * step + 1], 0x6420) ^ flip;
    *second = __byte_perm(words[2 * step], words[2 * step + 1], 0x7531) ^ flip;
  } else {
    *first = words[2 * step] ^ flip;
    *second = words[2 * step + 1] ^ flip;
  }
}

template <class Codes>
__device__ __forceinline__ void weight_halves(uint32_t* first, uint32_t* second,
                                              const uint32_t (&words)[4], int step) {
  if constexpr (Codes::kW == 4) {
    *first = low_nibbles(words[step]);
    *second = high_nibbles(words[step]);
  } else {
    *first = words[2 * step];
    *second = words[2 * step + 1];
  }
}

// sums += one slice; of the token tiles, `tiles` are there.
template <class Codes, int kDown, int kTiles>
__device__ __forceinline__ void multiply_stream(int32_t (&sums)[kDown][kTiles][4], const uint8_t* w,
                                                const uint8_t* a, int tiles, uint32_t flip, int g,
                                                int t) {
  uint32_t words[2 * kDown][4];
#pragma unroll
  for (int half = 0; half < 2 * kDown; ++half)
    load_words(words[half], w + stream_offset<kStreamRow>(half * 8 + g, t));
  uint32_t weights[kDown][Codes::kProducts][4];
#pragma unroll
  for (int down = 0; down < kDown; ++down)
#pragma unroll
    for (int step = 0; step < Codes::kProducts; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weight_halves<Codes>(&weights[down][step][half], &weights[down][step][half + 2],
                             words[2 * down + half], step);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (kTiles > 1 && tile >= tiles) break;
    const int row = tile * 8 + g;
    uint32_t tokens[Codes::kAWords];
    if constexpr (Codes::kAWords == 4) {
      load_words(tokens, a + stream_offset<64>(row, t));
    } else {
      uint32_t halves[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_words(halves[half], a + stream_offset<128>(row, 2 * t + half));
#pragma unroll
      for (int i = 0; i < 8; ++i) tokens[i] = halves[i / 4][i % 4];
    }
#pragma unroll
    for (int step = 0; step < Codes::kProducts; ++step) {
      uint32_t first, second;
      token_halves<Codes>(&first, &second, tokens, step, flip);
#pragma unroll
      for (int down = 0; down < kDown; ++down)
        mma_16832_s8(sums[down][tile], weights[down][step], first, second);
    }
  }
}

// ---- the output --------------------------------------------------------------------------------

// What is said about one output feature.
struct Feature {
  float scale, bias;
  uint32_t colsum;
};

static __device__ __forceinline__ Feature load_feature(const GemmInteger& args, int64_t n) {
  if (n >= args.n) return {0.0f, 0.0f, 0u};
  return {args.w_scale[n], args.bias ? load(args.bias, args.bias_dtype, n) : 0.0f,
          args.a_zero ? static_cast<uint32_t>(args.w_colsum[n]) : 0u};
}

// sum: what the tensor cores made of it, the factors 16 shifted out.
template <class Codes>
__device__ __forceinline__ void store_output(uint32_t sum, const Feature& feature,
                                             const GemmInteger& args, int64_t token, int64_t n) {
  const uint32_t zero =
      args.a_zero ? static_cast<uint32_t>(args.a_zero[token]) - uint32_t{Codes::kOffset} : 0u;
  float y =
      scaled(static_cast<int32_t>(sum - zero * feature.colsum), args.a_scale[token], feature.scale);
  if (args.bias) y = y + feature.bias;
  y = round_to(args.out_dtype, y);
  const int64_t at = token * args.n + n;
  if (args.residual) y = load(args.residual, args.out_dtype, at) + y;
  store(args.out, args.out_dtype, at, y);
}

// ---- the kernel --------------------------------------------------------------------------------

template <class Codes, int kDown, int kTiles>
__global__ void __launch_bounds__(kMostStreamWarps* kWarp, kTiles > 1 ? 1 : 2)
    gemm_stream_kernel(const StreamParams params) {
  constexpr int kRows = 16 * kDown, kSumsRow = stream_sums_row(kRows);
  constexpr int kWBytes = kRows * kStreamRow;
  const GemmInteger& args = params.args;
  FQ_DYNAMIC_SHARED(uint8_t, shared);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int cluster = params.cluster, rank = static_cast<int>(blockIdx.x) % cluster;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / cluster) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * params.tokens;
  const int stage_bytes = kWBytes + params.tokens * Codes::kARow;
  uint8_t* const ring = shared + warp * params.stages * stage_bytes;

  const int slices = (params.w_row_bytes + kStreamRow - 1) / kStreamRow;
  const int splits = params.warps * cluster, split = rank * params.warps + warp;
  const int steps = (slices + splits - 1) / splits;  // the same for all: one past the end is zeros
  StreamLoader<kStreamRow, true> w_loader(args.w, n0, args.n, params.w_row_bytes,
                                          split * kStreamRow, lane);
  StreamLoader<Codes::kARow, false> a_loader(args.a, token0, args.m, params.a_row_bytes,
                                             split * Codes::kARow, lane);
  const auto load_next = [&](int slot) {
    uint8_t* const to = ring + slot * stage_bytes;
    w_loader.load(to, kRows, splits * kStreamRow);
    a_loader.load(to + kWBytes, params.tokens, splits * Codes::kARow);
  };

  // The first weights are on their way to L2, where what an earlier kernel may still write to them
  // is seen, while that kernel ends.
  const int ahead = params.stages - 1;
  for (int step = lane / kRows; step < ahead; step += kWarp / kRows) {
    const int byte = (step * splits + split) * kStreamRow;
    const int64_t n = n0 + lane % kRows;
    if (n < args.n && byte < params.w_row_bytes)
      prefetch_l2(args.w + n * params.w_row_bytes + byte);
  }
  wait_for_earlier_kernels();
#pragma unroll 1
  for (int step = 0; step < ahead; ++step) {
    if (step < steps) load_next(step);
    copy_async_commit();
  }
  // A thread's outputs all belong to one feature: the number of threads is a multiple of kRows.
  const int row = static_cast<int>(threadIdx.x) % kRows;
  const Feature feature = load_feature(args, n0 + row);

  int32_t sums[kDown][kTiles][4] = {};
  int read = 0, write = ahead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait_but(ahead - 1);
    __syncwarp();  // this slice is here for all lanes; the one before it has been read by all
    if (step + ahead < steps) load_next(write);
    copy_async_commit();
    const uint8_t* const slice = ring + read * stage_bytes;
    multiply_stream<Codes>(sums, slice, slice + kWBytes, params.tokens / 8, params.flip, g, t);
    read = read == ahead ? 0 : read + 1;
    write = write == ahead ? 0 : write + 1;
  }
  copy_async_wait<0>();
  __syncwarp();  // from here on the warp's ring is scratch: its sums by token and row of w
  uint32_t* const mine = reinterpret_cast<uint32_t*>(ring);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (kTiles > 1 && tile >= params.tokens / 8) break;
#pragma unroll
    for (int down = 0; down < kDown; ++down)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[(tile * 8 + 2 * t + i % 2) * kSumsRow + down * 16 + g + i / 2 * 8] =
            static_cast<uint32_t>(sums[down][tile][i] >> Codes::kShift);
  }
  __syncthreads();

  uint32_t* const all = reinterpret_cast<uint32_t*>(shared);  // the first warp's
  const int ring_words = params.stages * stage_bytes / 4;
  if (cluster > 1) {  // the block's sums first, for the others to read
#pragma unroll 1
    for (int token = threadIdx.x / kRows; token < params.tokens; token += blockDim.x / kRows) {
      uint32_t sum = 0;
      for (int w = 0; w < params.warps; ++w) sum += all[w * ring_words + token * kSumsRow + row];
      all[token * kSumsRow + row] = sum;
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
  const int per_block = blockDim.x / kRows;  // tokens at once
#pragma unroll 1
  for (int token = rank * per_block + static_cast<int>(threadIdx.x) / kRows; token < params.tokens;
       token += cluster * per_block) {
    const uint32_t* const place = all + token * kSumsRow + row;
    uint32_t sum = 0;
    if (cluster > 1)
      for (int block = 0; block < cluster; ++block) sum += cluster_load(place, block);
    else
      for (int w = 0; w < params.warps; ++w) sum += place[w * ring_words];
    if (n0 + row < args.n && token0 + token < args.m)
      store_output<Codes>(sum, feature, args, token0 + token, n0 + row);
  }
  if (cluster > 1) {  // nobody leaves while its sums are read
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace fq::cuda
