// kv_quantize_append: rows into a KV cache, asymmetric per token and head.
//
//   append_rows_kernel   values, and keys without a transform: a warp per row
//   append_few_kernel    a few rows (decoding), with or without a transform: a thread per column
//   append_many_kernel   many rows (prefill) times the transform: tiles of 64 rows
//   append_plain_kernel  any head_dim and alignment
//
// y = x round_T(P) is a chain of fma in float32 over ascending i, as in ../cpu/kv_cache_body.h, and
// the quantizer is that of row_quantize.cuh: codes, scales and zero points are those of the CPU bit
// for bit, whatever the kernel, and the same in every batch. (Tensor cores would add in an order of
// their own.)
//
// Floors. Decoding: P is read from L2 by every block, 2 head_dim^2 bytes; the chain of head_dim fma
// takes 4 head_dim clocks. Prefill: head_dim fma per number, 0.5 us per thousand rows of 128 on an
// H100. Values: memory, (2 + bits / 8) head_dim + 5 bytes a row.
//
// A launch takes up to two sides (grid.y), so that the keys and values of a decoding step need one.
#include "kv_cache.cuh"
#include "row_quantize.cuh"

namespace fq::cuda {
namespace {

constexpr int kMostDim = 256;               // of the fast kernels
constexpr int kFewRows = 4;                 // of a block
constexpr int kManyRows = 64, kSlice = 32;  // of a tile; of P in shared memory at a time
constexpr int kRowWarps = 4;

struct Sides {
  KvQuantizeAppend of[2];
};

// ---- where a row goes, and how
// -------------------------------------------------------------------

// Row of the cache for row r of x; -1: it is left out.
// Int: what the numbers of rows and slots fit into; a 64-bit division takes its time.
template <class Int>
__device__ __forceinline__ int64_t destination(const KvQuantizeAppend& args, int64_t r) {
  const Int t = static_cast<Int>(args.t), head = static_cast<Int>(r) / t;
  const Int i = static_cast<Int>(r) - head * t;
  if (!args.slots) return head * args.capacity + args.start + i;
  const Int heads = static_cast<Int>(args.kv_heads), b = head / heads, h = head - b * heads;
  const int64_t slot = args.slots[b * args.t + i];
  if (slot < 0 || slot >= args.blocks * args.capacity) return -1;
  const Int size = static_cast<Int>(args.capacity), block = static_cast<Int>(slot) / size;
  return (block * args.kv_heads + h) * args.capacity + (static_cast<Int>(slot) - block * size);
}

__device__ __forceinline__ Grid grid_of(const KvQuantizeAppend& args) {
  return {args.bits, false, false, Layout::kPacked};
}

// Numbers 4 i .. 4 i + 3 of a row.
__device__ __forceinline__ void load_four(const void* x, Dtype dtype, int64_t first,
                                          float (&v)[4]) {
  if (dtype == Dtype::kFloat32) {
    const uint4 four =
        load_streaming(reinterpret_cast<const uint4*>(static_cast<const float*>(x) + first));
    v[0] = float_of(four.x), v[1] = float_of(four.y);
    v[2] = float_of(four.z), v[3] = float_of(four.w);
    return;
  }
  const uint2 four =
      load_streaming(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x) + first));
  if (dtype == Dtype::kBFloat16) {
    widen2<Dtype::kBFloat16>(four.x, v[0], v[1]);
    widen2<Dtype::kBFloat16>(four.y, v[2], v[3]);
  } else {
    widen2<Dtype::kFloat16>(four.x, v[0], v[1]);
    widen2<Dtype::kFloat16>(four.y, v[2], v[3]);
  }
}

// By a warp: the row whose numbers 4 (lane + 32 j) .. + 3 are v[j], to row `to` of the cache.
__device__ __forceinline__ void append_row(const KvQuantizeAppend& args, const float (&v)[2][4],
                                           Clip clip, int64_t to) {
  const int lane = threadIdx.x % kWarp, fours = static_cast<int>(args.head_dim) / 4;
  LaneRange range;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) range.add(v[j][i]);  // zeros past the end: they change nothing
  const RowCoder coder = row_coder(grid_of(args), warp_range(range), clip);
  if (to < 0) return;
  if (lane == 0) {
    args.scale[to] = coder.scale;
    args.zero[to] = static_cast<uint8_t>(coder.zero);
  }
  uint8_t* const row = args.codes + to * packed_bytes(args.head_dim, args.bits);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int four = lane + kWarp * j;
    if (four >= fours) continue;
    if (args.bits > 4) {
      store_fields<4, 8>(coder, v[j], row + 4 * four);
    } else if (args.bits > 2) {
      store_fields<4, 4>(coder, v[j], row + 2 * four);
    } else {
      const uint32_t w = code_word<4, 4>(coder, v[j]);
      row[four] = static_cast<uint8_t>((w & 3) | (w >> 2 & 12) | (w >> 4 & 48) | (w >> 6 & 192));
    }
  }
}

// The same for a row in shared memory.
__device__ __forceinline__ void append_shared(const KvQuantizeAppend& args, const float* y,
                                              Clip clip, int64_t to) {
  const int lane = threadIdx.x % kWarp, fours = static_cast<int>(args.head_dim) / 4;
  float v[2][4] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j)
    if (lane + kWarp * j < fours) {
      const float4 four = reinterpret_cast<const float4*>(y)[lane + kWarp * j];
      v[j][0] = four.x, v[j][1] = four.y, v[j][2] = four.z, v[j][3] = four.w;
    }
  append_row(args, v, clip, to);
}

// ---- append -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kRowWarps* kWarp) append_rows_kernel(const Sides sides) {
  const KvQuantizeAppend& args = sides.of[blockIdx.y];
  const int lane = threadIdx.x % kWarp, fours = static_cast<int>(args.head_dim) / 4;
  const Clip clip = load_clip(args.clip);
  const int64_t rows = args.batch_heads * args.t, stride = int64_t{gridDim.x} * kRowWarps;
  for (int64_t r = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; r < rows; r += stride) {
    float v[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (lane + kWarp * j < fours)
        load_four(args.x, args.dtype, r * args.head_dim + 4 * (lane + kWarp * j), v[j]);
    append_row(args, v, clip, destination<uint32_t>(args, r));
  }
}

__device__ __forceinline__ float widen(float x, Dtype) { return x; }
__device__ __forceinline__ float widen(uint16_t x, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? bf16_to_float(x) : fp16_to_float(x);
}

// sums[r] = sum_i x[r, i] P[i, column]. x: [i][kFewRows] in shared memory.
template <class Number, bool kRounds>
__device__ __forceinline__ void multiply_column(const KvQuantizeAppend& args, const float4* x,
                                                int column, float (&sums)[kFewRows]) {
  const int d = static_cast<int>(args.head_dim);
  const Number* from = static_cast<const Number*>(args.transform) + column;
#pragma unroll 16
  for (int i = 0; i < d; ++i) {
    float p = widen(from[i * d], args.transform_dtype);
    if constexpr (kRounds) p = round_to(args.dtype, p);
    const float4 of_rows = x[i];
    sums[0] = fma(of_rows.x, p, sums[0]);
    sums[1] = fma(of_rows.y, p, sums[1]);
    sums[2] = fma(of_rows.z, p, sums[2]);
    sums[3] = fma(of_rows.w, p, sums[3]);
  }
}

__global__ void __launch_bounds__(kMostDim) append_few_kernel(const Sides sides) {
  __shared__ float4 x[kMostDim];
  __shared__ __align__(16) float y[kFewRows][kMostDim];
  const KvQuantizeAppend& args = sides.of[blockIdx.y];
  const int d = static_cast<int>(args.head_dim);
  const int64_t rows = args.batch_heads * args.t;
  const Clip clip = load_clip(args.clip);
  for (int64_t first = int64_t{blockIdx.x} * kFewRows; first < rows;
       first += int64_t{gridDim.x} * kFewRows) {
    const int column = threadIdx.x;
    float v[kFewRows] = {};
    if (column < d)
#pragma unroll
      for (int r = 0; r < kFewRows; ++r)
        if (first + r < rows) v[r] = load(args.x, args.dtype, (first + r) * d + column);
    if (args.transform) {
      if (column < d) x[column] = make_float4(v[0], v[1], v[2], v[3]);
      __syncthreads();
      if (column < d) {
#pragma unroll
        for (int r = 0; r < kFewRows; ++r) v[r] = 0.0f;
        const bool rounds = args.dtype != Dtype::kFloat32 && args.dtype != args.transform_dtype;
        if (args.transform_dtype == Dtype::kFloat32)
          rounds ? multiply_column<float, true>(args, x, column, v)
                 : multiply_column<float, false>(args, x, column, v);
        else
          rounds ? multiply_column<uint16_t, true>(args, x, column, v)
                 : multiply_column<uint16_t, false>(args, x, column, v);
      }
    }
    if (column < d)
#pragma unroll
      for (int r = 0; r < kFewRows; ++r) y[r][column] = v[r];
    __syncthreads();
    for (int r = threadIdx.x / kWarp; r < kFewRows && first + r < rows; r += blockDim.x / kWarp)
      append_shared(args, y[r], clip, destination<uint32_t>(args, first + r));
    __syncthreads();  // the next rows use the same shared memory
  }
}

// Shared memory: x of a slice, transposed [kSlice][kManyRows], and P's rows [kSlice][d]; then y
// [kManyRows][d] in the same place.
constexpr int many_shared_bytes(int64_t d) {
  const int slice = kSlice * (kManyRows + static_cast<int>(d)) * 4;
  const int y = kManyRows * static_cast<int>(d) * 4;
  return slice > y ? slice : y;
}

// A thread makes 8 rows x 8 columns: columns 4 c .. 4 c + 3 of either half. Threads: head_dim, in
// whole warps.
__global__ void __launch_bounds__(kMostDim, 1) append_many_kernel(const Sides sides) {
  FQ_DYNAMIC_SHARED(float, shared);
  const KvQuantizeAppend& args = sides.of[blockIdx.y];
  const int d = static_cast<int>(args.head_dim), groups = d / 8, half = d / 2;
  const int rows8 = threadIdx.x / groups * 8, column = threadIdx.x % groups * 4;
  const bool works = static_cast<int>(threadIdx.x) < d;
  float* const xs = shared;
  float* const ps = shared + kSlice * kManyRows;
  const int64_t rows = args.batch_heads * args.t;
  const Clip clip = load_clip(args.clip);
  for (int64_t first = int64_t{blockIdx.x} * kManyRows; first < rows;
       first += int64_t{gridDim.x} * kManyRows) {
    float sums[8][8] = {};
    for (int i0 = 0; i0 < d; i0 += kSlice) {
      const int count = d - i0 < kSlice ? d - i0 : kSlice;  // a multiple of 8
      for (int e = threadIdx.x; e < kManyRows * (count / 4); e += blockDim.x) {
        const int r = e % kManyRows, i = e / kManyRows * 4;
        float v[4] = {};
        if (first + r < rows) load_four(args.x, args.dtype, (first + r) * d + i0 + i, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) xs[(i + j) * kManyRows + r] = v[j];
      }
      for (int e = threadIdx.x; e < count * d; e += blockDim.x)
        ps[e] = round_to(args.dtype, load(args.transform, args.transform_dtype, i0 * d + e));
      __syncthreads();
      if (works)
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          const float4 a0 = *reinterpret_cast<const float4*>(xs + i * kManyRows + rows8);
          const float4 a1 = *reinterpret_cast<const float4*>(xs + i * kManyRows + rows8 + 4);
          const float4 b0 = *reinterpret_cast<const float4*>(ps + i * d + column);
          const float4 b1 = *reinterpret_cast<const float4*>(ps + i * d + half + column);
          const float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
          const float b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
          for (int r = 0; r < 8; ++r)
#pragma unroll
            for (int c = 0; c < 8; ++c) sums[r][c] = fma(a[r], b[c], sums[r][c]);
        }
      __syncthreads();
    }
    if (works)
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        float* const y = shared + (rows8 + r) * d + column;
        *reinterpret_cast<float4*>(y) = make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        *reinterpret_cast<float4*>(y + half) =
            make_float4(sums[r][4], sums[r][5], sums[r][6], sums[r][7]);
      }
    __syncthreads();
    for (int r = threadIdx.x / kWarp; r < kManyRows && first + r < rows; r += blockDim.x / kWarp)
      append_shared(args, shared + r * d, clip, destination<uint32_t>(args, first + r));
    __syncthreads();  // the next tile uses the same shared memory
  }
}

// y is made anew where it is needed.
__global__ void __launch_bounds__(kPlainThreads) append_plain_kernel(const Sides sides) {
  __shared__ BlockRange<kPlainThreads> shared;
  const KvQuantizeAppend& args = sides.of[blockIdx.y];
  const int64_t d = args.head_dim, bytes = packed_bytes(d, args.bits);
  const int64_t per_byte = args.bits == 2 ? 4 : args.bits <= 4 ? 2 : 1;
  const Clip clip = load_clip(args.clip);
  for (int64_t r = blockIdx.x; r < args.batch_heads * args.t; r += gridDim.x) {
    const auto y = [&](int64_t column) {
      if (!args.transform) return load(args.x, args.dtype, r * d + column);
      float sum = 0.0f;
      for (int64_t i = 0; i < d; ++i)
        sum = fma(load(args.x, args.dtype, r * d + i),
                  round_to(args.dtype, load(args.transform, args.transform_dtype, i * d + column)),
                  sum);
      return sum;
    };
    LaneRange range;
    for (int64_t j = threadIdx.x; j < d; j += kPlainThreads) range.add(y(j));
    const RowCoder coder = row_coder(grid_of(args), block_range(range, shared), clip);
    const int64_t to = destination<int64_t>(args, r);
    if (to >= 0) {
      if (threadIdx.x == 0) {
        args.scale[to] = coder.scale;
        args.zero[to] = static_cast<uint8_t>(coder.zero);
      }
      for (int64_t j = threadIdx.x; j < bytes; j += kPlainThreads) {
        uint32_t byte = 0;
        for (int64_t c = 0; c < per_byte && j * per_byte + c < d; ++c) {
          const uint32_t code = rounded_bits(coder, y(j * per_byte + c)) + coder.offset;
          byte |= (per_byte == 1 ? code & 255 : code & 15) << (8 / per_byte * c);
        }
        args.codes[to * bytes + j] = static_cast<uint8_t>(byte);
      }
    }
    __syncthreads();  // the shared words are used again
  }
}

bool is_fast(const KvQuantizeAppend& a) {
  return a.head_dim % 8 == 0 && a.head_dim <= kMostDim && is_aligned(a.x, 4 * size_of(a.dtype)) &&
         is_aligned(a.codes, 4) && a.batch_heads * a.t < kMost32 && a.blocks * a.capacity < kMost32;
}

// One or two sides of the same sizes.
int append(const KvQuantizeAppend* sides, int count, void* stream) {
  const KvQuantizeAppend& first = sides[0];
  const Sides both{{first, sides[count - 1]}};
  const int64_t rows = first.batch_heads * first.t;
  bool fast = true, transforms = false;
  for (int i = 0; i < count; ++i) {
    fast = fast && is_fast(sides[i]);
    transforms = transforms || sides[i].transform;
  }
  const auto grid = [&](int64_t rows_of_block) {
    return dim3(blocks_for(rows, rows_of_block), static_cast<unsigned>(count));
  };
  const unsigned threads = static_cast<unsigned>((first.head_dim + kWarp - 1) / kWarp * kWarp);
  if (!fast) {
    FQ_LAUNCH(append_plain_kernel, grid(1), unsigned{kPlainThreads}, 0, stream, both);
  } else if (!transforms) {
    FQ_LAUNCH(append_rows_kernel, grid(kRowWarps), unsigned{kRowWarps * kWarp}, 0, stream, both);
  } else if (rows < kManyRows || rows <= 4 * current_gpu().sms * kFewRows) {
    FQ_LAUNCH(append_few_kernel, grid(kFewRows), threads, 0, stream, both);
  } else {
    const int bytes = many_shared_bytes(first.head_dim);
    const int error = allow_shared(append_many_kernel, bytes);
    if (error != 0) return error;
    FQ_LAUNCH(append_many_kernel, grid(kManyRows), threads, bytes, stream, both);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int kv_quantize_append(const KvQuantizeAppend& args, void* /*workspace*/, void* stream) {
  return append(&args, 1, stream);
}

int append_both(const KvQuantizeAppend& keys, const KvQuantizeAppend& values, void* stream) {
  const KvQuantizeAppend sides[] = {keys, values};
  return append(sides, 2, stream);
}

}  // namespace fq::cuda
