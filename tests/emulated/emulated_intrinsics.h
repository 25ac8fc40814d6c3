// The functions that CUDA C++ has built in, as far as the kernels use them. Arithmetic is the
// host's: IEEE, one rounding each (-ffp-contract=off, like --fmad=false on the device).
#pragma once

#include "emulator.h"

// ---- warps: all 32 lanes or none ---------------------------------------------------------------

namespace fq::emulated {

inline void check_mask(unsigned mask, const char* operation, Site site) {
  if (mask != 0xffffffffu)
    fail("%s at %s:%d has mask %#x: only whole warps are emulated", operation, site.file, site.line,
         mask);
}

template <class T, class From>
T shuffle(const char* operation, Site site, unsigned mask, T value, From from) {
  check_mask(mask, operation, site);
  return meet<T, T>(operation, site, value, [&](const T* brought, T* taken) {
    for (int i = 0; i < kLanes; ++i) taken[i] = brought[from(i) & (kLanes - 1)];
  });
}

template <class T, class Combine>
T reduce(const char* operation, Site site, unsigned mask, T value, Combine combine) {
  check_mask(mask, operation, site);
  return meet<T, T>(operation, site, value, [&](const T* brought, T* taken) {
    T all = brought[0];
    for (int i = 1; i < kLanes; ++i) all = combine(all, brought[i]);
    for (int i = 0; i < kLanes; ++i) taken[i] = all;
  });
}

}  // namespace fq::emulated

using FqSite = fq::emulated::Site;

// Of __shfl_sync and its kin every lane may give another source; the emulator asks for the lane's
// own, so that the source travels with the value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FqSite site = FqSite::here()) {
  struct Given {
    T value;
    int source;
  };
  fq::emulated::check_mask(mask, "__shfl_sync", site);
  const int first = fq::emulated::lane() & ~(width - 1);
  const Given mine{value, first + (source & (width - 1))};
  return fq::emulated::meet<Given, T>("__shfl_sync", site, mine, [](const Given* given, T* taken) {
    for (int i = 0; i < 32; ++i) taken[i] = given[given[i].source].value;
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FqSite site = FqSite::here()) {
  return fq::emulated::shuffle("__shfl_xor_sync", site, mask, value, [=](int i) {
    const int other = i ^ bits;
    return other / width > i / width ? i : other;
  });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, FqSite site = FqSite::here()) {
  return fq::emulated::shuffle("__shfl_down_sync", site, mask, value,
                               [=](int i) { return i % width + by < width ? i + by : i; });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, FqSite site = FqSite::here()) {
  return fq::emulated::shuffle("__shfl_up_sync", site, mask, value,
                               [=](int i) { return i % width >= by ? i - by : i; });
}

inline unsigned __ballot_sync(unsigned mask, int vote, FqSite site = FqSite::here()) {
  fq::emulated::check_mask(mask, "__ballot_sync", site);
  return fq::emulated::meet<int, unsigned>("__ballot_sync", site, vote,
                                           [](const int* votes, unsigned* taken) {
                                             unsigned all = 0;
                                             for (int i = 0; i < 32; ++i)
                                               all |= unsigned{votes[i] != 0} << i;
                                             for (int i = 0; i < 32; ++i) taken[i] = all;
                                           });
}

inline int __any_sync(unsigned mask, int vote, FqSite site = FqSite::here()) {
  return __ballot_sync(mask, vote, site) != 0;
}

inline int __all_sync(unsigned mask, int vote, FqSite site = FqSite::here()) {
  return __ballot_sync(mask, vote, site) == 0xffffffffu;
}

#define FQ_REDUCE(name, type, expression)                                     \
  inline type name(unsigned mask, type value, FqSite site = FqSite::here()) { \
    return fq::emulated::reduce(#name, site, mask, value,                     \
                                [](type a, type b) { return expression; });   \
  }
FQ_REDUCE(__reduce_max_sync, int, a > b ? a : b)
FQ_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
FQ_REDUCE(__reduce_min_sync, int, a < b ? a : b)
FQ_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
FQ_REDUCE(__reduce_add_sync, int, static_cast<int>(unsigned(a) + unsigned(b)))
FQ_REDUCE(__reduce_add_sync, unsigned, a + b)
FQ_REDUCE(__reduce_or_sync, unsigned, a | b)
FQ_REDUCE(__reduce_and_sync, unsigned, a& b)
#undef FQ_REDUCE

inline void __syncwarp(unsigned mask = 0xffffffffu, FqSite site = FqSite::here()) {
  fq::emulated::reduce("__syncwarp", site, mask, 0, [](int, int) { return 0; });
}

// ---- blocks ------------------------------------------------------------------------------------

inline void __syncthreads(FqSite site = FqSite::here()) { fq::emulated::sync_block(site); }

inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibers switch only where they wait, so plain reads and writes are atomic.
template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place = before + value;
  return before;
}
template <class T>
T atomicMax(T* place, T value) {
  const T before = *place;
  *place = value > before ? value : before;
  return before;
}

// ---- numbers -----------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f    ? INT32_MAX
         : x <= -2147483648.0f ? INT32_MIN
                               : static_cast<int>(__builtin_rintf(x));
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i);
    const unsigned byte = bytes >> (8 * (which & 7)) & 0xff;
    picked |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return picked;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) << (by & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) >> (by & 31));
}
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return static_cast<int>(sum);
}

#define FQ_MIN_MAX(type)                                    \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
FQ_MIN_MAX(int)
FQ_MIN_MAX(unsigned)
FQ_MIN_MAX(long)
FQ_MIN_MAX(unsigned long)
FQ_MIN_MAX(long long)
FQ_MIN_MAX(unsigned long long)
#undef FQ_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// ---- global memory -----------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

[[noreturn]] inline void __trap() { fq::emulated::fail("__trap()"); }
