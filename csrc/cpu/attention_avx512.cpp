// attention_decode for AVX-512. See attention_body.h.
#include "attention.h"
#include "lanes.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "kv_unpack.h"

#include "attention_body.h"

#include "attention_products.h"

}  // namespace

void attention_decode_avx512(const AttentionDecode& args, int64_t begin, int64_t end) {
  attention_decode_body(args, begin, end);
}

void attention_parts_avx512(const AttentionParts& parts, int64_t begin, int64_t end) {
  attention_parts_body(parts, begin, end);
}

void attention_join_avx512(const AttentionParts& parts, int64_t head) {
  attention_join_body(parts, head);
}

}  // namespace fq::cpu
