// How the Hadamard op runs: a pure function of the problem and the GPU. Pure C++, no CUDA header.
// hadamard.cu describes the three kernels.
#pragma once

#include <initializer_list>

#include "../ops.h"
#include "gpu.h"

namespace fq::cuda {

enum class HadamardKernel : int32_t { kPlain, kPower, kBase };

struct HadamardPlan {
  HadamardKernel kernel;
  int32_t log_power;
  int32_t rows;          // of x in a block at a time
  int32_t tiles;         // kBase: groups of 16 rows of base^T, padded
  int32_t chunk;         // kBase: of them, how many are in shared memory at a time
  int32_t threads;       // of a block
  int32_t shared_bytes;  // dynamic
  int64_t blocks;
};

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- sizes that the kernels and the plan share --------------------------------------------------

constexpr int64_t kHadamardMostBlocks = 1 << 16;  // further rows are taken by the same blocks

// kPlain: columns and rows of the transform that a block makes at a time.
constexpr int32_t kPlainColumns = 2048, kPlainRows = 4, kPlainHadamardThreads = 256;

// kPower: numbers in flight in a thread, and in a block of short rows.
constexpr int32_t kPowerNumbers = 32, kPowerBlockNumbers = 4096, kPowerMostThreads = 512;
constexpr int32_t kPowerPadFloats = 8;  // behind every 128 of them, against bank conflicts

constexpr int64_t power_shared_bytes(int64_t numbers) {
  return (numbers + ceil_div(numbers, 128) * kPowerPadFloats) * 4;
}

// kBase.
constexpr int32_t kBaseThreads = 256, kBaseMostTiles = 16, kBaseBlockNumbers = 4096;
constexpr int32_t kBasePadFloats = 8, kBasePadBytes = 16;  // per row, against bank conflicts

// Words of signs per lane and tile: four steps of 16 rows each.
constexpr int32_t base_sign_words(int32_t tiles) { return (tiles + 3) / 4; }

constexpr int64_t base_sums_bytes(int64_t rows, int64_t m, int32_t chunk, int64_t power) {
  const int64_t of_base = 16 * chunk < m ? 16 * chunk : m;
  return rows * of_base * (power + kBasePadFloats) * 4;
}

constexpr int64_t base_x_bytes(int64_t rows, int32_t tiles, int64_t power) {
  return rows * tiles * 16 * (power * 2 + kBasePadBytes);
}

constexpr int64_t base_shared_bytes(int64_t rows, int64_t m, int32_t tiles, int32_t chunk,
                                    int64_t power) {
  return base_sums_bytes(rows, m, chunk, power) + base_x_bytes(rows, tiles, power) +
         int64_t{tiles} * base_sign_words(tiles) * 128;
}

// ---- the plan -----------------------------------------------------------------------------------

struct HadamardQuery {
  int64_t rows, m, power;
  Dtype dtype;
  bool base, aligned;  // x and out to 16 bytes
};

// Short rows share a block, but not while SMs are idle.
constexpr int32_t rows_together(const Gpu& gpu, int64_t rows, int64_t n, int64_t numbers) {
  const int64_t per_sm = gpu.sms > 0 ? rows / gpu.sms : rows;
  const int64_t wanted = least(numbers / n, per_sm);
  return static_cast<int32_t>(wanted > 1 ? wanted : 1);
}

constexpr HadamardPlan plan_plain_hadamard(const HadamardQuery& q, int32_t log_power) {
  const int64_t columns = least(q.power, kPlainColumns);
  const int64_t groups = ceil_div(q.m * (q.power / columns), kPlainRows);
  return {HadamardKernel::kPlain,
          log_power,
          1,
          0,
          0,
          kPlainHadamardThreads,
          0,
          least(q.rows * groups, kHadamardMostBlocks)};
}

constexpr HadamardPlan plan_hadamard(const Gpu& gpu, const HadamardQuery& q) {
  int32_t log_power = 0;
  while (int64_t{1} << log_power < q.power) ++log_power;
  const HadamardPlan plain = plan_plain_hadamard(q, log_power);
  if (!q.aligned) return plain;

  if (!q.base) {
    const int32_t rows = rows_together(gpu, q.rows, q.power, kPowerBlockNumbers);
    const int64_t bytes = power_shared_bytes(rows * q.power);
    if (q.power < kPowerNumbers || bytes > gpu.shared_per_block) return plain;
    const int64_t threads = ceil_div(rows * q.power / kPowerNumbers, 32) * 32;
    return {HadamardKernel::kPower,
            log_power,
            rows,
            0,
            0,
            static_cast<int32_t>(least(threads, kPowerMostThreads)),
            static_cast<int32_t>(bytes),
            least(ceil_div(q.rows, rows), kHadamardMostBlocks)};
  }

  const int32_t tiles = static_cast<int32_t>(least(ceil_div(q.m, 16), kBaseMostTiles + 1));
  if (q.dtype == Dtype::kFloat32 || q.power < 16 || tiles > kBaseMostTiles) return plain;
  const int32_t rows = rows_together(gpu, q.rows, q.m * q.power, kBaseBlockNumbers);
  // Two blocks to an SM if that can be, and as few chunks as that leaves room for.
  const int64_t half = gpu.shared_per_sm / 2 - kKiB;
  for (const int64_t room : {half, int64_t{gpu.shared_per_block}})
    for (int32_t chunk = tiles; chunk > 0; --chunk) {
      const int64_t bytes = base_shared_bytes(rows, q.m, tiles, chunk, q.power);
      if (bytes > room || (chunk < tiles && rows > 1)) continue;
      const int64_t per_sm = least(gpu.shared_per_sm / (bytes + kKiB), 2048 / kBaseThreads);
      return {HadamardKernel::kBase,
              log_power,
              rows,
              tiles,
              chunk,
              kBaseThreads,
              static_cast<int32_t>(bytes),
              least(ceil_div(q.rows, rows), gpu.sms * (per_sm > 0 ? per_sm : 1))};
    }
  return plain;
}

}  // namespace fq::cuda
