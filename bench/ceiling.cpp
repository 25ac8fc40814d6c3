// What this processor can do at most: products of bytes out of registers, and bytes out of memory.
// bench/ceiling.py compiles this file for the machine it runs on, and calls it from every thread.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// What the loops compute goes here, so that no compiler leaves them out.
volatile int64_t sink;

}  // namespace

extern "C" {

// Each function multiplies and adds bytes `rounds` times and returns the operations that were done
// (a product and its addition are two); 0 where the instructions are missing.

int64_t fq_multiply_amx(int64_t rounds) {
#if defined(__AMX_INT8__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  alignas(64) volatile uint8_t config[64] = {};
  config[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
  for (int64_t round = 0; round < rounds; ++round) {
    // Four sums of two left and two right factors, as the inner loop of a product has them.
    asm volatile(
        "tdpbsud %tmm6, %tmm4, %tmm0\n\t"
        "tdpbsud %tmm7, %tmm4, %tmm1\n\t"
        "tdpbsud %tmm6, %tmm5, %tmm2\n\t"
        "tdpbsud %tmm7, %tmm5, %tmm3\n\t");
  }
  asm volatile("tilerelease");
  return rounds * 4 * (2 * 16 * 16 * 64);
#else
  return 0 * rounds;
#endif
}

int64_t fq_multiply_avx512(int64_t rounds) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  constexpr int kSums = 16;  // more than latency times units, so that every unit is always busy
  __m512i sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_epi32(i);
  __m512i left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(-2);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], left, right);
    asm volatile("" : "+v"(left), "+v"(right));
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  sink = _mm512_reduce_add_epi32(sums[0]);
  return rounds * kSums * (2 * 64);
#else
  return 0 * rounds;
#endif
}

int64_t fq_multiply_avx2(int64_t rounds) {
#if defined(__AVX2__)
  constexpr int kSums = 10;
  __m256i sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_set1_epi32(i);
  __m256i left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(-2);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      __m256i pairs = _mm256_maddubs_epi16(left, right);
      asm volatile("" : "+x"(pairs));  // each sum has products of its own
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  sink = _mm256_extract_epi32(sums[0], 0);
  return rounds * kSums * (2 * 32);
#else
  return 0 * rounds;
#endif
}

// Reads memory once, in `streams` places at a time, 1 or 4; bytes is a multiple of 1024.
void fq_read(const int64_t* memory, int64_t bytes, int64_t streams) {
  // Vectors of 64 bytes, in whatever registers the machine has.
  typedef int64_t Vector __attribute__((vector_size(64), aligned(8)));
  const Vector* vectors = reinterpret_cast<const Vector*>(memory);
  const int64_t count = bytes / 64 / 4, apart = streams == 1 ? 1 : count;
  const int64_t step = streams == 1 ? 4 : 1;
  Vector sums[4] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < 4; ++j) sums[j] += vectors[i * step + j * apart];
  }
  const Vector sum = sums[0] + sums[1] + (sums[2] + sums[3]);
  sink = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

}  // extern "C"
