// hadamard: y = round_T((x (base (x) H)) * scale) per row; as matrices [m, power]: Y = base^T X H.
//
// Bound by memory where the plan (plan_hadamard.h) finds a fast kernel: rows * n * 2 * sizeof T
// bytes. Numbers are float32 from x to y. H is butterflies: of elements whose indices differ in one
// bit, (a, b) -> (a + b, a - b), for every bit. Who does which bits:
//
//   hadamard_power_kernel: no base. A thread loads four runs of eight consecutive numbers, a
//     quarter of the row apart: bits 0, 1, 2 and the two highest, in registers.
//   hadamard_base_kernel: T of 16 bits. base^T X first, on tensor cores: of base only the signs are
//     used, and x is T, so products are exact. A warp has 16 x 64 sums at a time: bits 0 and 3, 4,
//     5 are in a lane's registers, 1 and 2 between the lanes of a quad.
//   both: The sums then are in shared memory, and each pass over them does three or four more bits
//     in registers; the last one writes y.
//   hadamard_plain_kernel: whatever is left: float32 with a base, odd sizes, misaligned tensors,
//     rows too long for shared memory. A block makes four rows of Y at a time, from all of X; bits
//     that its shared memory has no room for count as part of base.
//
// Shared memory without bank conflicts: see `place`.
#include "../ops.h"
#include "butterflies.cuh"
#include "launch.cuh"
#include "plan_hadamard.h"
#include "ptx.cuh"

namespace fq::cuda {
namespace {

// ---- no base -----------------------------------------------------------------------------------

template <Dtype kType>
__device__ __forceinline__ void load_eight(const void* x, int64_t first, float (&v)[8]) {
  if constexpr (kType == Dtype::kFloat32) {
    const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const float*>(x) + first);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = __ldg(from + half);
      v[4 * half] = float_of(four.x);
      v[4 * half + 1] = float_of(four.y);
      v[4 * half + 2] = float_of(four.z);
      v[4 * half + 3] = float_of(four.w);
    }
  } else {
    const uint4 eight =
        load_streaming(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + first));
    widen2<kType>(eight.x, v[0], v[1]);
    widen2<kType>(eight.y, v[2], v[3]);
    widen2<kType>(eight.z, v[4], v[5]);
    widen2<kType>(eight.w, v[6], v[7]);
  }
}

template <Dtype kType>
__global__ void __launch_bounds__(kPowerMostThreads, 2)
    hadamard_power_kernel(Hadamard args, int log_power, int rows_at_a_time) {
  FQ_DYNAMIC_SHARED(float, sums);
  const int64_t stride = int64_t{gridDim.x} * rows_at_a_time;
  for (int64_t row = int64_t{blockIdx.x} * rows_at_a_time; row < args.rows; row += stride) {
    const int64_t left = args.rows - row;
    const int count = (left < rows_at_a_time ? static_cast<int>(left) : rows_at_a_time)
                      << log_power;
    const int64_t first = row << log_power;
    for (int i = threadIdx.x; i < count / kPowerNumbers; i += blockDim.x) {
      // Four runs of eight: number i of the block's rows' quarters.
      const int in_row = i & ((1 << (log_power - 5)) - 1);
      const int e = (i >> (log_power - 5)) << log_power | in_row << 3;
      float v[4][8];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter)
        load_eight<kType>(args.x, first + e + (quarter << (log_power - 2)), v[quarter]);
      butterflies_within(v);
      butterflies(v);
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float (&run)[8] = v[quarter];
        const int here = place<false>(e + (quarter << (log_power - 2)), log_power);
        *reinterpret_cast<float4*>(sums + here) = make_float4(run[0], run[1], run[2], run[3]);
        *reinterpret_cast<float4*>(sums + (here ^ 4)) = make_float4(run[4], run[5], run[6], run[7]);
      }
    }
    __syncthreads();
    finish<false, kType, 3>(sums, count, log_power - 5, log_power, args, first);
    if (row + stride < args.rows) __syncthreads();
  }
}

// ---- with a base -------------------------------------------------------------------------------

// The signs of base^T as mma_16816 wants its left matrix: in word (tile * words + w) * 32 + lane
// the sign of the low half of register r of step 4 w + s at bit 4 s + r, that of the high half 16
// above.
__device__ void make_signs(const Hadamard& args, int tiles, uint32_t* signs) {
  const int words = base_sign_words(tiles), m = static_cast<int>(args.m);
  for (int index = threadIdx.x; index < tiles * words * kWarp; index += blockDim.x) {
    const int lane = index % kWarp, w = index / kWarp % words, tile = index / kWarp / words;
    uint32_t word = 0;
#pragma unroll 4
    for (int bit = 0; bit < 16; ++bit) {
      const int out = tile * 16 + lane / 4 + 8 * (bit % 2);
      const int in = (w * 4 + bit / 4) * 16 + lane % 4 * 2 + 8 * (bit % 4 / 2);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (out < m && in + half < m &&
            load(args.base, args.base_dtype, int64_t{in + half} * m + out) < 0.0f)
          word |= 1u << (bit + 16 * half);
    }
    signs[index] = word;
  }
}

// Starts to copy rows of x. Row i of row r is at (16 tiles r + i) * (2 power + pad) bytes; those
// from m on, which no copy touches, are 0.
__device__ __forceinline__ void stage(const Hadamard& args, int64_t row, int rows, int log_power,
                                      int tiles, unsigned char* x) {
  const int m = static_cast<int>(args.m), log_vectors = log_power - 3;
  const uint4* const from = static_cast<const uint4*>(args.x) + ((row * m) << log_vectors);
  for (int i = threadIdx.x; i < (rows * m) << log_vectors; i += blockDim.x) {
    const int line = i >> log_vectors, in_line = i & ((1 << log_vectors) - 1);
    const int padded = rows > 1 ? line / m * (16 * tiles - m) + line : line;
    copy_async<16>(x + padded * ((2 << log_power) + kBasePadBytes) + in_line * 16, from + i);
  }
}

template <Dtype kType>
constexpr uint32_t kOnes = kType == Dtype::kBFloat16 ? 0x3f803f80u : 0x3c003c00u;

// 16 rows of base^T times 8 kTiles columns of X: registers as mma_16816 has them, of column tiles.
template <Dtype kType, int kTiles>
__device__ __forceinline__ void multiply(const uint32_t* signs, int steps, const unsigned char* x,
                                         int line_bytes, float (&sums)[kTiles][4]) {
  const int lane = threadIdx.x % kWarp;
  // ldmatrix: lanes 0-7 have rows 0-7, 8-15 rows 8-15 of columns 0-7; 16-31 the same of 8-15.
  const unsigned char* from = x + lane % 16 * line_bytes + lane / 16 * 16;
  for (int step = 0; step < steps; step += 4) {
    const uint32_t word = signs[step / 4 * kWarp + lane];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (step + s >= steps) break;
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = (word << (15 - 4 * s - r) & 0x80008000u) | kOnes<kType>;
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, from + pair * 32);
        mma_16816<kType>(sums[2 * pair], a, b[0], b[1]);
        mma_16816<kType>(sums[2 * pair + 1], a, b[2], b[3]);
      }
      from += 16 * line_bytes;
    }
  }
}

// The bits that a warp holds of its columns: 0, 1, 2 and as many more as it has tiles for.
template <int kTiles>
__device__ __forceinline__ void butterflies_of_warp(float (&sums)[kTiles][4]) {
  butterflies(sums);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int row = 0; row < 4; row += 2) {
      const float a = sums[tile][row], b = sums[tile][row + 1];
      sums[tile][row] = a + b;
      sums[tile][row + 1] = a - b;
    }
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, sums[tile][i], bit);
        sums[tile][i] = fma(sign, sums[tile][i], other);
      }
    }
  }
}

// plan.chunk tiles of 16 rows of Y at a time. Blocks go on to further rows of x, whose copy runs
// while the last chunk's passes do.
template <Dtype kType, int kTiles>
__global__ void __launch_bounds__(kBaseThreads)
    hadamard_base_kernel(Hadamard args, HadamardPlan plan) {
  FQ_DYNAMIC_SHARED(unsigned char, shared);
  const int m = static_cast<int>(args.m), power = 1 << plan.log_power;
  float* const sums = reinterpret_cast<float*>(shared);
  unsigned char* const x = shared + base_sums_bytes(plan.rows, m, plan.chunk, power);
  uint32_t* const signs =
      reinterpret_cast<uint32_t*>(x + base_x_bytes(plan.rows, plan.tiles, power));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int line_bytes = 2 * power + kBasePadBytes;
  const int words = base_sign_words(plan.tiles), blocks_of_columns = power / (8 * kTiles);
  constexpr int kBits = kTiles == 8 ? 6 : kTiles == 4 ? 5 : 4;

  const int64_t stride = int64_t{gridDim.x} * plan.rows;
  int64_t row = int64_t{blockIdx.x} * plan.rows;
  const auto rows_at = [&](int64_t first) {
    const int64_t left = args.rows - first;
    return left <= 0 ? 0 : left < plan.rows ? static_cast<int>(left) : plan.rows;
  };
  stage(args, row, rows_at(row), plan.log_power, plan.tiles, x);
  copy_async_commit();
  const int padding = (16 * plan.tiles - m) * line_bytes / 16;
  for (int i = threadIdx.x; i < plan.rows * padding; i += kBaseThreads)
    reinterpret_cast<uint4*>(x + (i / padding * 16 * plan.tiles + m) * line_bytes)[i % padding] =
        make_uint4(0, 0, 0, 0);
  make_signs(args, plan.tiles, signs);

  for (; row < args.rows; row += stride) {
    const int rows = rows_at(row);
    copy_async_wait<0>();
    __syncthreads();  // x is there, and the sums of the last round have been read
    for (int tile = 0; tile < plan.tiles; tile += plan.chunk) {
      const int end = tile + plan.chunk < plan.tiles ? tile + plan.chunk : plan.tiles;
      const int lines = (16 * end < m ? 16 * end : m) - 16 * tile;  // of Y, per row of x
      const int units = (end - tile) * blocks_of_columns;
      for (int unit = warp; unit < rows * units; unit += kBaseThreads / kWarp) {
        const int r = unit / units, in_row = unit - r * units;
        const int block = in_row / (end - tile), t = in_row - block * (end - tile);
        float part[kTiles][4] = {};
        multiply<kType, kTiles>(signs + (tile + t) * words * kWarp, plan.tiles,
                                x + r * 16 * plan.tiles * line_bytes + block * 16 * kTiles,
                                line_bytes, part);
        butterflies_of_warp(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int line = t * 16 + half * 8 + lane / 4;
          float* const to = sums + (r * lines + line) * (power + kBasePadFloats) +
                            block * 8 * kTiles + lane % 4 * 2;
          if (line < lines)
#pragma unroll
            for (int column = 0; column < kTiles; ++column)
              *reinterpret_cast<float2*>(to + column * 8) =
                  make_float2(part[column][2 * half], part[column][2 * half + 1]);
        }
      }
      __syncthreads();
      if (end == plan.tiles) {
        stage(args, row + stride, rows_at(row + stride), plan.log_power, plan.tiles, x);
        copy_async_commit();
      }
      finish<true, kType, kBits>(sums, rows * lines * power, plan.log_power - kBits, plan.log_power,
                                 args, (row * m + 16 * tile) << plan.log_power);
      if (end < plan.tiles) __syncthreads();
    }
  }
}

// ---- everything else ---------------------------------------------------------------------------

__global__ void __launch_bounds__(kPlainHadamardThreads)
    hadamard_plain_kernel(Hadamard args, int log_power) {
  __shared__ float sums[kPlainRows * kPlainColumns];
  const int log_columns = 1 << log_power < kPlainColumns ? log_power : 11;
  static_assert(kPlainColumns == 1 << 11, "log_columns");
  const int columns = 1 << log_columns, log_slices = log_power - log_columns;
  const int64_t lines = args.m << log_slices;  // of X, with its highest bits in the line number
  const int64_t groups = (lines + kPlainRows - 1) / kPlainRows;
  for (int64_t unit = blockIdx.x; unit < args.rows * groups; unit += gridDim.x) {
    const int64_t row = unit / groups, first = unit % groups * kPlainRows;
    for (int j = threadIdx.x; j < columns; j += kPlainHadamardThreads) {
      float sum[kPlainRows] = {};
      for (int64_t in = 0; in < lines; ++in) {
        const float x = load(args.x, args.dtype, row * args.n + (in << log_columns) + j);
#pragma unroll
        for (int i = 0; i < kPlainRows; ++i) {
          const int64_t out = first + i < lines ? first + i : lines - 1;
          const int64_t both = in & out & ((int64_t{1} << log_slices) - 1);
          const float entry = args.base ? load(args.base, args.base_dtype,
                                               (in >> log_slices) * args.m + (out >> log_slices))
                                        : 1.0f;
          sum[i] = fma(__popc(static_cast<unsigned>(both)) % 2 ? -entry : entry, x, sum[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPlainRows; ++i) sums[i << log_columns | j] = sum[i];
    }
    __syncthreads();
    for (int bit = 0; bit < log_columns; ++bit) {
      for (int i = threadIdx.x; i < kPlainRows * columns / 2; i += kPlainHadamardThreads) {
        const int e = (i >> bit) << (bit + 1) | (i & ((1 << bit) - 1));
        const float a = sums[e], b = sums[e + (1 << bit)];
        sums[e] = a + b;
        sums[e + (1 << bit)] = a - b;
      }
      __syncthreads();
    }
    const int64_t count = (lines - first < kPlainRows ? lines - first : kPlainRows) << log_columns;
    for (int i = threadIdx.x; i < count; i += kPlainHadamardThreads)
      store(args.out, args.dtype, row * args.n + (first << log_columns) + i, sums[i] * args.scale);
    __syncthreads();  // the sums are used again
  }
}

// ---- launches ----------------------------------------------------------------------------------

// An error of allow_shared, forgotten by the runtime as those of launches are.
int forget(int error) {
  static_cast<void>(cudaGetLastError());
  return error;
}

template <Dtype kType>
int launch_power(const Hadamard& args, const HadamardPlan& plan, void* stream) {
  const int error = allow_shared(hadamard_power_kernel<kType>, plan.shared_bytes);
  if (error != 0) return forget(error);
  FQ_LAUNCH(hadamard_power_kernel<kType>, static_cast<unsigned>(plan.blocks), plan.threads,
            plan.shared_bytes, stream, args, plan.log_power, plan.rows);
  return static_cast<int>(cudaGetLastError());
}

template <Dtype kType, int kTiles>
int launch_base(const Hadamard& args, const HadamardPlan& plan, void* stream) {
  const int error = allow_shared(hadamard_base_kernel<kType, kTiles>, plan.shared_bytes);
  if (error != 0) return forget(error);
  FQ_LAUNCH((hadamard_base_kernel<kType, kTiles>), static_cast<unsigned>(plan.blocks), plan.threads,
            plan.shared_bytes, stream, args, plan);
  return static_cast<int>(cudaGetLastError());
}

template <Dtype kType>
int launch_base(const Hadamard& args, const HadamardPlan& plan, void* stream) {
  if (plan.log_power == 4) return launch_base<kType, 2>(args, plan, stream);
  if (plan.log_power == 5) return launch_base<kType, 4>(args, plan, stream);
  return launch_base<kType, 8>(args, plan, stream);
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

int hadamard(const Hadamard& args, void* /*workspace*/, void* stream) {
  const HadamardPlan plan =
      plan_hadamard(current_gpu(), {args.rows, args.m, args.power, args.dtype, args.base != nullptr,
                                    is_aligned(args.x) && is_aligned(args.out)});
  if (plan.kernel == HadamardKernel::kPower)
    return args.dtype == Dtype::kFloat32    ? launch_power<Dtype::kFloat32>(args, plan, stream)
           : args.dtype == Dtype::kBFloat16 ? launch_power<Dtype::kBFloat16>(args, plan, stream)
                                            : launch_power<Dtype::kFloat16>(args, plan, stream);
  if (plan.kernel == HadamardKernel::kBase)
    return args.dtype == Dtype::kBFloat16 ? launch_base<Dtype::kBFloat16>(args, plan, stream)
                                          : launch_base<Dtype::kFloat16>(args, plan, stream);
  FQ_LAUNCH(hadamard_plain_kernel, static_cast<unsigned>(plan.blocks), plan.threads, 0, stream,
            args, plan.log_power);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fq::cuda
