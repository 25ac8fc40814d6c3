// attention_decode on tensor cores, for queries of 16 bits: a pass over packed keys and values.
//
// Floor: the cache is read once: head_dim (k_bits + v_bits) / 8 + 10 bytes per position and cache
// head, 138 at 4 bits and head_dim 128 against 512 in bfloat16. At an H100's 14.5 bytes a clock and
// multiprocessor that is 9.5 clocks a position, of which the products take about 3 and the widening
// of the codes 2.3.
//
// A block takes kTileRows queries of one cache head, which GQA fills with the heads that share it,
// through chunks of kChunk positions; a quarter of a chunk is a warp's, kStep positions at a time.
// Codes go from memory to shared memory by cp.async, a ring of steps for each warp and no barrier
// but the warp's, and from there to registers: attention_codes.cuh.
//
// Left operands are as exact as 16 rows for 8 queries allow: rows 0 to 7 hold a number rounded to
// bfloat16 and rows 8 to 15 what that left over. So queries of both types enter without an error
// and weights with one of 2^-18.
//
// The four warps' sums of a chunk are added in shared memory, by a fixed tree, and stored.
#pragma once

#include "attention_codes.cuh"

namespace fq::cuda {

// ---- from memory to shared memory ---------------------------------------------------------------

// The codes of `rows` rows (up to kStep) that follow each other from `from` on, by one warp.
template <bool kKeys, int kGranule>
static __device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int rows,
                                                 int row_bytes, int pitch, int lane,
                                                 uint64_t policy) {
  const int log = 31 - __clz(pitch / kGranule);
#pragma unroll 1
  for (int i = lane; i < kStep << log; i += kWarp) {
    const int row = i >> log, byte = (i & ((1 << log) - 1)) * kGranule;
    if (byte >= row_bytes || row >= rows) continue;
    copy_async_with_policy<kGranule>(
        to + (kKeys ? key_place(row, byte, pitch) : value_place(row, byte, pitch)),
        from + (row * row_bytes + byte), policy);
  }
}

template <bool kKeys>
static __device__ __forceinline__ void copy_codes(uint8_t* to, const uint8_t* from, int rows,
                                                  int row_bytes, int pitch, int granule, int lane,
                                                  uint64_t policy) {
  if (granule == 16)
    copy_rows<kKeys, 16>(to, from, rows, row_bytes, pitch, lane, policy);
  else if (granule == 8)
    copy_rows<kKeys, 8>(to, from, rows, row_bytes, pitch, lane, policy);
  else
    copy_rows<kKeys, 4>(to, from, rows, row_bytes, pitch, lane, policy);
}

// A step of one warp in shared memory.
struct Step {
  uint8_t *keys, *values;
  float* scales;   // kStep of keys, kStep of values
  uint8_t* zeros;  // likewise

  __device__ __forceinline__ Step(uint8_t* at, int key_pitch, int value_pitch)
      : keys(at),
        values(at + kStep * key_pitch),
        scales(reinterpret_cast<float*>(values + kStep * value_pitch)),
        zeros(reinterpret_cast<uint8_t*>(scales + 2 * kStep)) {}

  // `rows` positions from cache row `row` on; row is -1 if their block does not exist.
  __device__ __forceinline__ void load(const AttentionParams& p, int64_t row, int rows, int lane,
                                       uint64_t policy) const {
    const AttentionDecode& args = p.args;
    const int side = lane / kStep, i = lane % kStep;
    if (row < 0) {
      scales[lane] = quiet_nan();
      return;
    }
    const int d = static_cast<int>(args.head_dim);
    const int key_bytes = static_cast<int>(packed_bytes(d, args.k_bits));
    const int value_bytes = static_cast<int>(packed_bytes(d, args.v_bits));
    copy_codes<true>(keys, args.k_codes + row * key_bytes, rows, key_bytes,
                     row_pitch(p.plan.dim, args.k_bits), p.plan.k_granule, lane, policy);
    copy_codes<false>(values, args.v_codes + row * value_bytes, rows, value_bytes,
                      row_pitch(p.plan.dim, args.v_bits), p.plan.v_granule, lane, policy);
    if (i < rows)
      copy_async_with_policy<4>(scales + lane, (side == 0 ? args.k_scale : args.v_scale) + row + i,
                                policy);
    if (lane < 8 && lane % 4 * 4 < rows)
      copy_async_with_policy<4>(
          zeros + 4 * lane, (lane < 4 ? args.k_zero : args.v_zero) + row + lane % 4 * 4, policy);
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

// Operands of the products with keys: [product][lane] of a[4].
template <int kDim, int kField>
static __device__ __forceinline__ void lay_out_queries(uint4* queries, const AttentionDecode& args,
                                                       int64_t first, int rows) {
  for (int i = threadIdx.x; i < kDim / 16 * kWarp; i += kAttentionThreads) {
    const int s = i / kWarp, g = i % kWarp / 4, t = i % 4;
    uint32_t a[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2], rest[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int element = element_of_key<kDim, kField>(t, s, 2 * half + j);
        x[j] = g < rows && element < args.head_dim
                   ? fq::load(args.q, args.dtype, (first + g) * args.head_dim + element)
                   : 0.0f;
        rest[j] = x[j] - bf16_to_float(float_to_bf16(x[j]));
      }
      a[2 * half] = pack2<kBf16>(x[0], x[1]);
      a[2 * half + 1] = pack2<kBf16>(rest[0], rest[1]);
    }
    queries[i] = make_uint4(a[0], a[1], a[2], a[3]);
  }
}

// The largest score of a query so far, the sum of its weights, and their sums over values.
template <int kDim>
struct Sums {
  float max, weight;
  float of[kDim / 8][4];

  __device__ __forceinline__ void clear() {
    max = kMinusInfinity;
    weight = 0.0f;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) of[j][i] = 0.0f;
  }

  // Positions [position, position + kStep).
  __device__ __forceinline__ void add(const AttentionDecode& args, const Query& query,
                                      const Step& step, const uint4* queries, int32_t position,
                                      int lane) {
    float products[2][4] = {};
    if (args.k_bits == 2)
      multiply_keys<kDim, 2>(products, step.keys, step.zeros, queries, lane);
    else if (args.k_bits <= 4)
      multiply_keys<kDim, 4>(products, step.keys, step.zeros, queries, lane);
    else
      multiply_keys<kDim, 8>(products, step.keys, step.zeros, queries, lane);

    const int t = lane % 4;
    const float4 key_scale = *reinterpret_cast<const float4*>(step.scales + 4 * t);
    const float scale[4] = {key_scale.x, key_scale.y, key_scale.z, key_scale.w};
    float score[4], most = kMinusInfinity;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float product = products[r / 2][r % 2] + products[r / 2][2 + r % 2];
      score[r] = masked(args, query, position + 4 * t + r, product * (scale[r] * args.scaling));
      most = fmaxf(most, score[r]);  // without a NaN: it returns as a weight
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    if (__any_sync(kAllLanes, most > max)) {  // queries whose maximum stays are multiplied by 1
      const float next = fmaxf(most, max), factor = weight_of(max, next);
      max = next;
      weight *= factor;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) of[j][i] *= factor;
    }

    const float4 value_scale = *reinterpret_cast<const float4*>(step.scales + kStep + 4 * t);
    const float scale_of[4] = {value_scale.x, value_scale.y, value_scale.z, value_scale.w};
    float w[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float e = weight_of(score[r], max);
      weight += e;
      w[r] = score[r] == kMinusInfinity ? 0.0f : e * scale_of[r];
    }
    uint32_t a[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high[2];
      a[2 * half] = pack2<kBf16>(w[2 * half], w[2 * half + 1]);
      widen2<kBf16>(a[2 * half], high[0], high[1]);
      a[2 * half + 1] = pack2<kBf16>(w[2 * half] - high[0], w[2 * half + 1] - high[1]);
    }
    if (args.v_bits == 2)
      add_values<kDim, 2>(of, step.values, step.zeros + kStep, a, lane);
    else if (args.v_bits <= 4)
      add_values<kDim, 4>(of, step.values, step.zeros + kStep, a, lane);
    else
      add_values<kDim, 8>(of, step.values, step.zeros + kStep, a, lane);
  }
};

// The warps' sums of a chunk become one: (0 + 2) + (1 + 3). It is then in the second half of
// merge_area, a row of kDim + kSumsPad floats for each query, its max and weight behind those of
// the warps. Barriers inside, and at the end.
template <int kDim>
static __device__ __forceinline__ void merge(Sums<kDim>& sums, float2* merge_area,
                                             float2* statistics, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  sums.weight += __shfl_xor_sync(kAllLanes, sums.weight, 1);
  sums.weight += __shfl_xor_sync(kAllLanes, sums.weight, 2);
  if (t == 0) statistics[warp * kTileRows + g] = make_float2(sums.max, sums.weight);
  __syncthreads();
  float most = kMinusInfinity, weight = 0.0f;
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, statistics[w * kTileRows + g].x);
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) {
    const float2 of_warp = statistics[w * kTileRows + g];
    weight += of_warp.y * weight_of(of_warp.x, most);
  }
  const float factor = weight_of(sums.max, most);
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) sums.of[j][i] = (sums.of[j][i] + sums.of[j][2 + i]) * factor;
#pragma unroll 1
  for (int round = 2; round > 0; --round) {  // warps 2, 3 to 0, 1; then warp 1 to 0
    float2* const area = merge_area + (warp & (round - 1)) * (kDim / 8) * kWarp + lane;
    if (warp >= round && warp < 2 * round)
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        area[j * kWarp] = make_float2(sums.of[j][0], sums.of[j][1]);
    __syncthreads();
    if (warp < round)
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const float2 other = area[j * kWarp];
        sums.of[j][0] += other.x;
        sums.of[j][1] += other.y;
      }
    if (round == 2) __syncthreads();
  }
  if (warp == 0) {
    float* const row = reinterpret_cast<float*>(merge_area + kDim / 8 * kWarp) +
                       g * (kDim + kSumsPad) + 2 * t * (kDim / 8);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) row[i * (kDim / 8) + j] = sums.of[j][i];
    if (t == 0) statistics[kAttentionWarps * kTileRows + g] = make_float2(most, weight);
  }
  __syncthreads();
}

// To the workspace, or as the answer.
template <int kDim>
static __device__ __forceinline__ void store_sums(const AttentionParams& p,
                                                  const float2* merge_area,
                                                  const float2* statistics, int rows,
                                                  int64_t first_query, int64_t first_partial) {
  const float* const sums = reinterpret_cast<const float*>(merge_area + kDim / 8 * kWarp);
  const float2* const of_queries = statistics + kAttentionWarps * kTileRows;
  const int d = static_cast<int>(p.args.head_dim);
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < rows; r += kAttentionWarps) {
    const float2 s = of_queries[r];
    const float factor = s.y == 0.0f ? 0.0f : reciprocal(s.y);
    const int64_t partial = first_partial + r * p.plan.chunks;
    for (int column = threadIdx.x % kWarp; column < d; column += kWarp) {
      const float sum = sums[r * (kDim + kSumsPad) + column];
      if (p.partials)
        p.partials[partial * d + column] = sum;
      else
        fq::store(p.args.out, p.args.dtype, (first_query + r) * d + column, (0.0f + sum) * factor);
    }
    if (p.partials && threadIdx.x % kWarp == 0)
      reinterpret_cast<float2*>(p.statistics)[partial] = s;
  }
}

template <int kDim, int kBlocksPerSm>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksPerSm)
    attention_mma_kernel(const AttentionParams p) {
  FQ_DYNAMIC_SHARED(uint8_t, shared);
  const AttentionDecode& args = p.args;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, stages = p.plan.stages;
  const int key_pitch = row_pitch(kDim, args.k_bits), value_pitch = row_pitch(kDim, args.v_bits);
  const int bytes = stage_bytes(kDim, args.k_bits, args.v_bits);
  uint8_t* const ring = shared + warp * stages * bytes;
  uint4* const queries = reinterpret_cast<uint4*>(shared + kAttentionWarps * stages * bytes);
  float2* const merge_area =
      reinterpret_cast<float2*>(reinterpret_cast<uint8_t*>(queries) + query_bytes(kDim));
  float2* const statistics =
      reinterpret_cast<float2*>(reinterpret_cast<uint8_t*>(merge_area) + merge_bytes(kDim));

  const Place place = place_of(p);
  const uint32_t first_row = (p.first_tile + place.tile) * kTileRows;
  const int rows =
      p.rows - first_row < kTileRows ? static_cast<int>(p.rows - first_row) : kTileRows;
  const Range range = range_of_tile(p, place.b, first_row);
  const Query query = query_of(p, place.b, place.h, first_row + lane / 4);
  const int64_t first_query = (int64_t{place.b} * args.kv_heads + place.h) * p.rows + first_row;
  Sums<kDim> sums;
  sums.clear();

  // Chunks split, split + splits, ... of those with a position in the range.
  const int splits = static_cast<int>(p.plan.splits), begin = range.first / kChunk;
  const int end = (range.end + kChunk - 1) / kChunk;
  const int split = place.split;
  const int first_chunk =
      split + (begin > split ? (begin - split + splits - 1) / splits : 0) * splits;
  const int chunks = first_chunk < end ? (end - first_chunk + splits - 1) / splits : 0;
  if (chunks == 0) {  // for the whole block
    if (!p.partials)
      for (int i = threadIdx.x; i < rows * static_cast<int>(args.head_dim); i += kAttentionThreads)
        fq::store(args.out, args.dtype, first_query * args.head_dim + i, 0.0f);
    return;
  }

  constexpr int kSteps = kChunk / kAttentionWarps / kStep;
  const uint64_t policy = cache_policy(p.plan.tiles == 1);
  const auto position_of = [&](int n) {
    return (first_chunk + n / kSteps * splits) * kChunk + (warp * kSteps + n % kSteps) * kStep;
  };
  const auto wanted = [&](int position) {
    return position < range.end && position + kStep > range.first;
  };
  const auto load_step = [&](int n, int slot) {
    const int position = position_of(n);
    if (n < chunks * kSteps && wanted(position)) {
      const int left = range.end - position;
      Step(ring + slot * bytes, key_pitch, value_pitch)
          .load(p, cache_row(args, place.b, place.h, position), left < kStep ? left : kStep, lane,
                policy);
    }
    copy_async_commit();
  };
  for (int n = 0; n < stages - 1; ++n) load_step(n, n);

  if (args.k_bits == 2)
    lay_out_queries<kDim, 2>(queries, args, first_query, rows);
  else if (args.k_bits <= 4)
    lay_out_queries<kDim, 4>(queries, args, first_query, rows);
  else
    lay_out_queries<kDim, 8>(queries, args, first_query, rows);
  __syncthreads();

  int read = 0, write = stages - 1;
#pragma unroll 1
  for (int n = 0; n < chunks * kSteps; ++n) {
    if (stages == 3)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncwarp();  // this step is here for all lanes; the one before it has been read by all
    load_step(n + stages - 1, write);
    const int position = position_of(n);
    if (wanted(position))
      sums.add(args, query, Step(ring + read * bytes, key_pitch, value_pitch), queries, position,
               lane);
    read = read + 1 == stages ? 0 : read + 1;
    write = write + 1 == stages ? 0 : write + 1;
    if (n % kSteps == kSteps - 1) {
      merge(sums, merge_area, statistics, warp, lane);
      const int chunk = first_chunk + n / kSteps * splits;
      store_sums<kDim>(p, merge_area, statistics, rows, first_query,
                       partial_at(p, place.b, place.h, place.tile * kTileRows, chunk));
      sums.clear();
    }
  }
  copy_async_wait<0>();
}

}  // namespace fq::cuda
