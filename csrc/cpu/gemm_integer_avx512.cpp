// The integer GEMMs for AVX-512 with VNNI. See gemm_integer_avx512.h.
#include "gemm_integer_avx512.h"

namespace fq::cpu {

void gemm_w4a4_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 4, 4>(args, begin, end);
}

void gemm_w4a8_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 8, 4>(args, begin, end);
}

void gemm_w8a8_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 8, 8>(args, begin, end);
}

}  // namespace fq::cpu
