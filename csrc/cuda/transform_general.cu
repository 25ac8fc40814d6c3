// The Kronecker transform for everything that transform_mma.cuh does not take: float32, sizes that
// are no multiple of 4, very large ones, pointers that are not aligned.
//
// One block per row. Sums are chains of fma over ascending k in float32. With a right factor, the
// block works on strips of rows of Y: S of the strip, then Y of the strip. Without one, every
// element of Y is a chain of its own. What fits stays in shared memory (plan_general), as float32;
// what does not is made anew whenever it is needed.
#include "launch.cuh"
#include "row_quantize.cuh"
#include "transform.h"

namespace fq::cuda {
namespace {

constexpr int kThreads = kGeneralThreads;
constexpr int kRowsAtOnce = 4;  // of a thread: they share what is read of the other operand

struct GeneralParams {
  TransformArgs args;
  GeneralPlan plan;
};

// A factor [n, n]. kFloats: as float32 numbers rounded to T, in shared or in global memory;
// otherwise as it was given.
template <bool kFloats>
struct GeneralFactor {
  const float* floats;
  const void* data;
  Dtype given, rounded_to;
  uint32_t n;

  __device__ float at(uint32_t i, uint32_t j) const {
    const int64_t place = static_cast<int64_t>(i) * n + j;
    return kFloats ? floats[place] : round_to(rounded_to, load(data, given, place));
  }
};

// One row of x on its way.
template <bool kFloats>
struct Row {
  const KroneckerQuantize& args;
  const GeneralPlan& plan;
  GeneralFactor<kFloats> left, right;
  float* kept;    // [k], if plan.row_shared
  float *s, *y;   // [strip, n2]; [strip, n2], or all [n1, n2] if plan.y_shared
  int64_t first;  // index of its element 0, in x and gate

  // v: x after the gate. u, what enters the products: v times the channel scale.
  __device__ float gated(uint32_t i) const {
    const float x = load(args.x, args.dtype, first + i);
    if (!args.gate) return x;
    return round_to(args.dtype, silu(load(args.gate, args.dtype, first + i)) * x);
  }
  __device__ float scaled(uint32_t i, float v) const {
    const float* const c = args.transform.channel_scale;
    return c ? round_to(args.dtype, v * c[i]) : v;
  }
  __device__ float input(uint32_t i) const {
    return plan.row_shared ? kept[i] : scaled(i, gated(i));
  }

  // Element i of Y, without a right factor.
  __device__ float element(uint32_t i) const {
    if (!args.transform.left) return input(i);
    const uint32_t n2 = right.n, row = i / n2, column = i % n2;
    float sum = 0.0f;
    for (uint32_t j = 0; j < left.n; ++j) sum = fma(left.at(row, j), input(j * n2 + column), sum);
    return round_to(args.dtype, sum);
  }

  // Where row `top` of Y goes in shared memory.
  __device__ float* y_of(uint32_t top) const { return plan.y_shared ? y + top * right.n : y; }

  // Rows [top, top + rows) of Y, and their range to the lane's. Barriers inside, and at the end.
  __device__ void strip(uint32_t top, uint32_t rows, LaneRange& range) const {
    const uint32_t n1 = left.n, n2 = right.n;
    const uint32_t items = (rows + kRowsAtOnce - 1) / kRowsAtOnce * n2;
    const bool has_left = args.transform.left;
    if (has_left) {
      for (uint32_t item = threadIdx.x; item < items; item += kThreads) {
        const uint32_t row = item / n2 * kRowsAtOnce, column = item % n2;
        float sum[kRowsAtOnce] = {};
        for (uint32_t j = 0; j < n1; ++j) {
          const float u = input(j * n2 + column);
#pragma unroll
          for (int r = 0; r < kRowsAtOnce; ++r)
            if (row + r < rows) sum[r] = fma(left.at(top + row + r, j), u, sum[r]);
        }
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          if (row + r < rows) s[(row + r) * n2 + column] = round_to(args.dtype, sum[r]);
      }
      __syncthreads();
    }
    float* const out = y_of(top);
    for (uint32_t item = threadIdx.x; item < items; item += kThreads) {
      const uint32_t row = item / n2 * kRowsAtOnce, column = item % n2;
      float sum[kRowsAtOnce] = {};
      for (uint32_t j = 0; j < n2; ++j) {
        const float p = right.at(j, column);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          if (row + r < rows)
            sum[r] =
                fma(has_left ? s[(row + r) * n2 + j] : input((top + row + r) * n2 + j), p, sum[r]);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (row + r < rows) {
          out[(row + r) * n2 + column] = sum[r];
          range.add(sum[r]);
        }
    }
    __syncthreads();
  }
};

// Codes of y(0) .. y(count - 1), a row's elements from `first` on, which are whole bytes.
template <class Numbers>
__device__ __forceinline__ void store_codes(const RowCoder& coder, bool bytes, uint32_t first,
                                            uint32_t count, uint8_t* codes, const Numbers& y) {
  if (bytes) {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const float x = y(i);
      codes[first + i] = static_cast<uint8_t>(code_word<1, 8>(coder, &x));
    }
    return;
  }
  for (uint32_t i = threadIdx.x; 2 * i < count; i += kThreads) {
    const bool odd_too = 2 * i + 1 < count;
    const float x[2] = {y(2 * i), odd_too ? y(2 * i + 1) : 0.0f};
    const uint32_t both = code_word<2, 4>(coder, x);
    codes[first / 2 + i] = static_cast<uint8_t>(odd_too ? both : both & 15);
  }
}

// The factor's numbers as float32, in `shared` if they have to be converted. Where they end.
template <bool kFloats>
__device__ float* take_factor(GeneralFactor<kFloats>& factor, bool keep, float* shared) {
  if (!factor.data || !kFloats) return shared;
  factor.floats = static_cast<const float*>(factor.data);
  if (!keep) return shared;
  for (uint32_t i = threadIdx.x; i < factor.n * factor.n; i += kThreads)
    shared[i] = round_to(factor.rounded_to, load(factor.data, factor.given, i));
  factor.floats = shared;
  return shared + factor.n * factor.n;
}

template <bool kFloats>
__global__ void __launch_bounds__(kThreads, 3) general_kernel(const GeneralParams p) {
  FQ_DYNAMIC_SHARED(float, shared);
  __shared__ BlockRange<kThreads> ranges;
  __shared__ float sums[kThreads / kWarp];
  const KroneckerQuantize& args = p.args.quantize;
  const Transform& t = args.transform;
  const uint32_t k = static_cast<uint32_t>(args.k), strip = static_cast<uint32_t>(p.plan.strip);
  const uint32_t n1 = static_cast<uint32_t>(t.n1), n2 = static_cast<uint32_t>(t.n2);
  const bool strips = t.right;

  GeneralFactor<kFloats> left{nullptr, t.left, t.left_dtype, args.dtype, n1};
  GeneralFactor<kFloats> right{nullptr, t.right, t.right_dtype, args.dtype, n2};
  float* const kept =
      take_factor(right, p.plan.factors_shared, take_factor(left, p.plan.factors_shared, shared));
  float* const s = kept + (p.plan.row_shared ? k : 0);
  float* const y = s + (t.left && strips ? strip * n2 : 0);
  const bool bytes = codes_are_bytes(args.grid);
  const int64_t row_bytes = bytes ? k : (k + 1) / 2;
  __syncthreads();

  for (int64_t token = blockIdx.x; token < args.rows; token += gridDim.x) {
    const Row<kFloats> row{args, p.plan, left, right, kept, s, y, token * args.stride};
    float squares = 0.0f;
    if (p.plan.row_shared || args.rms)
      for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
        const float v = row.gated(i);
        squares = fma(v, v, squares);
        if (p.plan.row_shared) kept[i] = row.scaled(i, v);
      }
    squares = block_sum<kThreads>(squares, sums);  // and a barrier

    // Y: to memory, or its range; it may stay in shared memory.
    const auto rows_at = [&](uint32_t top) { return n1 - top < strip ? n1 - top : strip; };
    LaneRange range;
    if (strips) {
      for (uint32_t top = 0; top < n1; top += strip) {
        row.strip(top, rows_at(top), range);
        if (p.args.out)
          for (uint32_t i = threadIdx.x; i < rows_at(top) * n2; i += kThreads)
            store(p.args.out, p.args.out_dtype, token * args.k + top * n2 + i, row.y_of(top)[i]);
        if (!p.plan.y_shared) __syncthreads();
      }
    } else {
      for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
        const float v = row.element(i);
        if (p.args.out) store(p.args.out, p.args.out_dtype, token * args.k + i, v);
        if (p.plan.y_shared) y[i] = v;
        range.add(v);
      }
    }
    if (!p.args.out) {
      const LaneRange found = block_range<kThreads>(range, ranges);  // and a barrier
      const RowCoder coder = row_coder(args.grid, found, load_clip(args.clip));
      uint8_t* const codes = args.codes + token * row_bytes;
      if (p.plan.y_shared) {
        store_codes(coder, bytes, 0, k, codes, [&](uint32_t i) { return y[i]; });
      } else if (!strips) {
        store_codes(coder, bytes, 0, k, codes, [&](uint32_t i) { return row.element(i); });
      } else {
        LaneRange again;
        for (uint32_t top = 0; top < n1; top += strip) {
          row.strip(top, rows_at(top), again);
          store_codes(coder, bytes, top * n2, rows_at(top) * n2, codes,
                      [&](uint32_t i) { return y[i]; });
          __syncthreads();
        }
      }
      if (threadIdx.x == 0) {
        args.scale[token] =
            args.rms ? coder.scale * rms_reciprocal(squares, args.k, args.rms_eps) : coder.scale;
        if (args.zero) args.zero[token] = coder.zero;
      }
    }
    __syncthreads();  // the next row uses the same shared memory
  }
}

}  // namespace

int transform_general(const TransformArgs& args, void* stream) {
  const GeneralPlan plan = plan_general(current_gpu(), query_of(args));
  if (plan.blocks == 0) return static_cast<int>(cudaErrorNotSupported);
  const auto kernel = plan.floats ? general_kernel<true> : general_kernel<false>;
  const int error = allow_shared(kernel, plan.shared_bytes);
  if (error != 0) return error;
  const GeneralParams params{args, plan};
  FQ_LAUNCH(kernel, static_cast<unsigned>(plan.blocks), kThreads, plan.shared_bytes, stream,
            params);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fq::cuda
