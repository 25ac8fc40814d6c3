// One small function per PTX instruction that CUDA C++ has no name for. No other file has inline
// assembly, so that the kernels also run on the host: there tests/emulated/emulated_ptx.h defines
// the same functions. PTX ISA 8.0, sm_80 on; cluster_* need sm_90.
//
// Addresses are generic pointers. What all lanes of a warp must call together says "warp".
#pragma once

#ifdef FQ_EMULATED
#include "emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "../contract.h"

namespace fq::cuda {

static __device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- warp: matrices from shared memory to registers -------------------------------------------

// 8x8 matrices of 16-bit numbers: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned), and gets numbers 2 * (i % 4) and the next of row i / 4 of every matrix. _trans: of
// every matrix transposed. _x2 reads the addresses of lanes 0 to 15 only.
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

static __device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

static __device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// ---- warp: matrix products ---------------------------------------------------------------------

// c += a b: a [16, 16], b [16, 8], c [16, 8] in float32. With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 * (i % 2), columns 2t + 8 * (i / 2) and the next (low half first)
//   b0, b1: rows 2t and the next, 2t + 8 and the next, column g
//   c[i]: row g + 8 * (i / 2), column 2t + i % 2
template <Dtype kType>
static __device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  if constexpr (kType == Dtype::kBFloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b: a [16, 32] and b [32, 8] in bytes, c [16, 8] in int32, which wraps. As above, with four
// bytes where two halves were: a[i] has columns 4t + 16 * (i / 2) and the next three.
static __device__ __forceinline__ void mma_16832_s8(int32_t (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with unsigned bytes in a.
static __device__ __forceinline__ void mma_16832_u8s8(int32_t (&c)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- copies from global to shared memory that the thread does not wait for ---------------------

// Of 4, 8 or 16 bytes, both addresses aligned to that. Sixteen pass by the L1 cache.
template <int kBytes>
static __device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes)
                 : "memory");
}

// Reads the first valid_bytes (0..kBytes) only; the rest becomes 0.
template <int kBytes>
static __device__ __forceinline__ void copy_async(void* shared, const void* global,
                                                  int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
}

// Sixteen bytes that nobody will read again: they pass by L1 and are the first to leave L2, which
// asks memory for the whole 128 bytes around them. valid_bytes: as above.
static __device__ __forceinline__ void copy_async_once(void* shared, const void* global,
                                                       int valid_bytes) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(valid_bytes), "l"(policy)
               : "memory");
}

// Sixteen bytes that other blocks read, too: through L1.
static __device__ __forceinline__ void copy_async_kept(void* shared, const void* global,
                                                       int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid_bytes)
               : "memory");
}

// How the L2 cache keeps what is read: once: it is the first to be evicted.
static __device__ __forceinline__ uint64_t cache_policy(bool once) {
  uint64_t policy;
  if (once)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A copy with such a policy.
template <int kBytes>
static __device__ __forceinline__ void copy_async_with_policy(void* shared, const void* global,
                                                              uint64_t policy) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     shared_address(shared)),
                 "l"(global), "l"(policy)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(
                     shared_address(shared)),
                 "l"(global), "n"(kBytes), "l"(policy)
                 : "memory");
}

// Ends a group of this thread's copies.
static __device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the kPending latest groups of this thread are under way. Other threads see
// the bytes after a barrier only.
template <int kPending>
static __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- conversions -------------------------------------------------------------------------------

// lo and hi, rounded to the nearest even, in the low and the high half. As contract.h rounds, but
// for the bits of a NaN.
template <Dtype kType>
static __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  uint32_t pair;
  if constexpr (kType == Dtype::kBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}

// The two 16-bit numbers of a register as float32.
template <Dtype kType>
static __device__ __forceinline__ void widen2(uint32_t pair, float& lo, float& hi) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  if constexpr (kType == Dtype::kBFloat16) {
    lo = float_of(pair << 16);
    hi = float_of(pair & 0xffff0000u);
  } else {
    asm("{.reg .f16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;}"
        : "=f"(lo), "=f"(hi)
        : "r"(pair));
  }
}

// The larger and the smaller of two pairs of 16-bit numbers, half by half; NaN if either is.
template <Dtype kType>
static __device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  uint32_t pair;
  if constexpr (kType == Dtype::kBFloat16)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

template <Dtype kType>
static __device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  uint32_t pair;
  if constexpr (kType == Dtype::kBFloat16)
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// a + b, half by half, each rounded to the nearest even.
template <Dtype kType>
static __device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  uint32_t pair;
  if constexpr (kType == Dtype::kBFloat16)  // sm_80 has no addition of its own: a * 1 + b
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// To the nearest integer, half to even; saturates; 0 for a NaN.
static __device__ __forceinline__ int32_t round_to_int(float x) {
  int32_t rounded;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// a and b saturated to 4 bits: (c << 8) | (a << 4) | b.
static __device__ __forceinline__ uint32_t pack_s4(int32_t a, int32_t b, uint32_t c) {
  uint32_t packed;
  asm("cvt.pack.sat.s4.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(a), "r"(b), "r"(c));
  return packed;
}

// a and b saturated to 8 bits: (c << 16) | (a << 8) | b.
static __device__ __forceinline__ uint32_t pack_s8(int32_t a, int32_t b, uint32_t c) {
  uint32_t packed;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(a), "r"(b), "r"(c));
  return packed;
}

// 1 / x, correctly rounded.
static __device__ __forceinline__ float reciprocal(float x) { return __frcp_rn(x); }

// 2^x and 1 / x within 2 and 1 units in the last place; subnormal results may be 0.
static __device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

static __device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- global memory that is read or written once ------------------------------------------------

// Read-only for the whole kernel, not kept in L1. Aligned to their size.
static __device__ __forceinline__ uint4 load_streaming(const uint4* global) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(global));
  return v;
}

static __device__ __forceinline__ uint2 load_streaming(const uint2* global) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global));
  return v;
}

static __device__ __forceinline__ uint32_t load_streaming(const uint32_t* global) {
  uint32_t v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(global));
  return v;
}

// First to be evicted from the caches.
static __device__ __forceinline__ void store_streaming(uint4* global, uint4 v) {
  __stcs(global, v);
}
static __device__ __forceinline__ void store_streaming(uint2* global, uint2 v) {
  __stcs(global, v);
}
static __device__ __forceinline__ void store_streaming(uint32_t* global, uint32_t v) {
  __stcs(global, v);
}

// Asks for the 128 bytes around an address to be in L2. A hint.
static __device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// x, of which the compiler knows nothing: what is computed from it in a loop stays in the loop, and
// takes no registers outside.
static __device__ __forceinline__ int opaque(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// ---- kernels that begin before their predecessor has ended (sm_90; launch.cuh)
// -------------------

// Until all that earlier kernels of the stream wrote is there. Without a launch that allows an
// early begin, and on other devices, it always is.
static __device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- clusters of blocks (sm_90) ----------------------------------------------------------------

// Code for older devices may name these functions but must not reach them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FQ_CLUSTER_ASM(...) __trap()
#else
#define FQ_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#endif

// The barrier of all threads of a cluster in two halves; what was written to any shared memory of
// the cluster before the arrival is seen after the wait. Warp.
static __device__ __forceinline__ void cluster_arrive() {
  FQ_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

static __device__ __forceinline__ void cluster_wait() {
  FQ_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

static __device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
  FQ_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

static __device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
  FQ_CLUSTER_ASM("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The address that `own_shared` has in the shared memory of block `rank` of the cluster.
static __device__ __forceinline__ uint32_t cluster_address(const void* own_shared, uint32_t rank) {
  uint32_t address = 0;
  FQ_CLUSTER_ASM(
      "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own_shared)),
      "r"(rank));
  return address;
}

static __device__ __forceinline__ void cluster_store(uint32_t value, void* own_shared,
                                                     uint32_t rank) {
  FQ_CLUSTER_ASM("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(own_shared, rank)),
                 "r"(value) : "memory");
}

static __device__ __forceinline__ void cluster_store(float value, void* own_shared, uint32_t rank) {
  cluster_store(__float_as_uint(value), own_shared, rank);
}

static __device__ __forceinline__ uint32_t cluster_load(const uint32_t* own_shared, uint32_t rank) {
  uint32_t value = 0;
  FQ_CLUSTER_ASM("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(
      cluster_address(own_shared, rank)) : "memory");
  return value;
}

static __device__ __forceinline__ float cluster_load(const float* own_shared, uint32_t rank) {
  return __uint_as_float(cluster_load(reinterpret_cast<const uint32_t*>(own_shared), rank));
}

#undef FQ_CLUSTER_ASM

}  // namespace fq::cuda

#endif  // FQ_EMULATED
