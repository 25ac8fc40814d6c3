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

#include "kronecker_body.h"

// Room for a Workspace.
float* work_for(const Transform& t) {
  const int64_t factors =
      (t.left ? whole_lanes(t.n1 * t.n1) : 0) + (t.right ? t.n2 * whole_lanes(t.n2) : 0);
  const int64_t row = whole_lanes(t.n1 * t.n2) + 2 * t.n1 * whole_lanes(t.n2);
  return static_cast<float*>(scratch(4 * (row + factors)));
}

}  // namespace

void kronecker(const Kronecker& args, int64_t begin, int64_t end) {
  float* const work = work_for(args.transform);
#if defined(__x86_64__)
  pick(&kronecker_rows, &kronecker_avx2, &kronecker_avx512)(args, begin, end, work);
#else
  kronecker_rows(args, begin, end, work);
#endif
}

void kronecker_quantize(const KroneckerQuantize& args, int64_t begin, int64_t end) {
  float* const work = work_for(args.transform);
#if defined(__x86_64__)
  pick(&kronecker_quantize_rows, &kronecker_quantize_avx2, &kronecker_quantize_avx512)(args, begin,
                                                                                       end, work);
#else
  kronecker_quantize_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
