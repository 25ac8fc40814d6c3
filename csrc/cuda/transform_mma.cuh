// The Kronecker transform on tensor cores: x -> [silu(gate) x] -> [times c] -> Y = P1^T X P2 ->
// codes or numbers, in one kernel, for 16-bit T.
//
// A block works on `tokens` rows of x at a time, and then on the next ones: the factors are read
// once. Warps own row tiles of Y, 16 rows each, one or two of them; what a warp needs beside its
// rows of P1^T is all of X and P2, so it holds its rows from the first product to the codes:
//
//   X [n1, n2]   shared memory, from cp.async           ldmatrix.trans -> operand B
//   S = P1^T X   sums -> rounded to T, in pairs: exactly operand A of the next product
//   Y = S P2     sums -> range -> (one exchange with the other warps) -> codes -> memory
//
// Two row tiles a warp use every operand B twice, which halves what is read of shared memory: its
// bandwidth is the limit where n2 >= 128. Sizes are padded with zeros to multiples of 16; zeros
// change no range, because ranges include 0 and because a NaN or an Inf reaches real channels too.
//
// Only the first product reads X. Right after it the next token's copies start, into the same
// place: they have the second product, the codes and the other blocks' work to arrive in.
//
// Where shared memory is short, P1^T is read from global memory (L2) as it is needed, and P2 in
// slices of 16 rows, one ahead: for the kernels with one row tile a warp.
//
// Few tokens, sm_90: a cluster of blocks shares a token. Each has all of X and P2, and some row
// tiles; they exchange ranges through distributed shared memory. The sum of squares is computed by
// all of them. Older GPUs have no clusters: there a token stays in one block. Nothing depends on
// how many warps or blocks share a token: results are the same bit for bit.
#pragma once

#include "transform_load.cuh"
#include "transform_store.cuh"

namespace fq::cuda {

struct TransformParams {
  TransformArgs args;
  TransformPlan plan;
  // What follows from them.
  TransformShared at;
  ChunkWalk copies, eights;  // of copy_token, prepare_token
  int32_t tiles_per_block, groups_of_blocks;
  bool left_vectors, right_vectors, prepares, only_squares;
};

// ---- the products ------------------------------------------------------------------------------

// S = round_T(P1^T X) of kTiles row tiles, as operands A of the second product.
template <Dtype kType, int kColumns, int kTiles, int kMost>
static __device__ __forceinline__ void first_product(const Factor& left, const uint8_t* left_shared,
                                                     int first_tile, int steps, int pitch,
                                                     const uint8_t* slot, int lane,
                                                     uint32_t (&s)[kMost][kColumns][4]) {
  constexpr bool kMayStream = kMost == 1;
  float sum[kTiles][2 * kColumns][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < 2 * kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.0f;

  // From shared memory, or, one step ahead, from global memory.
  const uint4* fragments = reinterpret_cast<const uint4*>(left_shared) + lane;
  const uint8_t* x = slot + (lane & 15) * pitch + (lane >> 4) * 16;
  uint4 ahead = {};
  if (kMayStream && !left_shared) ahead = left_fragment<kType>(left, first_tile, 0, lane);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint4 fragment = ahead;
      if (!kMayStream || left_shared) fragment = fragments[m * steps * kWarp];
      a[m][0] = fragment.x;
      a[m][1] = fragment.y;
      a[m][2] = fragment.z;
      a[m][3] = fragment.w;
    }
    if (kMayStream && !left_shared && step + 1 < steps)
      ahead = left_fragment<kType>(left, first_tile, step + 1, lane);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, x + 32 * c);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_16816<kType>(sum[m][2 * c], a[m], b[0], b[1]);
        mma_16816<kType>(sum[m][2 * c + 1], a[m], b[2], b[3]);
      }
    }
    fragments += kWarp;
    x += 16 * pitch;
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[m][c][i] =
            pack2<kType>(sum[m][2 * c + i / 2][i % 2 * 2], sum[m][2 * c + i / 2][i % 2 * 2 + 1]);
}

// Without a left factor: X itself, as operand A.
template <int kColumns, int kMost>
static __device__ __forceinline__ void rows_of_x(int tiles, int first_tile, int pitch,
                                                 const uint8_t* slot, int lane,
                                                 uint32_t (&s)[kMost][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kMost; ++m)
    if (m < tiles) {
      const uint8_t* const x =
          slot + (16 * (first_tile + m) + (lane & 15)) * pitch + (lane >> 4) * 16;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) ldmatrix_x4(s[m][c], x + 32 * c);
    }
}

// Y += S P2, for 16 rows of P2 and columns 16 kFrom .. 16 kEnd.
template <Dtype kType, int kColumns, int kTiles, int kFrom, int kEnd, int kMost>
static __device__ __forceinline__ void multiply_slice(const uint32_t (&s)[kMost][kColumns][4],
                                                      int step, const uint8_t* slice, int lane,
                                                      float (&y)[kMost][2 * kColumns][4]) {
#pragma unroll
  for (int pair = kFrom; pair < kEnd; ++pair) {
    const uint4 b = reinterpret_cast<const uint4*>(slice + pair * kFragmentBytes)[lane];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      mma_16816<kType>(y[m][2 * pair], s[m][step], b.x, b.y);
      mma_16816<kType>(y[m][2 * pair + 1], s[m][step], b.z, b.w);
    }
  }
}

// ---- the kernel --------------------------------------------------------------------------------

template <Dtype kType, int kColumns, int kMost, int kWarps, int kBlocks>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    transform_kernel(const TransformParams p) {
  constexpr int kSlice = kColumns * kFragmentBytes;
  constexpr bool kMayStream = kMost == 1;
  const TransformPlan& plan = p.plan;
  const KroneckerQuantize& args = p.args.quantize;
  const bool has_left = args.transform.left, has_right = args.transform.right;
  FQ_DYNAMIC_SHARED(uint8_t, shared);

  // Who does what.
  int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int group = warp / plan.warps;  // which of the block's tokens
  TokenWarps warps{warp % plan.warps, plan.warps, lane};
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int block_first = rank * p.tiles_per_block;
  const int block_tiles = min(p.tiles_per_block, plan.row_tiles - block_first);
  const int local_tile = warps.member * plan.tiles_per_warp;
  const int first_tile = block_first + local_tile;
  const int tiles = max(0, min(plan.tiles_per_warp, block_tiles - local_tile));

  // Where things are.
  const TokenShape shape{static_cast<int>(args.transform.n1), static_cast<int>(args.transform.n2),
                         plan.row_tiles, p.at.pitch};
  uint8_t* const slot = shared + p.at.tokens + group * p.at.slot;
  float* const squares = reinterpret_cast<float*>(shared + p.at.squares) + group * plan.row_tiles;
  const int64_t row_bytes = 2 * args.stride;  // of x and gate
  const uint8_t* const x = static_cast<const uint8_t*>(args.x);
  const uint8_t* const gate = static_cast<const uint8_t*>(args.gate);
  // rows < 2^31, and a stride more fits as well.
  const uint32_t stride = p.groups_of_blocks * plan.tokens, token_end = args.rows;
  uint32_t block_token = blockIdx.x / plan.cluster * plan.tokens;
  const auto start_copies = [&](uint32_t token) {
    if (token < token_end) {
      const uint8_t* const from = x + token * row_bytes;
      const uint8_t* const gate_from = gate ? gate + token * row_bytes : nullptr;
      if (shape.n2 % 8 == 0)
        copy_token<16>(from, gate_from, shape, p.copies, warps, slot);
      else
        copy_token<8>(from, gate_from, shape, p.copies, warps, slot);
    }
    copy_async_commit();
  };

  // Before the first token: copies, the factors, zeros.
  start_copies(block_token + group);
  const Factor left{args.transform.left, args.transform.left_dtype, shape.n1, p.left_vectors};
  const Factor right{args.transform.right, args.transform.right_dtype, shape.n2, p.right_vectors};
  uint8_t* const slices = shared + p.at.right;
  if (has_left && plan.left_shared)
    keep_left<kType>(left, block_first, block_tiles, plan.row_tiles, shared);
  if (has_right) keep_right<kType, kColumns>(right, plan.right_shared ? kColumns : 2, slices);
  clear_margins(shape, kColumns, warps, slot);
  if (plan.cluster > 1) {  // all blocks have begun: they may write to each other
    cluster_arrive();
    cluster_wait();
  }

  int parity = 0;  // of the exchange of ranges
  int side = 0;    // where the next slice of P2 is, if they come one by one
#pragma unroll 1
  for (; block_token < token_end; block_token += stride) {
    lane = opaque(lane);
    warps.lane = lane;
    const uint32_t token = block_token + group;
    const bool active = token < token_end;
    copy_async_wait<0>();
    if (active && p.prepares) {
      __syncwarp();
      if (p.only_squares)
        square_token<kType, kColumns>(shape, warps, slot, squares);
      else
        prepare_token<kType>(
            {gate ? gate + token * row_bytes : nullptr, args.rms, args.transform.channel_scale},
            shape, p.eights, warps, slot, squares);
    }
    __syncthreads();
    const bool writes_scale = active && warps.member == 0 && rank == 0;
    float sum_of_squares = 0.0f;
    if (writes_scale && args.rms)
      sum_of_squares = warp_sum(lane < plan.row_tiles ? squares[lane] : 0.0f);

    // The products.
    const int mine = active ? tiles : 0;
    uint32_t s[kMost][kColumns][4];
    const auto clear_from = [&](int first) {
#pragma unroll
      for (int m = 0; m < kMost; ++m)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (m >= first) s[m][c][i] = 0;
    };
    if (has_left) {
      const uint8_t* const my_left =
          plan.left_shared ? shared + local_tile * plan.row_tiles * kFragmentBytes : nullptr;
      if (mine == 1) {
        clear_from(1);
        first_product<kType, kColumns, 1>(left, my_left, first_tile, plan.row_tiles, p.at.pitch,
                                          slot, lane, s);
      } else if (kMost == 2 && mine == 2) {
        first_product<kType, kColumns, kMost>(left, my_left, first_tile, plan.row_tiles, p.at.pitch,
                                              slot, lane, s);
      } else {
        clear_from(0);
      }
    } else {
      clear_from(0);
      rows_of_x<kColumns>(mine, first_tile, p.at.pitch, slot, lane, s);
    }
    __syncthreads();  // all are through with X
    start_copies(token + stride);
    lane = opaque(lane);
    float y[kMost][2 * kColumns][4];
    const auto clear_y = [&] {
#pragma unroll
      for (int m = 0; m < kMost; ++m)
#pragma unroll
        for (int n = 0; n < 2 * kColumns; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) y[m][n][i] = 0.0f;
    };
    if (has_right) {
      if constexpr (kMayStream) {
        // The next slice, if it has to come, does so in two halves, while half of this one is used.
        // Columns of zeros are there already, and all of the first half are columns of P2.
        constexpr int kHalf = kColumns / 2, kUnits = 16 * kColumns;
        const bool moves = !plan.right_shared && threadIdx.x < kUnits;
        clear_y();
#pragma unroll
        for (int step = 0; step < kColumns; ++step) {
          const int next = step + 1 < kColumns ? step + 1 : 0;
          const bool whole = next < fewer_column_tiles(kColumns);
          const int unit = opaque(threadIdx.x);
          const bool moves_second = moves && column_of_unit(unit + kUnits) < shape.n2;
          const uint8_t* const slice = slices + (plan.right_shared ? step * kSlice : side);
          side = kSlice - side;
          uint8_t* const other = slices + side;
          RightUnit ahead;
          if (moves) ahead = load_right(right, next, unit, whole);
          if (mine == 1) multiply_slice<kType, kColumns, 1, 0, kHalf>(s, step, slice, lane, y);
          if (moves) store_right<kType, kColumns>(ahead, unit, other);
          if (moves_second) ahead = load_right(right, next, unit + kUnits, whole);
          if (mine == 1)
            multiply_slice<kType, kColumns, 1, kHalf, kColumns>(s, step, slice, lane, y);
          if (moves_second) store_right<kType, kColumns>(ahead, unit + kUnits, other);
          if (!plan.right_shared) __syncthreads();
        }
      } else {
        if (mine == 1) {
          clear_y();
#pragma unroll
          for (int step = 0; step < kColumns; ++step)
            multiply_slice<kType, kColumns, 1, 0, kColumns>(s, step, slices + step * kSlice, lane,
                                                            y);
        } else if (mine == 2) {
          clear_y();
#pragma unroll
          for (int step = 0; step < kColumns; ++step)
            multiply_slice<kType, kColumns, kMost, 0, kColumns>(s, step, slices + step * kSlice,
                                                                lane, y);
        } else {
          clear_y();
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kMost; ++m) {
        gather_channels(s[m], lane);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            widen2<kType>(s[m][c][i], y[m][2 * c + i / 2][i % 2 * 2],
                          y[m][2 * c + i / 2][i % 2 * 2 + 1]);
      }
    }

    lane = opaque(lane);
    const auto out_of = [&](int m, int half, uint8_t* token_out, int unit) {
      const int row = 16 * (first_tile + m) + 8 * half + lane / 4;
      return row_out(token_out, row, shape.n2, 16 * kColumns, unit, lane);
    };
    const auto is_row = [&](int m, int half) {
      return 16 * (first_tile + m) + 8 * half + lane / 4 < shape.n1;
    };
    if (p.args.out) {
      const bool float32 = p.args.out_dtype == Dtype::kFloat32;
      const int size = float32 ? 4 : 2;
      uint8_t* const out = static_cast<uint8_t*>(p.args.out) + token * args.k * size;
#pragma unroll
      for (int m = 0; m < kMost; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (m < mine && is_row(m, half))
            store_numbers<kType, kColumns>(float32, y[m], half, out_of(m, half, out, 2 * size));
    } else {
      // The range of the token, from all its warps.
      LaneRange range;
#pragma unroll
      for (int m = 0; m < kMost; ++m)
        if (m < mine)
#pragma unroll
          for (int n = 0; n < 2 * kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) range.add(y[m][n][i]);
      range = warp_range(range);
      uint2* const entries = reinterpret_cast<uint2*>(shared + p.at.ranges) +
                             (parity * plan.tokens + group) * kRangeEntries;
      parity ^= 1;
      uint2* const entry = entries + rank * plan.owners + warps.member;
      const bool brings = warps.member < plan.owners;
      if (plan.cluster > 1) {
        if (brings && lane < plan.cluster) {
          cluster_store(static_cast<uint32_t>(range.above), &entry->x, lane);
          cluster_store(range.below, &entry->y, lane);
        }
        cluster_arrive();
        cluster_wait();
      } else {
        if (brings && lane == 0)
          *entry = make_uint2(static_cast<uint32_t>(range.above), range.below);
        __syncthreads();
      }
      if (active && lane < plan.cluster * plan.owners)
        range.add({static_cast<int32_t>(entries[lane].x), entries[lane].y});
      range = warp_range(range);

      // Scale, zero, codes.
      Grid grid = args.grid;
      grid.bits = opaque(grid.bits);
      const RowCoder coder = row_coder(grid, range, load_clip(args.clip));
      if (writes_scale && lane == 0) {
        args.scale[token] = args.rms
                                ? coder.scale * rms_reciprocal(sum_of_squares, args.k, args.rms_eps)
                                : coder.scale;
        if (args.zero) args.zero[token] = coder.zero;
      }
      const bool bytes = codes_are_bytes(grid);
      const CodePacker pack = code_packer(bytes);
      uint8_t* const codes = args.codes + token * (bytes ? args.k : args.k / 2);
#pragma unroll
      for (int m = 0; m < kMost; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (m < mine)
            store_codes<kColumns>(coder, pack, bytes, y[m], half,
                                  out_of(m, half, codes, bytes ? 2 : 1), is_row(m, half));
    }
  }
  copy_async_wait<0>();
}

// ---- the launch --------------------------------------------------------------------------------

template <Dtype kType, int kIndex = 0>
int launch_transform(const TransformParams& p, void* stream) {
  constexpr TransformKernel kKernel = kTransformKernels[kIndex];
  if constexpr (kIndex + 1 < sizeof kTransformKernels / sizeof(TransformKernel)) {
    if (p.plan.column_tiles != kKernel.column_tiles)
      return launch_transform<kType, kIndex + 1>(p, stream);
  }
  const auto kernel = transform_kernel<kType, kKernel.column_tiles, kKernel.tiles_per_warp,
                                       kKernel.warps, kKernel.blocks>;
  const int error = allow_shared(kernel, p.plan.shared_bytes);
  if (error != 0) return error;
  const unsigned blocks = static_cast<unsigned>(p.plan.blocks);
  if (p.plan.cluster > 1)
    FQ_LAUNCH_CLUSTER(kernel, blocks, p.plan.threads, p.plan.cluster, p.plan.shared_bytes, stream,
                      p);
  else
    FQ_LAUNCH(kernel, blocks, p.plan.threads, p.plan.shared_bytes, stream, p);
  return static_cast<int>(cudaGetLastError());
}

template <Dtype kType>
int launch_transform(const TransformArgs& args, const TransformPlan& plan, void* stream) {
  const TransformQuery query = query_of(args);
  const int32_t n2 = static_cast<int32_t>(query.n2);
  TransformParams p{};
  p.args = args;
  p.plan = plan;
  p.at = transform_shared(plan, query.left, query.right);
  p.copies = chunk_walk(n2 % 8 == 0 ? n2 / 8 : n2 / 4);
  p.eights = chunk_walk((n2 + 7) / 8);
  p.tiles_per_block = tiles_per_block(plan);
  p.groups_of_blocks = static_cast<int32_t>(plan.blocks / plan.cluster);
  p.left_vectors = query.left_vectors;
  p.right_vectors = query.right_vectors;
  const bool changes_x = args.quantize.gate || args.quantize.transform.channel_scale;
  p.prepares = changes_x || args.quantize.rms;
  p.only_squares = !changes_x && plan.squares_by_mma;
  return launch_transform<kType>(p, stream);
}

}  // namespace fq::cuda
