// The functions of csrc/cuda/ptx.cuh on the host.
//
// Matrix products: every product of two 16-bit floats is exact in float32; they are added to the
// accumulator one after the other in the order of k, each sum rounded to float32. A tensor core
// adds several at once and truncates; that order is not documented.
#pragma once

#include "../../csrc/contract.h"
#include "emulator.h"

namespace fq::emulated {

struct Fragments {
  uint32_t a[4], b[2];
  uint32_t c[4];  // bits of float or int32
};
struct Accumulators {
  uint32_t c[4];
};
enum class MmaType { kBFloat16, kFloat16, kS8, kU8S8 };
void multiply(MmaType type, const Fragments (&lanes)[kLanes], Accumulators (&out)[kLanes]);

template <class T>
void mma(MmaType type, const char* operation, T (&c)[4], const uint32_t (&a)[4], uint32_t b0,
         uint32_t b1) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  std::memcpy(mine.c, c, sizeof mine.c);
  const Accumulators sum = meet<Fragments, Accumulators>(
      operation, {"", 0}, mine, [&](const Fragments(&lanes)[kLanes], Accumulators(&out)[kLanes]) {
        multiply(type, lanes, out);
      });
  std::memcpy(c, sum.c, sizeof sum.c);
}

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* operation, uint32_t (&r)[kMatrices], const void* shared) {
  struct Registers {
    uint32_t r[kMatrices];
  };
  const Registers mine = meet<const void*, Registers>(
      operation, {"", 0}, shared, [&](const void* const(&rows)[kLanes], Registers(&out)[kLanes]) {
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
          uint16_t numbers[8][8];
          for (int row = 0; row < 8; ++row) {
            const void* const from = rows[8 * matrix + row];
            check_shared(operation, from, 16, 16);
            std::memcpy(numbers[row], from, 16);
          }
          for (int lane = 0; lane < kLanes; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = kTransposed ? numbers[j][i] : numbers[i][j];
            const uint32_t high = kTransposed ? numbers[j + 1][i] : numbers[i][j + 1];
            out[lane].r[matrix] = low | high << 16;
          }
        }
      });
  std::memcpy(r, mine.r, sizeof r);
}

// A misaligned vector access is a fault on a GPU and none on the host.
template <class T>
T* aligned(const char* operation, T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    fail("%s of %zu bytes at the misaligned address %p", operation, sizeof(T),
         static_cast<const void*>(p));
  return p;
}

}  // namespace fq::emulated

namespace fq::cuda {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  emulated::ldmatrix<4, false>("ldmatrix_x4", r, shared);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  emulated::ldmatrix<4, true>("ldmatrix_x4_trans", r, shared);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  emulated::ldmatrix<2, false>("ldmatrix_x2", r, shared);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  emulated::ldmatrix<2, true>("ldmatrix_x2_trans", r, shared);
}

template <Dtype kType>
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  emulated::mma(
      kType == Dtype::kBFloat16 ? emulated::MmaType::kBFloat16 : emulated::MmaType::kFloat16,
      "mma_16816", c, a, b0, b1);
}
inline void mma_16832_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::MmaType::kS8, "mma_16832_s8", c, a, b0, b1);
}
inline void mma_16832_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::MmaType::kU8S8, "mma_16832_u8s8", c, a, b0, b1);
}

template <int kBytes>
inline void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
  emulated::copy_async(shared, global, kBytes, kBytes);
}
template <int kBytes>
inline void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
  emulated::copy_async(shared, global, kBytes, valid_bytes);
}
inline void copy_async_once(void* shared, const void* global, int valid_bytes) {
  emulated::copy_async(shared, global, 16, valid_bytes);
}
inline void copy_async_kept(void* shared, const void* global, int valid_bytes) {
  emulated::copy_async(shared, global, 16, valid_bytes);
}
inline uint64_t cache_policy(bool once) { return once; }
template <int kBytes>
inline void copy_async_with_policy(void* shared, const void* global, uint64_t /*policy*/) {
  copy_async<kBytes>(shared, global);
}
inline void copy_async_commit() { emulated::copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  emulated::copy_async_wait(kPending);
}

template <Dtype kType>
inline uint32_t pack2(float lo, float hi) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  const auto narrow = [](float x) -> uint32_t {
    if (x != x) return 0x7fff;  // the NaN that cvt makes
    return kType == Dtype::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
  };
  return narrow(lo) | narrow(hi) << 16;
}

template <Dtype kType>
inline void widen2(uint32_t pair, float& lo, float& hi) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit types only");
  const auto widen = kType == Dtype::kBFloat16 ? bf16_to_float : fp16_to_float;
  lo = widen(static_cast<uint16_t>(pair));
  hi = widen(static_cast<uint16_t>(pair >> 16));
}

template <Dtype kType>
inline uint32_t max2(uint32_t a, uint32_t b) {
  float a_lo, a_hi, b_lo, b_hi;
  widen2<kType>(a, a_lo, a_hi);
  widen2<kType>(b, b_lo, b_hi);
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  return pack2<kType>(larger(a_lo, b_lo), larger(a_hi, b_hi));
}
template <Dtype kType>
inline uint32_t min2(uint32_t a, uint32_t b) {
  return max2<kType>(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u;
}

template <Dtype kType>
inline uint32_t add2(uint32_t a, uint32_t b) {
  float a_lo, a_hi, b_lo, b_hi;
  widen2<kType>(a, a_lo, a_hi);
  widen2<kType>(b, b_lo, b_hi);
  return pack2<kType>(a_lo + b_lo, a_hi + b_hi);
}

inline int32_t round_to_int(float x) { return __float2int_rn(x); }

inline uint32_t pack_s4(int32_t a, int32_t b, uint32_t c) {
  const auto saturated = [](int32_t x) -> uint32_t { return (x < -8 ? -8 : x > 7 ? 7 : x) & 15; };
  return c << 8 | saturated(a) << 4 | saturated(b);
}
inline uint32_t pack_s8(int32_t a, int32_t b, uint32_t c) {
  const auto saturated = [](int32_t x) -> uint32_t {
    return (x < -128 ? -128 : x > 127 ? 127 : x) & 255;
  };
  return c << 16 | saturated(a) << 8 | saturated(b);
}

inline float reciprocal(float x) { return 1.0f / x; }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

template <class T>
inline T load_streaming(const T* global) {
  return *emulated::aligned("load_streaming", global);
}
template <class T>
inline void store_streaming(T* global, T value) {
  *emulated::aligned("store_streaming", global) = value;
}

inline void prefetch_l2(const void*) {}
inline int opaque(int x) { return x; }

inline void wait_for_earlier_kernels() {}

inline void cluster_arrive() { emulated::cluster_arrive(); }
inline void cluster_wait(emulated::Site site = emulated::Site::here()) {
  emulated::cluster_wait(site);
}
inline uint32_t cluster_rank() { return emulated::cluster_rank(); }
inline uint32_t cluster_size() { return emulated::cluster_size(); }

template <class T>
inline void cluster_store(T value, void* own_shared, uint32_t rank) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  std::memcpy(emulated::in_block_of_cluster(own_shared, 4, rank), &value, 4);
}
template <class T>
inline T cluster_load(const T* own_shared, uint32_t rank) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  T value;
  std::memcpy(&value, emulated::in_block_of_cluster(own_shared, 4, rank), 4);
  return value;
}

}  // namespace fq::cuda
