// What the kernels of attention_decode share: the queries of a tile, what each may attend to, and
// where the sums of a chunk go. plan_attention.h says what chunks and tiles are.
#pragma once

#include "../ops.h"
#include "launch.cuh"
#include "plan_attention.h"
#include "ptx.cuh"

namespace fq::cuda {

struct AttentionParams {
  AttentionDecode args;
  AttentionPlan plan;
  float* partials;    // [heads of the cache, rows of a launch, chunks, head_dim]; null: one chunk
  float* statistics;  // [heads of the cache, rows of a launch, chunks, 2]: max, weight
  uint32_t first_tile, tiles;  // of this launch
  uint32_t group, rows;        // heads, and queries, that read one cache head
};

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMinusInfinity = -__builtin_inff();

// e^(x - max) for x <= max; 0 for x = -Inf, NaN for a NaN. max is finite, or nothing was allowed.
static __device__ __forceinline__ float weight_of(float x, float max) {
  return fast_exp2((x - (max == kMinusInfinity ? 0.0f : max)) * kLog2E);
}

// Positions [first, end).
struct Range {
  int32_t first, end;
};

// What query i of tq of a sequence may attend to, but for the mask.
static __device__ __forceinline__ Range range_of(const AttentionDecode& args, int64_t b,
                                                 int32_t i) {
  int32_t end = static_cast<int32_t>(args.length);
  if (args.lengths) {
    const int32_t used = args.lengths[b];
    end = (used < end ? used : end) - static_cast<int32_t>(args.tq) + 1 + i;
    if (end < 0) end = 0;
  }
  const bool cut = args.window > 0 && args.window < end;
  return {cut ? end - static_cast<int32_t>(args.window) : 0, end};
}

// One query of a tile: row `row` of those that read one cache head, which are consecutive in q.
// Numbers of queries and heads have 32 bits: 64-bit divisions take their time.
struct Query {
  int64_t at;         // its row in q; -1: there is none
  int64_t mask_base;  // of position 0, in elements
  Range range;
};

static __device__ __forceinline__ Query query_of(const AttentionParams& p, uint32_t b, uint32_t h,
                                                 uint32_t row) {
  const AttentionDecode& args = p.args;
  const uint32_t tq = static_cast<uint32_t>(args.tq);
  if (row >= p.rows) return {-1, 0, {0, 0}};
  const uint32_t of_group = row / tq, i = row - of_group * tq;
  const int64_t head = h * p.group + of_group;
  return {(int64_t{b} * args.kv_heads + h) * p.rows + row,
          b * args.mask_strides[0] + head * args.mask_strides[1] + i * args.mask_strides[2],
          range_of(args, b, static_cast<int32_t>(i))};
}

// The union of the ranges of a tile's queries.
static __device__ __forceinline__ Range range_of_tile(const AttentionParams& p, uint32_t b,
                                                      uint32_t first_row) {
  const AttentionDecode& args = p.args;
  if (!args.lengths) return range_of(args, b, 0);
  const uint32_t tq = static_cast<uint32_t>(args.tq);
  uint32_t i = first_row % tq;
  Range all{INT32_MAX, 0};
  for (uint32_t r = first_row; r < first_row + kTileRows && r < p.rows; ++r) {
    const Range one = range_of(args, b, static_cast<int32_t>(i));
    i = i + 1 == tq ? 0 : i + 1;
    if (one.first >= one.end) continue;
    all.first = one.first < all.first ? one.first : all.first;
    all.end = one.end > all.end ? one.end : all.end;
  }
  return all.end == 0 ? Range{0, 0} : all;
}

// The score of an allowed position with the mask added; -Inf where the query may not attend.
static __device__ __forceinline__ float masked(const AttentionDecode& args, const Query& query,
                                               int32_t position, float score) {
  if (position < query.range.first || position >= query.range.end) return kMinusInfinity;
  if (args.mask_kind == Mask::kNone) return score;
  const int64_t at = query.mask_base + position * args.mask_strides[3];
  if (args.mask_kind == Mask::kBool)
    return static_cast<const uint8_t*>(args.mask)[at] ? score : kMinusInfinity;
  const float added = load(args.mask, args.mask_dtype, at);
  return added == kMinusInfinity ? kMinusInfinity : score + added;
}

// Row of the cache, codes and scales alike, that holds a position; -1: its block does not exist.
static __device__ __forceinline__ int64_t cache_row(const AttentionDecode& args, int64_t b,
                                                    int64_t h, int32_t position) {
  if (!args.block_table) return (b * args.kv_heads + h) * args.capacity + position;
  const uint32_t size = static_cast<uint32_t>(args.capacity);
  const uint32_t index = static_cast<uint32_t>(position) / size;
  const int32_t block = args.block_table[b * args.max_blocks + index];
  if (block < 0 || block >= args.blocks) return -1;
  return (block * args.kv_heads + h) * args.capacity +
         (static_cast<uint32_t>(position) - index * size);
}

// Where a block works.
struct Place {
  uint32_t b, h, tile;  // tile: of this launch
  int32_t split;
};

static __device__ __forceinline__ Place place_of(const AttentionParams& p) {
  const uint32_t block = blockIdx.x, splits = static_cast<uint32_t>(p.plan.splits);
  const uint32_t pair = block / splits, head = pair / p.tiles;
  const uint32_t b = head / static_cast<uint32_t>(p.args.kv_heads);
  return {b, head - b * static_cast<uint32_t>(p.args.kv_heads), pair - head * p.tiles,
          static_cast<int32_t>(block - pair * splits)};
}

// Index into the statistics, in pairs, and into the partials, in rows of head_dim.
static __device__ __forceinline__ int64_t partial_at(const AttentionParams& p, uint32_t b,
                                                     uint32_t h, uint32_t row_of_launch,
                                                     int chunk) {
  const int64_t head = b * p.args.kv_heads + h;
  return (head * p.tiles * kTileRows + row_of_launch) * p.plan.chunks + chunk;
}

int attention_mma(const AttentionParams& params, void* stream);

}  // namespace fq::cuda
