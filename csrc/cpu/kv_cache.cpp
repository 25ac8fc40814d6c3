// kv_quantize_append and kv_dequantize: the portable variant and the choice. See kv_cache_body.h.
// Without -mfma its multiply-adds are calls into libm: exact and slow.
#include "kv_cache.h"

#include "lanes.h"
#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "row_codes.h"

#include "kv_cache_body.h"

}  // namespace

void kv_quantize_append(const KvQuantizeAppend& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&kv_quantize_append_body, &kv_quantize_append_avx2, &kv_quantize_append_avx512)(args, begin,
                                                                                       end);
#else
  kv_quantize_append_body(args, begin, end);
#endif
}

void kv_dequantize(const KvDequantize& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&kv_dequantize_body, &kv_dequantize_avx2, &kv_dequantize_avx512)(args, begin, end);
#else
  kv_dequantize_body(args, begin, end);
#endif
}

}  // namespace fq::cpu
