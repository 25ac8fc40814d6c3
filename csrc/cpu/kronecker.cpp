// kronecker and kronecker_quantize: vec(P1^T X P2), in float or straight to codes. The portable
// variant and the choice. Without -mfma its multiply-adds are calls into libm: exact and slow.
#include "kronecker.h"

#include "lanes.h"
#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

constexpr int kTileRows = 2;

#include "row_body.h"

#include "row_codes.h"

#include "kronecker_body.h"

float* work_for(const Transform& t) {
  return static_cast<float*>(scratch(work_floats(t) * int64_t{sizeof(float)}));
}

}  // namespace

void kronecker(const Kronecker& args, int64_t begin, int64_t end) {
  float* const work = work_for(args.transform);
#if defined(__x86_64__)
  pick(&kronecker_rows, &kronecker_avx2, &kronecker_avx512, &kronecker_amx)(args, begin, end, work);
#else
  kronecker_rows(args, begin, end, work);
#endif
}

void kronecker_quantize(const KroneckerQuantize& args, int64_t begin, int64_t end) {
  float* const work = work_for(args.transform);
#if defined(__x86_64__)
  pick(&kronecker_quantize_rows, &kronecker_quantize_avx2, &kronecker_quantize_avx512,
       &kronecker_quantize_amx)(args, begin, end, work);
#else
  kronecker_quantize_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
