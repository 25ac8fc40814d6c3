// gemm_w8a8: out [m, n] = (a [m, k] w [n, k]^T) a_scale w_scale (+ bias) (+ residual), activation
// codes and weights in bytes. Arithmetic and layouts: ../contract.h, ../ops.h. The portable variant
// and the choice; the vector variants are described in gemm_integer_simd.h.
#include "gemm_integer.h"
#include "gemm_integer_plain.h"
#include "pick.h"

namespace fq::cpu {

void gemm_w8a8(const GemmInteger& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&gemm_plain<8, 8>, &gemm_w8a8_avx2, &gemm_w8a8_avx512, &gemm_w8a8_amx)(args, begin, end);
#else
  gemm_plain<8, 8>(args, begin, end);
#endif
}

}  // namespace fq::cpu
