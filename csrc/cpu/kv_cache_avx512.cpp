// kv_quantize_append and kv_dequantize for AVX-512. See kv_cache_body.h.
#include "kv_cache.h"
#include "lanes.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "row_codes.h"

#include "kv_cache_body.h"

}  // namespace

void kv_quantize_append_avx512(const KvQuantizeAppend& args, int64_t begin, int64_t end) {
  kv_quantize_append_body(args, begin, end);
}

void kv_dequantize_avx512(const KvDequantize& args, int64_t begin, int64_t end) {
  kv_dequantize_body(args, begin, end);
}

}  // namespace fq::cpu
