// The variants of attention_decode.
#pragma once

#include "../ops.h"

namespace fq::cpu {

// attention_decode with few heads and a long cache, so that threads can share the chunks of a head:
// what each chunk gives is kept, and joined in ascending order when all of them are there. The
// answer has the same bits.
struct AttentionParts {
  AttentionDecode args;
  int64_t queries;  // of one cache head: heads / kv_heads * tq, at most 128
  int64_t chunks;   // of one cache head
  float* memory;    // [batch * heads * tq, chunks, ..]
};

// memory: floats that it takes.
AttentionParts attention_in_parts(const AttentionDecode& args, float* memory);
int64_t attention_parts_floats(const AttentionParts& parts);

// Units: [batch * kv_heads, chunks].
void attention_parts(const AttentionParts& parts, int64_t begin, int64_t end);
void attention_parts_avx2(const AttentionParts& parts, int64_t begin, int64_t end);
void attention_parts_avx512(const AttentionParts& parts, int64_t begin, int64_t end);
void attention_parts_amx(const AttentionParts& parts, int64_t begin, int64_t end);

// The answers of the queries of one cache head, when all its units are done.
void attention_join(const AttentionParts& parts, int64_t head);
void attention_join_avx2(const AttentionParts& parts, int64_t head);
void attention_join_avx512(const AttentionParts& parts, int64_t head);

void attention_decode_avx2(const AttentionDecode& args, int64_t begin, int64_t end);
void attention_decode_avx512(const AttentionDecode& args, int64_t begin, int64_t end);
void attention_decode_amx(const AttentionDecode& args, int64_t begin, int64_t end);

}  // namespace fq::cpu
