// Which kernel answers attention_decode and how the cache is cut: a pure function of the sizes and
// the GPU, tested without one. Pure C++, no CUDA header.
//
// The unit of summation is a chunk of kChunk positions, counted from position 0: the answer of a
// chunk depends on nothing but the query and those positions, and chunks are added in ascending
// order (attention.cu). So the plan, which only says how many blocks share the chunks, changes no
// bit, and neither does the batch, nor a larger `length` that a CUDA graph was captured for.
//
// Block s of `splits` takes chunks s, s + splits, ...: whatever part of a planned length is in use,
// or in the window, is shared out evenly.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../contract.h"
#include "gpu.h"

namespace fq::cuda {

constexpr int32_t kChunk = 256;         // positions
constexpr int32_t kStep = 16;           // positions that a warp takes at a time
constexpr int32_t kAttentionWarps = 4;  // of a block; each takes kChunk / 4 positions of a chunk
constexpr int32_t kAttentionThreads = 32 * kAttentionWarps;
constexpr int32_t kTileRows = 8;  // queries that go through the cache together
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;  // of workspace, if it need not be more

enum class AttentionKernel : int32_t { kNone, kGeneral, kMma };

// Of kMma: what is compiled, the head sizes it serves, and blocks on an SM by registers.
struct AttentionSize {
  int32_t dim, resident;
};
constexpr AttentionSize kAttentionSizes[] = {{64, 4}, {128, 3}, {256, 2}};

struct AttentionQuery {
  int64_t batch, heads, kv_heads, tq, length, head_dim, capacity;
  int32_t k_bits, v_bits;
  Dtype dtype;
  bool paged;
  int32_t k_alignment, v_alignment, zero_alignment;  // of the codes and zero points: powers of two
};

struct AttentionPlan {
  AttentionKernel kernel;
  int32_t dim;                   // kMma: head_dim in full
  int32_t k_granule, v_granule;  // kMma: bytes of one copy
  int32_t stages;                // kMma: steps in flight
  int32_t shared_bytes;          // kMma: dynamic
  int64_t chunks, splits;
  int64_t tiles, tiles_at_a_time;  // of kTileRows queries of one cache head; of one launch
  int64_t blocks;                  // of a full launch
  int64_t workspace_bytes;         // 0: the first kernel writes the answer
};

constexpr int64_t attention_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t field_bits(int32_t bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

// The largest of 16, 8, 4 that divides both, or 0.
constexpr int32_t copy_granule(int64_t row_bytes, int32_t alignment) {
  for (const int32_t granule : {16, 8, 4})
    if (row_bytes % granule == 0 && alignment % granule == 0) return granule;
  return 0;
}

// ---- shared memory of kMma: stages of every warp, the queries, what warps tell each other
// --------

constexpr int32_t row_pitch(int32_t dim, int32_t bits) { return dim * field_bits(bits) / 8; }

// Codes of kStep keys and values, their scales, their zero points.
constexpr int32_t stage_bytes(int32_t dim, int32_t k_bits, int32_t v_bits) {
  return kStep * (row_pitch(dim, k_bits) + row_pitch(dim, v_bits) + 2 * 4 + 2);
}
constexpr int32_t query_bytes(int32_t dim) { return dim / 16 * 32 * 16; }
constexpr int32_t kSumsPad = 4;  // floats, of a row of a chunk's sums
constexpr int32_t merge_bytes(int32_t dim) { return kTileRows * (2 * dim + kSumsPad) * 4; }
constexpr int32_t kStatisticsBytes = 2 * (kAttentionWarps + 1) * kTileRows * 4;

constexpr int32_t attention_shared_bytes(int32_t dim, int32_t k_bits, int32_t v_bits,
                                         int32_t stages) {
  return kAttentionWarps * stages * stage_bytes(dim, k_bits, v_bits) + query_bytes(dim) +
         merge_bytes(dim) + kStatisticsBytes;
}

// ---- the plan -----------------------------------------------------------------------------------

// A chunk's part of one query: sums over its positions, their largest score, and their weight.
constexpr int64_t partial_bytes(int64_t head_dim) { return (head_dim + 2) * 4; }

// Blocks for the chunks of each of `pairs` when `slots` run at once: whole waves of blocks, of
// which each takes the time of its chunks and half a chunk more.
constexpr int64_t splits_for(int64_t chunks, int64_t pairs, int64_t slots) {
  int64_t best = 1, least = 0;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    int64_t splits = waves * slots / pairs;
    splits = splits < 1 ? 1 : splits > chunks ? chunks : splits;
    const int64_t cost =
        attention_ceil_div(splits * pairs, slots) * (2 * attention_ceil_div(chunks, splits) + 1);
    if (waves > 1 && cost >= least) continue;
    best = splits;
    least = cost;
  }
  return best;
}

constexpr AttentionPlan plan_attention(const Gpu& gpu, const AttentionQuery& q) {
  AttentionPlan plan{};
  if (gpu.arch < 80) return plan;
  plan.kernel = AttentionKernel::kGeneral;
  int32_t resident = 4;

  const int32_t k_granule = copy_granule(packed_bytes(q.head_dim, q.k_bits), q.k_alignment);
  const int32_t v_granule = copy_granule(packed_bytes(q.head_dim, q.v_bits), q.v_alignment);
  // Four zero points are read at once, and a step must lie in one block of a paged cache.
  const bool whole_steps = q.capacity % (q.paged ? kStep : 4) == 0 && q.zero_alignment % 4 == 0;
  if (q.dtype != Dtype::kFloat32 && k_granule > 0 && v_granule > 0 && whole_steps)
    for (const AttentionSize& size : kAttentionSizes) {
      if (q.head_dim > size.dim) continue;
      for (const int32_t stages : {3, 2}) {
        const int32_t bytes = attention_shared_bytes(size.dim, q.k_bits, q.v_bits, stages);
        if (bytes > gpu.shared_per_block) continue;
        plan.kernel = AttentionKernel::kMma;
        plan.dim = size.dim;
        plan.k_granule = k_granule;
        plan.v_granule = v_granule;
        plan.stages = stages;
        plan.shared_bytes = bytes;
        const int32_t fit = gpu.shared_per_sm / (bytes + kKiB);
        resident = fit < size.resident ? fit : size.resident;
        break;
      }
      break;
    }

  const int64_t heads = q.batch * q.kv_heads;
  plan.chunks = attention_ceil_div(q.length, kChunk);
  if (plan.chunks == 0) plan.chunks = 1;  // an empty cache: the answer is 0
  plan.tiles = attention_ceil_div(q.heads / q.kv_heads * q.tq, kTileRows);
  plan.tiles_at_a_time = plan.tiles;
  if (plan.chunks > 1) {
    const int64_t of_tile = heads * kTileRows * plan.chunks * partial_bytes(q.head_dim);
    const int64_t fit = kMostPartialBytes / of_tile;
    if (fit < plan.tiles) plan.tiles_at_a_time = fit < 1 ? 1 : fit;
    plan.workspace_bytes = plan.tiles_at_a_time * of_tile;
  }
  const int64_t pairs = heads * plan.tiles_at_a_time;
  const int64_t slots = int64_t{gpu.sms > 0 ? gpu.sms : 1} * (resident > 0 ? resident : 1);
  plan.splits = splits_for(plan.chunks, pairs > 0 ? pairs : 1, slots);
  plan.blocks = plan.splits * pairs;
  return plan;
}

}  // namespace fq::cuda
