// attention_decode: out = softmax(q k^T * scaling + mask) v over a packed cache.
//
//   attention_mma_kernel      queries of 16 bits: attention_mma.cuh
//   attention_general_kernel  float32, any head_dim, width and alignment: fma in float32
//   attention_join_kernel     adds the chunks' sums, where there are several
//
// The first two give the same thing: for every chunk of kChunk positions and every query the
// largest score m, the weight l = sum e^(score - m) and the sums e^(score - m) v. The answer is
//
//   sum_c e^(m_c - M) sums_c / sum_c e^(m_c - M) l_c,   M = max m_c
//
// over chunks c in ascending order (weights: by c % 128, then a fixed tree). Chunks are counted
// from position 0 and those that the query may not attend to add nothing, so neither the number of
// blocks, nor the batch, nor a larger planned length changes a bit.
//
// Bound, with S the largest |score|, n positions and u = 2^-24: an answer is within
//   2 (u (2 (head_dim + 8) S + 24 + n / 16) + 2^-17 if q has 16 bits) max |v|
// of the exact one, before it is rounded to T.
#include "attention.cuh"

namespace fq::cuda {
namespace {

constexpr int kThreads = kAttentionThreads;
constexpr int kPart = 16;  // products summed up before they join a total

// ---- any sizes ---------------------------------------------------------------------------------

static __device__ __forceinline__ float code_less_zero(const uint8_t* row, int bits, int64_t i,
                                                       float zero) {
  const int32_t code = bits == 2   ? crumb(row[i / 4], i)
                       : bits <= 4 ? nibble(row[i / 2], i)
                                   : row[i];
  return static_cast<float>(code) - zero;
}

__global__ void __launch_bounds__(kThreads, 4) attention_general_kernel(const AttentionParams p) {
  __shared__ float scores[kTileRows][kChunk];  // then weights times the values' scales
  __shared__ int64_t rows[kChunk];             // of the cache; -1: no such block
  __shared__ float2 statistics[kTileRows];
  __shared__ __align__(16) unsigned char query_bytes[kTileRows * sizeof(Query)];
  Query* const queries = reinterpret_cast<Query*>(query_bytes);
  const AttentionDecode& args = p.args;
  const int64_t d = args.head_dim;
  const int64_t key_bytes = packed_bytes(d, args.k_bits),
                value_bytes = packed_bytes(d, args.v_bits);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Place place = place_of(p);
  const uint32_t first_row = (p.first_tile + place.tile) * kTileRows;
  const Range range = range_of_tile(p, place.b, first_row);
  const int splits = static_cast<int>(p.plan.splits);
  bool answered = false;
  if (threadIdx.x < kTileRows)
    queries[threadIdx.x] = query_of(p, place.b, place.h, first_row + threadIdx.x);
  __syncthreads();

  for (int chunk = place.split; chunk * kChunk < range.end; chunk += splits) {
    if ((chunk + 1) * kChunk <= range.first) continue;
    for (int j = threadIdx.x; j < kChunk; j += kThreads) {
      const int32_t position = chunk * kChunk + j;
      const bool inside = position >= range.first && position < range.end;
      const int64_t row = inside ? cache_row(args, place.b, place.h, position) : -1;
      rows[j] = row;
      const uint8_t* const codes = args.k_codes + row * key_bytes;
      const float zero = row < 0 ? 0.0f : static_cast<float>(args.k_zero[row]);
      const float scale = row < 0 ? quiet_nan() : args.k_scale[row] * args.scaling;
#pragma unroll 1
      for (int r = 0; r < kTileRows; ++r) {
        const Query& query = queries[r];
        float sum = 0.0f;
        if (query.at >= 0 && row >= 0)
          for (int64_t i0 = 0; i0 < d; i0 += kPart) {
            float part = 0.0f;
            for (int64_t i = i0; i < d && i < i0 + kPart; ++i)
              part = fma(load(args.q, args.dtype, query.at * d + i),
                         code_less_zero(codes, args.k_bits, i, zero), part);
            sum = sum + part;
          }
        scores[r][j] = masked(args, query, position, sum * scale);
      }
    }
    __syncthreads();
    for (int r = warp; r < kTileRows; r += kThreads / kWarp) {
      float most = kMinusInfinity, weight = 0.0f;
      for (int j = lane; j < kChunk; j += kWarp) most = fmaxf(most, scores[r][j]);
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
      for (int j = lane; j < kChunk; j += kWarp) {
        const float score = scores[r][j],
                    e = exponential(score - (most == kMinusInfinity ? 0.0f : most));
        const bool allowed = score != kMinusInfinity;
        weight += allowed ? e : 0.0f;
        const float scale = rows[j] < 0 ? quiet_nan() : args.v_scale[rows[j]];
        scores[r][j] = allowed ? e * scale : 0.0f;
      }
      weight = warp_sum(weight);
      if (lane == 0) statistics[r] = make_float2(most, weight);
    }
    __syncthreads();
    for (int64_t column = threadIdx.x; column < d; column += kThreads) {
      float sums[kTileRows] = {};
      for (int j0 = 0; j0 < kChunk; j0 += kPart) {
        float part[kTileRows] = {};
        for (int j = j0; j < j0 + kPart; ++j) {
          const int32_t position = chunk * kChunk + j;
          if (position < range.first || position >= range.end) continue;
          const int64_t row = rows[j];
          const float v = row < 0 ? 0.0f
                                  : code_less_zero(args.v_codes + row * value_bytes, args.v_bits,
                                                   column, static_cast<float>(args.v_zero[row]));
#pragma unroll
          for (int r = 0; r < kTileRows; ++r) part[r] = fma(scores[r][j], v, part[r]);
        }
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) sums[r] = sums[r] + part[r];
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const Query& query = queries[r];
        if (query.at < 0) continue;
        const float2 s = statistics[r];
        if (p.partials)
          p.partials[partial_at(p, place.b, place.h, place.tile * kTileRows + r, chunk) * d +
                     column] = sums[r];
        else
          store(args.out, args.dtype, query.at * d + column,
                (0.0f + sums[r]) * (s.y == 0.0f ? 0.0f : reciprocal(s.y)));
      }
    }
    if (p.partials && threadIdx.x < kTileRows)
      reinterpret_cast<float2*>(p.statistics)[partial_at(
          p, place.b, place.h, place.tile * kTileRows + threadIdx.x, chunk)] =
          statistics[threadIdx.x];
    answered = true;
    __syncthreads();  // the next chunk uses the same shared memory
  }
  if (!answered && !p.partials)
    for (int r = 0; r < kTileRows; ++r) {
      const Query& query = queries[r];
      for (int64_t column = threadIdx.x; query.at >= 0 && column < d; column += kThreads)
        store(args.out, args.dtype, query.at * d + column, 0.0f);
    }
}

// ---- the sums of chunks -------------------------------------------------------------------------

// A block per query.
__global__ void __launch_bounds__(kThreads) attention_join_kernel(const AttentionParams p) {
  __shared__ float factors[kThreads];
  __shared__ float shared[kThreads / kWarp];
  const AttentionDecode& args = p.args;
  const uint32_t rows_of_launch = p.tiles * kTileRows, head = blockIdx.x / rows_of_launch;
  const uint32_t row = blockIdx.x - head * rows_of_launch;
  const uint32_t heads = static_cast<uint32_t>(args.kv_heads), b = head / heads,
                 h = head - b * heads;
  const int64_t d = args.head_dim;
  const Query query = query_of(p, b, h, p.first_tile * kTileRows + row);
  if (query.at < 0) return;
  // Chunks of the query's own range: the others hold nothing, or were never written.
  const bool any = query.range.first < query.range.end;
  const int first = any ? query.range.first / kChunk : 0;
  const int end = any ? (query.range.end + kChunk - 1) / kChunk : 0;
  const int64_t base = partial_at(p, b, h, row, 0);
  const float2* const statistics = reinterpret_cast<const float2*>(p.statistics) + base;
  const float* const partials = p.partials + base * d;

  float most = kMinusInfinity;
  for (int c = first + threadIdx.x; c < end; c += kThreads) most = fmaxf(most, statistics[c].x);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) most = fmaxf(most, shared[warp]);
  __syncthreads();  // shared is used again

  float weight = 0.0f;
  for (int c = first / kThreads * kThreads + threadIdx.x; c < end; c += kThreads)
    if (c >= first) weight += statistics[c].y * weight_of(statistics[c].x, most);
  weight = block_sum<kThreads>(weight, shared);
  const float inverse = weight == 0.0f ? 0.0f : reciprocal(weight);

  // Columns in rounds of kThreads; every round goes through the chunks, kThreads factors at a time.
  for (int64_t column0 = 0; column0 < d; column0 += kThreads) {
    const int64_t column = column0 + threadIdx.x;
    float sum = 0.0f;
    for (int c0 = first; c0 < end; c0 += kThreads) {
      const int count = end - c0 < kThreads ? end - c0 : kThreads;
      __syncthreads();  // the factors before these have been used
      if (static_cast<int>(threadIdx.x) < count)
        factors[threadIdx.x] = weight_of(statistics[c0 + threadIdx.x].x, most);
      __syncthreads();
      if (column < d)
#pragma unroll 8
        for (int c = 0; c < count; ++c) sum = fma(factors[c], partials[(c0 + c) * d + column], sum);
    }
    if (column < d) store(args.out, args.dtype, query.at * d + column, sum * inverse);
  }
}

// ---- the host -----------------------------------------------------------------------------------

int32_t alignment_of(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  return address % 16 == 0 ? 16 : static_cast<int32_t>(address & (~address + 1));
}

AttentionPlan plan_of(const AttentionDecode& args) {
  const int32_t of_keys = alignment_of(args.k_zero), of_values = alignment_of(args.v_zero);
  return plan_attention(current_gpu(),
                        {args.batch, args.heads, args.kv_heads, args.tq, args.length, args.head_dim,
                         args.capacity, args.k_bits, args.v_bits, args.dtype,
                         args.block_table != nullptr, alignment_of(args.k_codes),
                         alignment_of(args.v_codes), of_keys < of_values ? of_keys : of_values});
}

}  // namespace

int64_t attention_decode_workspace(const AttentionDecode& args) {
  return plan_of(args).workspace_bytes;
}

int attention_decode(const AttentionDecode& args, void* workspace, void* stream) {
  const AttentionPlan plan = plan_of(args);
  if (plan.kernel == AttentionKernel::kNone) return static_cast<int>(cudaErrorNotSupported);
  const int64_t heads = args.batch * args.kv_heads;
  const uint32_t group = static_cast<uint32_t>(args.heads / args.kv_heads);
  const uint32_t queries = static_cast<uint32_t>(group * args.tq);
  AttentionParams params{args, plan, nullptr, nullptr, 0, 0, group, queries};
  for (int64_t first = 0; first < plan.tiles; first += plan.tiles_at_a_time) {
    const int64_t left = plan.tiles - first;
    params.first_tile = static_cast<uint32_t>(first);
    params.tiles = static_cast<uint32_t>(left < plan.tiles_at_a_time ? left : plan.tiles_at_a_time);
    const int64_t rows = heads * params.tiles * kTileRows;
    if (plan.workspace_bytes > 0) {
      params.partials = static_cast<float*>(workspace);
      params.statistics = params.partials + rows * plan.chunks * args.head_dim;
    }
    if (plan.kernel == AttentionKernel::kMma) {
      const int error = attention_mma(params, stream);
      if (error != 0) return error;
    } else {
      FQ_LAUNCH(attention_general_kernel, static_cast<unsigned>(heads * params.tiles * plan.splits),
                unsigned{kThreads}, 0, stream, params);
    }
    if (params.partials)
      FQ_LAUNCH(attention_join_kernel, static_cast<unsigned>(rows), unsigned{kThreads}, 0, stream,
                params);
    const int error = static_cast<int>(cudaGetLastError());
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace fq::cuda
