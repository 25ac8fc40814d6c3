// How the Kronecker transform runs: a pure function of the problem and the GPU, tested without
// either. Pure C++, no CUDA header.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "gpu.h"

namespace fq::cuda {

// kTensorCore: transform_mma.cuh, for 16-bit T; kGeneral: transform_general.cu, for everything.
enum class TransformPath : int32_t { kGeneral, kTensorCore };

struct TransformQuery {
  int64_t rows, n1, n2;
  Dtype dtype;
  bool left, right;  // are given
  bool vectors;      // x, gate, channel_scale, codes, out may be accessed 16 bytes at a time
  bool left_vectors, right_vectors;  // float32, and pairs in a row are aligned
  bool factors_are_floats;           // T and both factors are float32
};

struct TransformPlan {
  TransformPath path;
  int32_t column_tiles, row_tiles;  // n2 and n1 in 16s, rounded up; n2 to a kernel there is
  int32_t tiles_per_warp;           // row tiles of a warp, at most
  int32_t warps, owners;            // of a block that share a token; those of them with row tiles
  int32_t tokens;                   // that a block works on at the same time
  int32_t cluster;                  // blocks that share a token
  bool left_shared, right_shared;   // a factor stays in shared memory; else it is read every time
  bool squares_by_mma;              // the sum of squares, if nothing else comes before the products
  int32_t threads, shared_bytes;    // of a block
  int64_t blocks;
};

// ---- what the kernels are ----------------------------------------------------------------------

struct TransformKernel {
  int32_t column_tiles;
  int32_t tiles_per_warp, warps;  // the most of a warp, and of a block
  int32_t blocks;                 // of so many warps, that a multiprocessor must have registers for
  int32_t registers;              // the most of any architecture and type
};

// One kernel each, for either 16-bit type. nvcc -Xptxas -v says how many registers they have.
constexpr TransformKernel kTransformKernels[] = {
    {2, 2, 8, 2, 69},    {3, 2, 8, 2, 100},  {4, 2, 8, 2, 123}, {5, 2, 6, 2, 153},
    {6, 2, 8, 1, 198},   {7, 2, 8, 1, 210},  {8, 2, 8, 1, 222}, {10, 1, 10, 1, 164},
    {11, 1, 11, 1, 168}, {14, 1, 8, 1, 242},
};

// The one for n2 columns; its column_tiles is 0 if there is none.
constexpr TransformKernel transform_kernel_for(int64_t n2) {
  for (const TransformKernel& kernel : kTransformKernels)
    if (16 * kernel.column_tiles >= n2) return kernel;
  return {};
}

// The next smaller kernel's column_tiles: n2 is larger than that.
constexpr int32_t fewer_column_tiles(int32_t column_tiles) {
  int32_t fewer = 0;
  for (const TransformKernel& kernel : kTransformKernels)
    if (kernel.column_tiles < column_tiles) fewer = kernel.column_tiles;
  return fewer;
}

constexpr int32_t kFragmentBytes = 512;  // 16 bytes of every lane: an operand A of m16n8k16, two B
constexpr int32_t kRangeEntries = 32;    // warps with row tiles that may share a token

// Row tiles that a block of a cluster works on.
constexpr int32_t tiles_per_block(const TransformPlan& plan) {
  return (plan.row_tiles + plan.cluster - 1) / plan.cluster;
}

// Where things lie in the shared memory of a block: bytes. The left factor is first.
struct TransformShared {
  int32_t right;   // all of it, or two slices of 16 rows
  int32_t tokens;  // [token] slots of one X each
  int32_t pitch;   // of a row of X: an odd number of 16 bytes, so that ldmatrix has no conflicts
  int32_t slot;
  int32_t ranges;   // [2][token][kRangeEntries] pairs of words
  int32_t squares;  // [token][row tile] floats
  int32_t bytes;
};

constexpr TransformShared transform_shared(const TransformPlan& plan, bool left, bool right) {
  const int32_t columns = plan.column_tiles;
  TransformShared s{};
  s.right = left && plan.left_shared ? tiles_per_block(plan) * plan.row_tiles * kFragmentBytes : 0;
  s.tokens = s.right + (right ? (plan.right_shared ? columns : 2) * columns * kFragmentBytes : 0);
  s.pitch = 32 * columns + 16;
  s.slot = 16 * plan.row_tiles * s.pitch;
  s.ranges = s.tokens + plan.tokens * s.slot;
  s.squares = s.ranges + 2 * plan.tokens * kRangeEntries * 8;
  s.bytes = s.squares + plan.tokens * plan.row_tiles * 4;
  return s;
}

// ---- the choice --------------------------------------------------------------------------------

constexpr int64_t whole_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Blocks of a plan that fit a multiprocessor. Registers are given out per quarter of it.
constexpr int32_t resident_blocks(const Gpu& gpu, const TransformPlan& plan, int32_t registers) {
  const int32_t of_shared = gpu.shared_per_sm / (plan.shared_bytes + kKiB);
  const int32_t block_warps = plan.threads / 32;
  const int32_t warps_of_quarter = gpu.registers_per_sm / 4 / (32 * whole_of(registers, 8) * 8);
  const int32_t of_registers = 4 * warps_of_quarter / block_warps;
  return of_shared < of_registers ? of_shared : of_registers;
}

// Whether `a` is the better plan. Both fit.
struct TransformMerit {
  bool right_shared;  // reading P2 over and over costs most
  int32_t warps;      // resident on a multiprocessor; 12 keep it busy
  int32_t tiles;      // of a warp: what is read of shared memory
  bool left_shared;
  int32_t blocks;  // 2, so that one multiplies while the other loads
  int32_t more_warps;
};

constexpr bool better(const TransformMerit& a, const TransformMerit& b) {
  if (a.right_shared != b.right_shared) return a.right_shared;
  if (a.warps != b.warps) return a.warps > b.warps;
  if (a.tiles != b.tiles) return a.tiles > b.tiles;
  if (a.left_shared != b.left_shared) return a.left_shared;
  if (a.blocks != b.blocks) return a.blocks > b.blocks;
  return a.more_warps > b.more_warps;
}

// Fewer than there are multiprocessors: what counts is how soon one is done.
constexpr bool few_tokens(const Gpu& gpu, const TransformQuery& query) {
  return query.rows < gpu.sms;
}

// Fills in what follows from the choices; false if they do not fit.
constexpr bool complete(const Gpu& gpu, const TransformQuery& query, const TransformKernel& kernel,
                        TransformPlan& plan) {
  const int32_t owners = static_cast<int32_t>(whole_of(tiles_per_block(plan), plan.tiles_per_warp));
  // Warps without a row tile still help to load: the factors, where they are used only once, and P2
  // in slices, which takes 16 * column_tiles threads.
  int32_t warps = owners;
  if (few_tokens(gpu, query) && warps < 8) warps = 8;
  if (!plan.right_shared && 2 * warps < plan.column_tiles) warps = (plan.column_tiles + 1) / 2;
  plan.warps = warps < kernel.warps ? warps : kernel.warps;
  plan.owners = owners;
  plan.threads = 32 * plan.warps * plan.tokens;
  plan.shared_bytes = transform_shared(plan, query.left, query.right).bytes;
  return plan.tokens * plan.warps <= kernel.warps && owners <= plan.warps &&
         plan.cluster * owners <= kRangeEntries && plan.shared_bytes <= gpu.shared_per_block;
}

constexpr TransformPlan plan_transform(const Gpu& gpu, const TransformQuery& query) {
  TransformPlan general{};
  general.path = TransformPath::kGeneral;
  general.cluster = general.tokens = 1;

  const TransformKernel kernel = transform_kernel_for(query.n2);
  const bool sixteen = query.dtype != Dtype::kFloat32;
  if (!sixteen || !query.vectors || query.n2 % 4 != 0 || kernel.column_tiles == 0 ||
      (!query.left && !query.right) || query.n1 > 256 || query.rows >= int64_t{1} << 31)
    return general;

  TransformPlan base{};
  base.path = TransformPath::kTensorCore;
  base.column_tiles = kernel.column_tiles;
  base.row_tiles = static_cast<int32_t>(whole_of(query.n1, 16));
  // Not where tensor cores are the limit: sums in float32 run at half their rate there.
  base.squares_by_mma = gpu.arch != 86 && gpu.arch != 89 && gpu.arch != 120;
  const bool few = few_tokens(gpu, query);

  TransformPlan best = general;
  TransformMerit most{};
  const int32_t most_cluster = gpu.arch == 90 ? 8 : 1;
  for (int32_t cluster = 1; cluster <= most_cluster && cluster <= base.row_tiles; cluster *= 2) {
    // A token is shared by blocks where there are idle ones, or where one has not enough registers.
    if (cluster > 1 && best.path == TransformPath::kTensorCore && query.rows * cluster > gpu.sms)
      break;
    for (int32_t residence = 0; residence < 3; ++residence)
      for (int32_t tiles = kernel.tiles_per_warp; tiles >= 1; --tiles)
        for (int32_t tokens = 4; tokens >= 1; tokens /= 2) {
          TransformPlan plan = base;
          plan.cluster = cluster;
          plan.left_shared = residence == 0;
          plan.right_shared = residence < 2;
          plan.tiles_per_warp = tiles;
          plan.tokens = tokens;
          // Only the kernels with one row tile a warp can do without a factor in shared memory.
          if (residence > 0 && (kernel.tiles_per_warp > 1 || !query.left_vectors)) continue;
          if (residence == 2 && !query.right_vectors) continue;
          if (tokens > 1 && (cluster > 1 || whole_of(query.rows, tokens) < gpu.sms)) continue;
          if (!complete(gpu, query, kernel, plan)) continue;
          const int32_t blocks = resident_blocks(gpu, plan, kernel.registers);
          if (blocks < 1) continue;
          const int32_t warps = blocks * plan.threads / 32;
          TransformMerit merit{};
          merit.right_shared = plan.right_shared;
          merit.left_shared = plan.left_shared;
          if (few) {
            // One token a multiprocessor: as many warps as it has row tiles, over as many blocks.
            merit.warps = cluster;
            merit.tiles = -tiles;
          } else {
            merit.warps = warps < 12 ? warps : 12;
            merit.tiles = tiles < base.row_tiles ? tiles : base.row_tiles;
            merit.blocks = blocks < 2 ? blocks : 2;
            // Blocks of fewer than 4 warps read the factors too often.
            merit.more_warps = plan.threads < 128 ? plan.threads / 32 : (warps < 16 ? warps : 16);
          }
          if (best.path == TransformPath::kGeneral || better(merit, most)) {
            best = plan;
            most = merit;
            const int64_t needed = whole_of(query.rows, tokens);
            const int64_t room = static_cast<int64_t>(gpu.sms) * blocks;
            best.blocks = (needed < room / cluster ? needed : room / cluster) * cluster;
          }
        }
  }
  return best;
}

// ---- the general path --------------------------------------------------------------------------

// One block of kGeneralThreads per row, which works on strips of rows of Y if there is a right
// factor, and on single elements if there is none.
constexpr int32_t kGeneralThreads = 256;

struct GeneralPlan {
  int32_t strip;        // rows; 0 without a right factor
  bool row_shared;      // what enters the products stays in shared memory
  bool y_shared;        // all of Y does; else it is computed twice, for its range and for its codes
  bool factors_shared;  // as float32, rounded to T
  bool floats;          // they are, or were so in the first place
  int32_t shared_bytes;
  int64_t blocks;  // 0: nothing fits
};

constexpr GeneralPlan plan_general(const Gpu& gpu, const TransformQuery& query) {
  const int64_t k = query.n1 * query.n2;
  if (k >= int64_t{1} << 31) return {};
  const int64_t factors =
      (query.left ? query.n1 * query.n1 : 0) + (query.right ? query.n2 * query.n2 : 0);
  // From the fastest to what needs least room: row, factors, Y; row, factors; row, Y; row; nothing.
  for (int32_t choice = 0; choice < 5; ++choice)
    for (int32_t strip = 16; strip >= 1; strip /= 2) {
      // Codes of a strip are whole bytes.
      if (strip == 1 && query.n1 > 1 && query.n2 % 2 != 0) continue;
      GeneralPlan plan{};
      plan.strip = query.right ? strip : 0;
      plan.row_shared = choice < 4;
      plan.factors_shared = choice < 2 && !query.factors_are_floats;
      plan.floats = choice < 2 || query.factors_are_floats;
      plan.y_shared = choice == 0 || choice == 2;
      const int64_t s = query.left && query.right ? strip * query.n2 : 0;
      const int64_t y = plan.y_shared ? k : plan.strip * query.n2;
      const int64_t bytes =
          4 * ((plan.factors_shared ? factors : 0) + (plan.row_shared ? k : 0) + s + y);
      if (bytes > gpu.shared_per_block - kKiB) continue;  // the rest is for exchanges
      plan.shared_bytes = static_cast<int32_t>(bytes);
      const int64_t resident = gpu.shared_per_sm / (bytes + 2 * kKiB);
      const int64_t room = gpu.sms * (resident < 4 ? resident : 4);
      plan.blocks = query.rows < room ? query.rows : room;
      return plan;
    }
  return {};
}

}  // namespace fq::cuda
