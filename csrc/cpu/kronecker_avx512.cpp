// kronecker and kronecker_quantize for AVX-512: the shared loops over its registers.
#include "kronecker.h"

#include "lanes.h"

namespace fq::cpu {
namespace {

constexpr int kTileRows = 8;

#include "row_body.h"

#include "row_codes.h"

#include "kronecker_body.h"

}  // namespace

void kronecker_avx512(const Kronecker& args, int64_t begin, int64_t end, float* work) {
  kronecker_rows(args, begin, end, work);
}

void kronecker_quantize_avx512(const KroneckerQuantize& args, int64_t begin, int64_t end,
                               float* work) {
  kronecker_quantize_rows(args, begin, end, work);
}

}  // namespace fq::cpu
