// kronecker and kronecker_quantize for AVX2 + FMA: the shared loops over its registers.
#include "kronecker.h"

#include "lanes.h"

namespace fq::cpu {
namespace {

constexpr int kTileRows = 2;

#include "row_body.h"

#include "row_codes.h"

#include "kronecker_body.h"

}  // namespace

void kronecker_avx2(const Kronecker& args, int64_t begin, int64_t end, float* work) {
  kronecker_rows(args, begin, end, work);
}

void kronecker_quantize_avx2(const KroneckerQuantize& args, int64_t begin, int64_t end,
                             float* work) {
  kronecker_quantize_rows(args, begin, end, work);
}

}  // namespace fq::cpu
