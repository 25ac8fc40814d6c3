// The numeric contract: what a scale is, how a value becomes a code, how codes lie in a byte, how
// floats are rounded.
//
// Every kernel, on every backend, takes its numbers from here, and flatquant_cuda/reference.py says
// the same in PyTorch; tests hold the two bit-equal. docs/numerics.md has the formulas in prose.
//
//   symmetric, b bits:   s = max(clip_max * max(x, 0), clip_min * max(-x, 0)) / (2^(b-1) - 1)
//                        q = clamp(rhe(x / s), qmin, qmax);  value = q * s
//
//   asymmetric, b bits:  lo = clip_min * min(0, min x);  hi = clip_max * max(0, max x)
//                        s = (hi - lo) / (2^b - 1);  z = clamp(rhe(-lo / s), 0, 2^b - 1)
//                        q = clamp(rhe(x / s) + z, 0, 2^b - 1);  value = (q - z) * s
//
// rhe rounds half to even. s = 1 where it would be 0 or subnormal. A row that holds a NaN or an Inf
// gets s = NaN, and 0 for its codes and its zero point.
//
// Everything is float32 arithmetic in exactly the order written. It holds only with
// -ffp-contract=off (nvcc: --fmad=false) and without -ffast-math: fused operations are spelled
// `fma`. Functions are static and always inlined, so that a file compiled for AVX-512 cannot lend
// its copy to a portable one. No header but <cstdint> is needed, on the host or on the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FQ_HD static __host__ __device__ __forceinline__
#else
#define FQ_HD static inline __attribute__((always_inline))
#endif

namespace fq {

// The floating types a tensor may have ("T" in the contract).
enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr float kSmallestNormal = 1.17549435082228750797e-38f;  // 2^-126
// 255 * 8 * 2^20 < 2^31: an int32 accumulator over at most this many terms cannot overflow.
constexpr int64_t kMaxGemmK = 1048576;

// ---- floats as bits ----------------------------------------------------------------------------

FQ_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

FQ_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// a * b + c rounded once. Without -mfma this is a (slow, exact) call into libm, never two
// roundings.
FQ_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FQ_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FQ_HD float quiet_nan() { return float_of(0x7fc00000u); }

// The bits of |x|. As unsigned integers they are ordered like |x|, with Inf and NaN on top: a
// maximum over them cannot lose a NaN, as fmaxf would.
FQ_HD uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffffu; }

FQ_HD bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000u; }

// ---- 16-bit floats: widening is exact, narrowing rounds half to even ---------------------------

FQ_HD float bf16_to_float(uint16_t h) { return float_of(uint32_t{h} << 16); }

FQ_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Selects instead of branches, so that a loop over it vectorises; no subnormal float32 is ever an
// operand, so flush-to-zero modes cannot change the result.
FQ_HD float fp16_to_float(uint16_t h) {
  const uint32_t exponent = h & 0x7c00u;
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t normal = ((h & 0x7fffu) << 13) + (112u << 23);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(h & 0x3ffu)) *
                                     5.9604644775390625e-8f);  // * 2^-24
  const uint32_t special = ((h & 0x7fffu) << 13) | 0x7f800000u;
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_of(sign | (exponent == 0x7c00u ? special : finite));
}

FQ_HD uint16_t float_to_fp16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // 0.5 has the spacing 2^-24 of half's subnormals, so this addition does their rounding.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

// round_T(x), still as float32.
FQ_HD float round_to(Dtype dtype, float x) {
  return dtype == Dtype::kFloat32    ? x
         : dtype == Dtype::kBFloat16 ? bf16_to_float(float_to_bf16(x))
                                     : fp16_to_float(float_to_fp16(x));
}

FQ_HD int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Element i of an array of T, and its counterpart. For loops that are not hot: they switch on the
// type per element.
FQ_HD float load(const void* data, Dtype dtype, int64_t i) {
  return dtype == Dtype::kFloat32    ? static_cast<const float*>(data)[i]
         : dtype == Dtype::kBFloat16 ? bf16_to_float(static_cast<const uint16_t*>(data)[i])
                                     : fp16_to_float(static_cast<const uint16_t*>(data)[i]);
}

FQ_HD void store(void* data, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::kFloat32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] =
        dtype == Dtype::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
}

// ---- the integer grids -------------------------------------------------------------------------

FQ_HD int32_t qmax(int bits) { return (1 << (bits - 1)) - 1; }  // symmetric: largest code
FQ_HD int32_t qmin(int bits, bool narrow) {
  return narrow ? -qmax(bits) : -qmax(bits) - 1;
}  // symmetric: smallest code
FQ_HD int32_t levels(int bits) { return (1 << bits) - 1; }  // asymmetric: codes are 0..levels

// ---- scale and zero point of a row -------------------------------------------------------------

FQ_HD float usable_scale(float s) {
  return !is_finite(s) ? quiet_nan() : s < kSmallestNormal ? 1.0f : s;
}

// max_x and min_x are over the row; either is NaN or infinite if the row holds such a value.
FQ_HD float symmetric_scale(float max_x, float min_x, float clip_max, float clip_min, int bits) {
  if (!is_finite(max_x) || !is_finite(min_x)) return quiet_nan();
  const float above = clip_max * (max_x > 0.0f ? max_x : 0.0f);
  const float below = clip_min * (min_x < 0.0f ? -min_x : 0.0f);
  const float bound = above > below || above != above ? above : below;  // keeps a NaN of either
  return usable_scale(bound / static_cast<float>(qmax(bits)));
}

struct ScaleZero {
  float scale;
  int32_t zero;
};

// rhe(clamp(x, lo, hi)) = clamp(rhe(x), lo, hi) for integers lo <= hi inside +-2^22. Adding
// 12582912 = 1.5 2^23 leaves no bit for a fraction, and the addition itself rounds half to even. x
// is no NaN.
FQ_HD float clamp_round(float x, float lo, float hi) {
  const float bounded = x < lo ? lo : x > hi ? hi : x;
  return (bounded + 12582912.0f) - 12582912.0f;
}

FQ_HD ScaleZero asymmetric_scale(float max_x, float min_x, float clip_max, float clip_min,
                                 int bits) {
  if (!is_finite(max_x) || !is_finite(min_x)) return {quiet_nan(), 0};
  const float lo = clip_min * (min_x < 0.0f ? min_x : 0.0f);
  const float hi = clip_max * (max_x > 0.0f ? max_x : 0.0f);
  const float top = static_cast<float>(levels(bits));
  const float s = usable_scale((hi - lo) / top);
  if (!is_finite(s)) return {s, 0};
  return {s, static_cast<int32_t>(clamp_round(-lo / s, 0.0f, top))};
}

// ---- codes -------------------------------------------------------------------------------------

// One code. lo and hi bound the code before the zero point is added: (qmin, qmax) with zero 0, or
// (-zero, levels - zero). The scale must not be NaN: a loop over a row tests that once, outside.
FQ_HD int32_t code(float x, float scale, float lo, float hi, int32_t zero) {
  return static_cast<int32_t>(clamp_round(x / scale, lo, hi)) + zero;
}

FQ_HD int32_t symmetric_code(float x, float scale, int bits, bool narrow) {
  if (!is_finite(scale)) return 0;
  return code(x, scale, static_cast<float>(qmin(bits, narrow)), static_cast<float>(qmax(bits)), 0);
}

FQ_HD int32_t asymmetric_code(float x, float scale, int32_t zero, int bits) {
  if (!is_finite(scale)) return 0;
  return code(x, scale, static_cast<float>(-zero), static_cast<float>(levels(bits) - zero), zero);
}

// (q - z) * s: what a code stands for.
FQ_HD float value(int32_t q, int32_t zero, float scale) {
  return static_cast<float>(q - zero) * scale;
}

// ---- codes in bytes: even index in the low bits ------------------------------------------------

FQ_HD uint8_t pack_nibbles(int32_t even, int32_t odd) {
  return static_cast<uint8_t>((even & 15) | ((odd & 15) << 4));
}

// Code i of a row, whose byte this is: nibbles are two a byte, crumbs four.
FQ_HD int32_t nibble(uint8_t byte, int64_t i) { return (byte >> ((i & 1) * 4)) & 15; }
FQ_HD int32_t signed_nibble(uint8_t byte, int64_t i) { return (nibble(byte, i) ^ 8) - 8; }
FQ_HD int32_t crumb(uint8_t byte, int64_t i) { return (byte >> ((i & 3) * 2)) & 3; }
FQ_HD int32_t signed_crumb(uint8_t byte, int64_t i) { return (crumb(byte, i) ^ 2) - 2; }

FQ_HD int64_t nibble_bytes(int64_t k) { return (k + 1) / 2; }

// Bytes of k stored codes of the KV cache or of weight-only weights: 2 bits four a byte, 3 and 4
// bits in nibbles, 5 to 8 bits in bytes.
FQ_HD int64_t packed_bytes(int64_t k, int bits) {
  return bits == 2 ? (k + 3) / 4 : bits <= 4 ? (k + 1) / 2 : k;
}
// Bytes of k activation codes: always nibbles up to 4 bits, so that one GEMM reads them all.
FQ_HD int64_t activation_bytes(int64_t k, int bits) { return bits <= 4 ? (k + 1) / 2 : k; }

// ---- float expressions that several kernels share ----------------------------------------------

// The GEMM epilogue before rounding: one multiply of the two scales, one by the accumulator; a bias
// is added to it afterwards, separately.
FQ_HD float scaled(int32_t accumulator, float scale_x, float scale_w) {
  return static_cast<float>(accumulator) * (scale_x * scale_w);
}

// 1 / sqrt(mean(x^2) + eps), from the sum of squares.
FQ_HD float rms_reciprocal(float sum_of_squares, int64_t k, float eps) {
  return 1.0f / square_root(sum_of_squares / static_cast<float>(k) + eps);
}

// exp(x) within 1.1 ulp where that is normal; +Inf above ln(FLT_MAX), 0 far below, NaN for NaN.
// A polynomial of our own, because libm's exp is not the same on every machine and cannot be
// vectorised portably.
FQ_HD float exponential(float x) {
  const float t = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  const float n = (fma(t, 1.44269504088896341f, 12582912.0f)) - 12582912.0f;
  float r = fma(n, -0.693359375f, t);  // ln 2 in two parts: the first product is exact
  r = fma(n, 2.12194440e-4f, r);
  float p = 1.98412698e-4f;  // Taylor's coefficients 1/7! .. 1/2!; |r| <= ln(2) / 2
  p = fma(p, r, 1.38888889e-3f);
  p = fma(p, r, 8.33333333e-3f);
  p = fma(p, r, 4.16666667e-2f);
  p = fma(p, r, 1.66666667e-1f);
  p = fma(p, r, 0.5f);
  p = fma(p * r, r, r) + 1.0f;
  const int32_t whole = x == x ? static_cast<int32_t>(n) : 0;
  const int32_t half = whole / 2;  // 2^n in two factors: n may be 128, or below -126
  return p * float_of(static_cast<uint32_t>(half + 127) << 23) *
         float_of(static_cast<uint32_t>(whole - half + 127) << 23);
}

// g / (1 + exp(-g)), within 3 ulp for g > -87; exactly as written above otherwise.
FQ_HD float silu(float g) { return g / (1.0f + exponential(-g)); }

}  // namespace fq
