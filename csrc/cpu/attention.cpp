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

}  // namespace fq::cpu
