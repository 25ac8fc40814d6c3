// gemm_w4a16: the portable variant and the choice. See gemm_w4a16_body.h. Without -mfma its
// multiply-adds are calls into libm: exact and slow.
#include "gemm_w4a16.h"

#include <cstddef>

#include "lanes.h"
#include "pick.h"
#include "quads.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

constexpr int kRegisters = 16;

#include "row_body.h"

#include "gemm_w4a16_body.h"

}  // namespace

int64_t gemm_tiles(const GemmW4A16& args) { return tiling(args).count(); }

void gemm_w4a16(const GemmW4A16& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&gemm_w4a16_body, &gemm_w4a16_avx2, &gemm_w4a16_avx512, &gemm_w4a16_amx)(args, begin, end);
#else
  gemm_w4a16_body(args, begin, end);
#endif
}

}  // namespace fq::cpu
