// quantize_activation: x [rows, k] -> codes, scale, zero per row. Arithmetic: ../contract.h, by way
// of row_quantize.cuh.
//
// Bound by memory everywhere: rows * (k * sizeof T + row_bytes + 4) bytes. The usual kernel reads x
// once, 16 bytes a lane, and keeps the row in registers between its range and its codes; a row
// belongs to a warp, or, if it is long, to a block:
//
//   row, as vectors of 16 bytes:   | warp 0: 32 kVectors of them | warp 1 | ...
//   lane l of a warp has vectors l, l + 32, l + 64, ... of the warp's
//
// Eight vectors a lane spread what is done once per row (its scale) over many codes; with few rows
// it is two, which answers sooner. Rows that are not whole vectors or not aligned, and rows too
// long for a block's registers, go to a kernel that reads them twice, number by number.
#include "../ops.h"
#include "gpu.h"
#include "launch.cuh"
#include "row_quantize.cuh"

namespace fq::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 16;  // further rows are taken by the same blocks
constexpr int kWarpRows = 4;              // warps of a block, if each has rows of its own
constexpr int kPlainThreads = 256;        // of the general kernel, at most
constexpr int kManyVectors = 8, kFewVectors = 2;
constexpr int kMostThreads = 1024;  // of a block that has one row

// Numbers in a vector.
constexpr int numbers_in(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 8; }

template <Dtype kType>
struct VectorRange {
  PairRange<kType> pairs;
  __device__ __forceinline__ void add(uint4 v) {
    pairs.add(v.x);
    pairs.add(v.y);
    pairs.add(v.z);
    pairs.add(v.w);
  }
  __device__ __forceinline__ LaneRange range() const { return pairs.range(); }
};

template <>
struct VectorRange<Dtype::kFloat32> {
  LaneRange lane;
  __device__ __forceinline__ void add(uint4 v) {
    lane.add(float_of(v.x));
    lane.add(float_of(v.y));
    lane.add(float_of(v.z));
    lane.add(float_of(v.w));
  }
  __device__ __forceinline__ LaneRange range() const { return lane; }
};

template <Dtype kType>
__device__ __forceinline__ void widen(uint4 v, float (&x)[numbers_in(kType)]) {
  if constexpr (kType == Dtype::kFloat32) {
    x[0] = float_of(v.x);
    x[1] = float_of(v.y);
    x[2] = float_of(v.z);
    x[3] = float_of(v.w);
  } else {
    widen2<kType>(v.x, x[0], x[1]);
    widen2<kType>(v.y, x[2], x[3]);
    widen2<kType>(v.z, x[4], x[5]);
    widen2<kType>(v.w, x[6], x[7]);
  }
}

__device__ __forceinline__ void store_grid(const QuantizeActivation& args, int64_t row,
                                           const RowCoder& coder) {
  args.scale[row] = coder.scale;
  if (args.zero) args.zero[row] = coder.zero;
}

// Codes of kBits of a lane's vectors: first_vector and every 32nd after it, as far as there are
// any.
template <Dtype kType, int kVectors, int kBits>
__device__ __forceinline__ void store_vectors(const RowCoder& coder,
                                              const uint4 (&loaded)[kVectors], int first_vector,
                                              int vectors, uint8_t* codes) {
  constexpr int kNumbers = numbers_in(kType), kBytes = kNumbers * kBits / 8;
  uint8_t* const out = codes + first_vector * kBytes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float x[kNumbers];
    widen<kType>(loaded[i], x);
    if (first_vector + i * kWarp < vectors)
      store_fields<kNumbers, kBits>(coder, x, out + i * kWarp * kBytes);
  }
}

// A row per warp, or per block.
template <Dtype kType, int kVectors, bool kPerWarp>
__global__ void __launch_bounds__(kPerWarp ? kWarpRows * kWarp : kMostThreads)
    quantize_kernel(QuantizeActivation args) {
  __shared__ BlockRange<kMostThreads> shared;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int vectors = static_cast<int>(args.k) / numbers_in(kType);
  const int first_vector = lane + (kPerWarp ? 0 : warp * kVectors * kWarp);
  const bool bytes = codes_are_bytes(args.grid);
  const Clip clip = load_clip(args.clip);

  const int64_t stride = kPerWarp ? int64_t{gridDim.x} * kWarpRows : gridDim.x;
  int64_t row = kPerWarp ? int64_t{blockIdx.x} * kWarpRows + warp : blockIdx.x;
  for (; row < args.rows; row += stride) {
    const uint4* const x = static_cast<const uint4*>(args.x) + row * vectors + first_vector;
    uint4 loaded[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      loaded[i] = first_vector + i * kWarp < vectors ? load_streaming(x + i * kWarp)
                                                     : make_uint4(0, 0, 0, 0);
    VectorRange<kType> range;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) range.add(loaded[i]);
    const LaneRange of_row =
        kPerWarp ? warp_range(range.range()) : block_range(range.range(), shared);
    const RowCoder coder = row_coder(args.grid, of_row, clip);
    if (first_vector == 0) store_grid(args, row, coder);

    uint8_t* const codes = args.codes + row * row_bytes(args.grid, args.k);
    if (bytes)
      store_vectors<kType, kVectors, 8>(coder, loaded, first_vector, vectors, codes);
    else
      store_vectors<kType, kVectors, 4>(coder, loaded, first_vector, vectors, codes);
    if (!kPerWarp && row + stride < args.rows) __syncthreads();  // the shared words are used again
  }
}

// Any row: a block each, and a thread makes whole bytes.
__global__ void __launch_bounds__(kPlainThreads) quantize_plain_kernel(QuantizeActivation args) {
  __shared__ BlockRange<kPlainThreads> shared;
  const bool bytes = codes_are_bytes(args.grid);
  const int64_t size = row_bytes(args.grid, args.k);
  const Clip clip = load_clip(args.clip);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t first = row * args.k;
    LaneRange range;
    for (int64_t j = threadIdx.x; j < args.k; j += blockDim.x)
      range.add(load(args.x, args.dtype, first + j));
    const RowCoder coder = row_coder(args.grid, block_range(range, shared), clip);
    if (threadIdx.x == 0) store_grid(args, row, coder);

    uint8_t* const codes = args.codes + row * size;
    for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
      if (bytes) {
        const float x[1] = {load(args.x, args.dtype, first + j)};
        codes[j] = static_cast<uint8_t>(code_word<1, 8>(coder, x));
      } else {
        const bool pair = 2 * j + 1 < args.k;
        const float x[2] = {load(args.x, args.dtype, first + 2 * j),
                            pair ? load(args.x, args.dtype, first + 2 * j + 1) : 0.0f};
        codes[j] = static_cast<uint8_t>(code_word<2, 4>(coder, x) & (pair ? 0xff : 0x0f));
      }
    }
    __syncthreads();  // the shared words are used again
  }
}

bool is_aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

unsigned whole_warps(int64_t threads) {
  return static_cast<unsigned>((threads + kWarp - 1) / kWarp * kWarp);
}

unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>(rows < kMostBlocks ? rows : kMostBlocks);
}

template <Dtype kType>
void launch(const QuantizeActivation& args, void* stream) {
  const int64_t vectors = args.k / numbers_in(kType);
  if (vectors <= kManyVectors * kWarp && args.rows > current_gpu().sms) {
    const int64_t blocks = (args.rows + kWarpRows - 1) / kWarpRows;
    FQ_LAUNCH((quantize_kernel<kType, kManyVectors, true>), blocks_for(blocks), kWarpRows * kWarp,
              0, stream, args);
  } else if (vectors <= kFewVectors * kMostThreads && args.rows <= 2 * current_gpu().sms) {
    const unsigned threads = whole_warps((vectors + kFewVectors - 1) / kFewVectors);
    FQ_LAUNCH((quantize_kernel<kType, kFewVectors, false>), blocks_for(args.rows), threads, 0,
              stream, args);
  } else {
    const unsigned threads = whole_warps((vectors + kManyVectors - 1) / kManyVectors);
    FQ_LAUNCH((quantize_kernel<kType, kManyVectors, false>), blocks_for(args.rows), threads, 0,
              stream, args);
  }
}

}  // namespace

int quantize_activation(const QuantizeActivation& args, void* /*workspace*/, void* stream) {
  const int numbers = numbers_in(args.dtype);
  const bool whole_vectors = args.k % numbers == 0 &&
                             args.k / numbers <= kManyVectors * kMostThreads &&
                             is_aligned(args.x, 16) && is_aligned(args.codes, 8);
  if (!whole_vectors)
    FQ_LAUNCH(quantize_plain_kernel, blocks_for(args.rows),
              args.k < kPlainThreads ? whole_warps(args.k) : unsigned{kPlainThreads}, 0, stream,
              args);
  else if (args.dtype == Dtype::kFloat32)
    launch<Dtype::kFloat32>(args, stream);
  else if (args.dtype == Dtype::kBFloat16)
    launch<Dtype::kBFloat16>(args, stream);
  else
    launch<Dtype::kFloat16>(args, stream);
  return static_cast<int>(cudaGetLastError());
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fq::cuda
