// gemm_w4a16 for AVX2 + FMA. See gemm_w4a16_body.h.
#include <cstddef>

#include "gemm_w4a16.h"
#include "lanes.h"
#include "quads.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

constexpr int kRegisters = 16;

#include "row_body.h"

#include "gemm_w4a16_body.h"

}  // namespace

void gemm_w4a16_avx2(const GemmW4A16& args, int64_t begin, int64_t end) {
  gemm_w4a16_body(args, begin, end);
}

}  // namespace fq::cpu
