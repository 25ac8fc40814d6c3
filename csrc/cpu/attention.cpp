// attention_decode: the portable variant and the choice. See attention_body.h. Without -mfma
// its multiply-adds are calls into libm: exact and slow.
#include "attention.h"

#include "lanes.h"
#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "kv_unpack.h"

#include "attention_body.h"

#include "attention_products.h"

}  // namespace

void attention_decode(const AttentionDecode& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&attention_decode_body, &attention_decode_avx2, &attention_decode_avx512,
       &attention_decode_amx)(args, begin, end);
#else
  attention_decode_body(args, begin, end);
#endif
}

AttentionParts attention_in_parts(const AttentionDecode& args, float* memory) {
  return {args, args.heads / args.kv_heads * args.tq, chunks_of(args), memory};
}

int64_t attention_parts_floats(const AttentionParts& parts) {
  const AttentionDecode& args = parts.args;
  const int64_t plane = whole_lanes(packed_bytes(args.head_dim, args.v_bits));
  const int64_t part = 2 + plane * (8 / code_width(args.v_bits));
  return args.batch * args.heads * args.tq * parts.chunks * part;
}

void attention_parts(const AttentionParts& parts, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&attention_parts_body, &attention_parts_avx2, &attention_parts_avx512, &attention_parts_amx)(
      parts, begin, end);
#else
  attention_parts_body(parts, begin, end);
#endif
}

void attention_join(const AttentionParts& parts, int64_t head) {
#if defined(__x86_64__)
  pick(&attention_join_body, &attention_join_avx2, &attention_join_avx512)(parts, head);
#else
  attention_join_body(parts, head);
#endif
}

}  // namespace fq::cpu
