// gemm_w4a4: out [m, n] = (a [m, k] w [n, k]^T) a_scale w_scale (+ bias) (+ residual), activation
// codes in nibbles, weights in nibbles. Arithmetic and layouts: ../contract.h, ../ops.h. The
// portable variant and the choice; the vector variants are described in gemm_integer_simd.h.
#include "gemm_integer.h"
#include "gemm_integer_plain.h"
#include "pick.h"

namespace fq::cpu {

int64_t gemm_tiles(const GemmInteger& args) { return tiling(args).count(); }

void gemm_w4a4(const GemmInteger& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&gemm_plain<4, 4>, &gemm_w4a4_avx2, &gemm_w4a4_avx512, &gemm_w4a4_amx)(args, begin, end);
#else
  gemm_plain<4, 4>(args, begin, end);
#endif
}

}  // namespace fq::cpu
