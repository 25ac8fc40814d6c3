// Butterflies, (a, b) -> (a + b, a - b), of numbers whose indices differ in one bit: in registers,
// and in passes over shared memory, the last of which writes y. hadamard.cu says how they combine.
#pragma once

#include "../ops.h"
#include "launch.cuh"
#include "plan_hadamard.h"
#include "ptx.cuh"

namespace fq::cuda {

// ---- in registers -------------------------------------------------------------------------------

// Along the first index.
template <int kCount, int kOthers>
static __device__ __forceinline__ void butterflies(float (&v)[kCount][kOthers]) {
#pragma unroll
  for (int span = 1; span < kCount; span *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if ((i & span) == 0)
#pragma unroll
        for (int c = 0; c < kOthers; ++c) {
          const float a = v[i][c], b = v[i + span][c];
          v[i][c] = a + b;
          v[i + span][c] = a - b;
        }
}

// Along the second index.
template <int kOthers, int kCount>
static __device__ __forceinline__ void butterflies_within(float (&v)[kOthers][kCount]) {
#pragma unroll
  for (int i = 0; i < kOthers; ++i)
#pragma unroll
    for (int span = 1; span < kCount; span *= 2)
#pragma unroll
      for (int c = 0; c < kCount; ++c)
        if ((c & span) == 0) {
          const float a = v[i][c], b = v[i][c + span];
          v[i][c] = a + b;
          v[i][c + span] = a - b;
        }
}

// ---- in shared memory ---------------------------------------------------------------------------

template <Dtype kType>
static __device__ __forceinline__ void store_pair(void* out, int64_t first, float lo, float hi) {
  if constexpr (kType == Dtype::kFloat32)
    *reinterpret_cast<float2*>(static_cast<float*>(out) + first) = make_float2(lo, hi);
  else
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + first) = pack2<kType>(lo, hi);
}

// Where element e of the sums is. hadamard_power_kernel: 8 floats stay free behind every 128, and
// runs of four change places where bit 5 is set. hadamard_base_kernel: some floats stay free behind
// every row.
template <bool kBase>
static __device__ __forceinline__ int place(int e, int log_power) {
  if constexpr (kBase) return e + (e >> log_power) * kBasePadFloats;
  return (e ^ (e >> 5 & 1) << 2) + (e >> 7) * kPowerPadFloats;
}

// Butterflies for bits kBit .. kBit + kBits - 1 (kBit 0: from `bit` on) of `count` sums; a thread
// takes pairs of neighbours. kLast: what comes out is y, and goes there.
template <bool kBase, Dtype kType, int kBits, bool kLast, int kBit>
static __device__ __forceinline__ void pass(float* sums, int count, int bit, int log_power,
                                            void* out, int64_t first, float scale) {
  if (kBit != 0) bit = kBit;
  const int step = kBase ? 1 << bit : (1 << bit) + (kPowerPadFloats << bit >> 7);
  for (int group = threadIdx.x; group < count >> (kBits + 1); group += blockDim.x) {
    const int low = group & ((1 << (bit - 1)) - 1);
    const int e = (group >> (bit - 1)) << (bit + kBits) | low << 1;
    const int here = place<kBase>(e, log_power);
    // From bit 7 on elements are `step` apart; the pass from bit 3 on has bit 5 to look after.
    const auto element = [&](int i) {
      return reinterpret_cast<float2*>(
          sums + (!kBase && kBit == 3 ? (here ^ (i & 4)) + 8 * i : here + i * step));
    };
    float v[1 << kBits][2];
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      const float2 pair = *element(i);
      v[i][0] = pair.x;
      v[i][1] = pair.y;
    }
    butterflies(v);
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      if constexpr (kLast)
        store_pair<kType>(out, first + e + (i << bit), v[i][0] * scale, v[i][1] * scale);
      else
        *element(i) = make_float2(v[i][0], v[i][1]);
    }
  }
}

// Bits from `bit` on, `left` of them, at most 4, and y [count], from `first` on.
template <bool kBase, Dtype kType, int kBit>
static __device__ __forceinline__ void last_pass(float* sums, int count, int bit, int left,
                                                 int log_power, const Hadamard& args,
                                                 int64_t first) {
  if (left == 4)
    pass<kBase, kType, 4, true, kBit>(sums, count, bit, log_power, args.out, first, args.scale);
  else if (left == 3)
    pass<kBase, kType, 3, true, kBit>(sums, count, bit, log_power, args.out, first, args.scale);
  else if (left == 2)
    pass<kBase, kType, 2, true, kBit>(sums, count, bit, log_power, args.out, first, args.scale);
  else if (left == 1)
    pass<kBase, kType, 1, true, kBit>(sums, count, bit, log_power, args.out, first, args.scale);
  else
    pass<kBase, kType, 0, true, kBit>(sums, count, bit, log_power, args.out, first, args.scale);
}

// All bits from kBit on, `left` of them, and y. The sums are there for all threads; nobody may
// write to them afterwards before a barrier.
template <bool kBase, Dtype kType, int kBit>
static __device__ __forceinline__ void finish(float* sums, int count, int left, int log_power,
                                              const Hadamard& args, int64_t first) {
  if (left <= 4)
    return last_pass<kBase, kType, kBit>(sums, count, kBit, left, log_power, args, first);
  pass<kBase, kType, 4, false, kBit>(sums, count, kBit, log_power, nullptr, 0, 0.0f);
  __syncthreads();
  int bit = kBit + 4;
  left -= 4;
  for (; left > 4; left -= 3, bit += 3) {
    pass<kBase, kType, 3, false, 0>(sums, count, bit, log_power, nullptr, 0, 0.0f);
    __syncthreads();
  }
  last_pass<kBase, kType, 0>(sums, count, bit, left, log_power, args, first);
}

}  // namespace fq::cuda
