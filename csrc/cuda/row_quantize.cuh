// Rows of numbers to codes: the parts that every quantizing kernel shares. Arithmetic: bit for bit
// that of ../contract.h, in fewer instructions.
//
//   LaneRange, PairRange   the largest and smallest number a lane has seen
//   warp_range, block_range   ... that the row holds
//   RowCoder, row_coder    what turns the numbers of one row into codes; equal in all threads
//   code_word, store_codes   packed codes of consecutive numbers
//
// The division. contract.h's code is rhe(clamp(x / s)). Here x is clamped first, to [s qmin, s
// qmax] (rounded: the codes of the two ends are qmin and qmax all the same), and for x / s stands
//
//   q = fma(x, inverse, x * rest),   1 / s = inverse + rest to about 48 bits.
//
// That has the same codes as x / s rounded to float32, for every x and s:
// 1. A code changes at half-integers c, |c| <= 254.5, only. So it is enough that q and x / s lie on
//    the same side of each c, or both on it: that the exact quotient t and the number that is
//    rounded to q, t + d, lie on the same side of the midpoints m between c and its neighbours.
//    (t is never such a midpoint: m has 25 bits, and m s no fewer.) rest is below 2^-24 / s, and it
//    and x * rest are rounded once each, so |d| < 2^-47 t.
// 2. Let u be the spacing of floats at m, s = B 2^e with 2^23 <= B < 2^24. x - m s is a multiple of
//    2^e u / 2, so |t - m| is at least u / 2B, or 2, 3, ... times that; d is below 2^-23 u. They
//    can be on different sides only if x - m s is within 4 such units of 0. All of it being
//    integers, B is then within 4 of a multiple of 2^(23 - j), where 2^j <= c < 2^(j + 1), and x is
//    the float nearest to m s: some 10^5 pairs (B, x). tests/emulated/test_row_quantize.py tries
//    every one.
// 3. Below c = 1/2, floats are spaced u / 2 and m = 1/2 - u / 4. There x is a multiple of 2^(e - 1)
//    and m s an eighth of 2^e or more away from all of them (B = 2^23 is a power of two, and
//    exact): too far for d.
// Dividing s > 1 by 2^64 beforehand, and q by the same afterwards, keeps all of it clear of
// subnormals: exact, and free because q is added to something anyway.
//
// The rounding. 12582912 + q has no bits for a fraction, so the addition rounds half to even, and
// the low bits of the sum are the code, in two's complement. Sums of them shifted into place, less
// what the 12582912s contribute, are a word of codes: no masks, and the zero point comes with that
// term.
#pragma once

#include "../ops.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {

// ---- the range ---------------------------------------------------------------------------------

// As signed integers, the bits of floats find max(x, 0), as unsigned ones min(x, 0): compare
// range_of in ../cpu/row_body.h. Inf lies outside every number and NaN outside Inf, so neither is
// lost.
struct LaneRange {
  int32_t above = 0;             // 0
  uint32_t below = 0x80000000u;  // -0

  __device__ __forceinline__ void add(float x) {
    const uint32_t bits = bits_of(x);
    above = static_cast<int32_t>(bits) > above ? static_cast<int32_t>(bits) : above;
    below = bits > below ? bits : below;
  }
  __device__ __forceinline__ void add(LaneRange other) {
    above = other.above > above ? other.above : above;
    below = other.below > below ? other.below : below;
  }
  __device__ __forceinline__ float max() const { return float_of(static_cast<uint32_t>(above)); }
  __device__ __forceinline__ float min() const { return float_of(below); }
};

// The same for pairs of 16-bit numbers in a register, one instruction for each end.
template <Dtype kType>
struct PairRange {
  uint32_t most = 0, least = 0;  // pairs of zeros

  __device__ __forceinline__ void add(uint32_t pair) {
    most = max2<kType>(most, pair);
    least = min2<kType>(least, pair);
  }
  __device__ __forceinline__ LaneRange range() const {
    LaneRange found;
    float low, high;
    widen2<kType>(most, low, high);
    found.add(low);
    found.add(high);
    widen2<kType>(least, low, high);
    found.add(low);
    found.add(high);
    return found;
  }
};

static __device__ __forceinline__ LaneRange warp_range(LaneRange lane) {
  LaneRange found;
  found.above = warp_max(lane.above);
  found.below = warp_max(lane.below);
  return found;
}

// Shared memory of block_range, for blocks of at most kThreads; nobody else uses it until the
// block's next barrier.
template <int kThreads>
struct BlockRange {
  int32_t above[kThreads / kWarp];
  uint32_t below[kThreads / kWarp];
};

// One barrier.
template <int kThreads>
static __device__ __forceinline__ LaneRange block_range(LaneRange lane,
                                                        BlockRange<kThreads>& shared) {
  LaneRange found = warp_range(lane);
  const int index = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (index == 0) {
    shared.above[threadIdx.x / kWarp] = found.above;
    shared.below[threadIdx.x / kWarp] = found.below;
  }
  __syncthreads();
  found.above = shared.above[index < warps ? index : 0];
  found.below = shared.below[index < warps ? index : 0];
  return warp_range(found);
}

// ---- the grid of a row -------------------------------------------------------------------------

struct Clip {
  float max, min;
};

static __device__ __forceinline__ Clip load_clip(const float* clip) {
  return clip ? Clip{clip[0], clip[1]} : Clip{1.0f, 1.0f};
}

// Whether codes take a byte each, or half of one.
FQ_HD bool codes_are_bytes(const Grid& grid) {
  return grid.layout == Layout::kBytes || grid.bits > 4;
}

struct RowCoder {
  float scale;  // as it is stored: NaN for a row with a NaN or an Inf, whose codes are 0
  int32_t zero;
  float least, most;          // outside of these, x has the code of the nearer one
  float inverse, rest, unit;  // 1 / scale = (inverse + rest) * unit
  uint32_t offset, flip;      // words of codes are (sum of rounded_bits + offset) ^ flip
};

constexpr float kRounder = 12582912.0f;  // 1.5 2^23: see the top
constexpr uint32_t kRounderBits = 0x4b400000u;

// For a row with this scale (perhaps NaN) and zero point.
static __device__ __forceinline__ RowCoder coder_of(const Grid& grid, float scale, int32_t zero) {
  RowCoder c;
  c.scale = scale;
  c.zero = zero;
  const bool usable = is_finite(scale);
  c.unit = scale > 1.0f ? 5.42101086242752217e-20f : 1.0f;  // 2^-64
  const float divisor = scale * c.unit;
  const float inverse = reciprocal(divisor);
  // remainder / divisor, correctly rounded: the test compares it for every mantissa.
  const float remainder = fma(-divisor, inverse, 1.0f);
  const float first = remainder * inverse;
  c.inverse = usable ? inverse : 0.0f;
  c.rest = usable ? fma(fma(-first, divisor, remainder), inverse, first) : 0.0f;

  const int32_t lowest = grid.symmetric ? qmin(grid.bits, grid.narrow) : -zero;
  const int32_t highest = grid.symmetric ? qmax(grid.bits) : levels(grid.bits) - zero;
  c.least = usable ? static_cast<float>(lowest) * scale : 0.0f;
  c.most = usable ? static_cast<float>(highest) * scale : 0.0f;

  // Fields of a word hold 0 or more, so that none borrows from the next: signed codes are raised by
  // 8 or 128 first, which the flip takes back.
  const bool bytes = codes_are_bytes(grid);
  const uint32_t ones = bytes ? 0x01010101u : 0x11111111u, top = bytes ? 128 : 8;
  c.offset = ones * ((grid.symmetric ? top : static_cast<uint32_t>(zero)) - kRounderBits);
  c.flip = grid.symmetric ? ones * top : 0;
  return c;
}

static __device__ __forceinline__ RowCoder row_coder(const Grid& grid, LaneRange range, Clip clip) {
  if (grid.symmetric)
    return coder_of(grid, symmetric_scale(range.max(), range.min(), clip.max, clip.min, grid.bits),
                    0);
  const ScaleZero found = asymmetric_scale(range.max(), range.min(), clip.max, clip.min, grid.bits);
  return coder_of(grid, found.scale, found.zero);
}

// ---- codes -------------------------------------------------------------------------------------

// kRounderBits + the code less the zero point.
static __device__ __forceinline__ uint32_t rounded_bits(const RowCoder& c, float x) {
  const float inside = fminf(fmaxf(x, c.least), c.most);  // a number also if x is NaN
  const float q = fma(inside, c.inverse, inside * c.rest);
  return bits_of(fma(q, c.unit, kRounder));
}

template <int kCodes, int kBits>
static __device__ __forceinline__ uint32_t sum_of_bits(const RowCoder& c, const float* x) {
  if constexpr (kCodes == 1)
    return rounded_bits(c, x[0]);
  else
    return sum_of_bits<kCodes / 2, kBits>(c, x) +
           (sum_of_bits<kCodes / 2, kBits>(c, x + kCodes / 2) << (kBits * kCodes / 2));
}

// The codes of x[0..kCodes) in fields of kBits (4, or 8 if codes_are_bytes), the first one lowest.
// What lies above them, if they do not fill the word, is not 0.
template <int kCodes, int kBits>
static __device__ __forceinline__ uint32_t code_word(const RowCoder& c, const float* x) {
  static_assert(kCodes * kBits <= 32, "one word");
  return (sum_of_bits<kCodes, kBits>(c, x) + c.offset) ^ c.flip;
}

// kBytes bytes of words, to an address that is aligned to 16 bytes or, if they are fewer, to
// kBytes.
template <int kBytes>
static __device__ __forceinline__ void store_words(uint8_t* out, const uint32_t* words) {
  if constexpr (kBytes == 1)
    *out = static_cast<uint8_t>(words[0]);
  else if constexpr (kBytes == 2)
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(words[0]);
  else if constexpr (kBytes == 4)
    *reinterpret_cast<uint32_t*>(out) = words[0];
  else if constexpr (kBytes == 8)
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  else
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      reinterpret_cast<uint4*>(out)[i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// Codes of kBits of x[0..kCodes), kCodes = 2, 4, 8, 16, 32, to an address aligned as store_words
// asks.
template <int kCodes, int kBits>
static __device__ __forceinline__ void store_fields(const RowCoder& c, const float* x,
                                                    uint8_t* out) {
  constexpr int kPerWord = 32 / kBits < kCodes ? 32 / kBits : kCodes;
  uint32_t words[kCodes / kPerWord];
#pragma unroll
  for (int i = 0; i < kCodes / kPerWord; ++i)
    words[i] = code_word<kPerWord, kBits>(c, x + i * kPerWord);
  store_words<kCodes * kBits / 8>(out, words);
}

// As the grid wants them. bytes: codes_are_bytes(grid), the same for all threads.
template <int kCodes>
static __device__ __forceinline__ void store_codes(const RowCoder& c, bool bytes, const float* x,
                                                   uint8_t* out) {
  if (bytes)
    store_fields<kCodes, 8>(c, x, out);
  else
    store_fields<kCodes, 4>(c, x, out);
}

}  // namespace fq::cuda
