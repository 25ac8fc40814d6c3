// The native API: one plain struct of pointers and sizes per op, and one function per op and device
// that takes it. No torch, no CUDA header.
//
// All arrays are contiguous, row-major, and do not overlap unless said otherwise. The caller
// (csrc/torch/args.cpp) has checked every argument and allocated every output; a kernel checks
// nothing, allocates no output, starts no thread and throws nothing.
//
// cpu:: functions work on [begin, end) of the op's outer dimension, named above each, so that the
// caller can share it out to threads; results do not depend on how it is cut. cuda:: functions
// enqueue the whole op on a stream (a cudaStream_t) and return a cudaError_t as int; those that
// need scratch memory get it from the caller, at least workspace_bytes(args) of it.
//
// T is the type named by the struct's `dtype`. "optional" pointers may be null. The arithmetic is
// fixed by contract.h.
#pragma once

#include "contract.h"

namespace fq {

// How the codes of a row lie in memory. kPacked is the order of contract.h: nibbles up to 4 bits,
// else bytes. kBytes is one byte a code at every width, what an 8-bit matrix unit reads.
enum class Layout : int32_t { kPacked = 0, kBytes = 1 };

// How rows of numbers become codes.
struct Grid {
  int32_t bits;    // 2..8
  bool symmetric;  // codes in two's complement around 0; otherwise 0..2^bits-1 with a zero point
  bool narrow;     // symmetric only: leave out the most negative code
  Layout layout;
};

FQ_HD int64_t row_bytes(const Grid& grid, int64_t k) {
  return grid.layout == Layout::kBytes ? k : activation_bytes(k, grid.bits);
}

// x -> codes, scale, zero, per row. Outer dimension: rows.
struct QuantizeActivation {
  const void* x;      // T [rows, k]
  const float* clip;  // [2] = (max, min) ratios, optional: (1, 1)
  uint8_t* codes;     // [rows, row_bytes(grid, k)]; an odd k leaves the last high nibble 0
  float* scale;       // [rows]
  int32_t* zero;      // [rows]; null when symmetric
  int64_t rows, k;
  Dtype dtype;
  Grid grid;
};

// The online transform of one row x [k]: times c, then vec(P1^T X P2), where X = x.reshape(n1, n2).
struct Transform {
  const float* channel_scale;  // c: [k], optional: v = round_T(x * c)
  const void* left;            // P1^T [n1, n1], optional: identity; rounded to T before use
  const void* right;           // P2 [n2, n2], optional: identity; rounded to T before use
  int64_t n1, n2;              // n1 * n2 = k; (1, k) when both factors are null
  Dtype left_dtype, right_dtype;
};

// x -> transformed x. Outer dimension: rows.
struct Kronecker {
  const void* x;  // T [rows, k]
  void* out;      // out_dtype [rows, k]
  Transform transform;
  int64_t rows, k;
  Dtype dtype, out_dtype;
};

// x -> codes of the transformed x, in one pass. Outer dimension: rows.
struct KroneckerQuantize {
  const void* x;     // T [rows, k]
  const void* gate;  // T [rows, k], optional: v = round_T(silu(gate) * x) comes first
  const float* clip;
  uint8_t* codes;
  float* scale;  // times 1 / sqrt(mean(v^2) + rms_eps), v before channel_scale, if rms
  int32_t* zero;
  Transform transform;
  int64_t rows, k;
  float rms_eps;
  bool rms;
  Dtype dtype;
  Grid grid;
  // Elements from a row of x, and of gate, to the next, which cuda:: knows only; 0: k.
  int64_t stride = 0;
};

// y = round_T((x (base (x) H)) * scale), H Sylvester's Hadamard matrix [power, power]: as matrices
// [m, power], Y = base^T X H * scale. Outer dimension: rows.
struct Hadamard {
  const void* x;              // T [rows, n]
  const void* base;           // base_dtype [m, m], entries +-1, optional: m = 1
  void* out;                  // T [rows, n]
  int64_t rows, n, m, power;  // n = m * power, power = 2^j
  float scale;
  Dtype dtype, base_dtype;
};

// out = round(float(sum_k a w) * (a_scale * w_scale) + bias), then round(residual + out). Outer
// dimension: tiles of the output, cpu::gemm_tiles(args) of them; a one-row call has several too, so
// that it can use every core. A thread's tiles should be consecutive: they share the rows of a.
//   w4a4: a holds nibbles [m, k / 2]: signed, or unsigned if a_zero is given.
//   w4a8: a holds int8 [m, k], or uint8 if a_zero is given.
//   w8a8: likewise, and w holds int8 [n, k]; k <= kMaxGemmK / 16.
//   An odd k leaves the last high nibble of every row 0, in a and in w; w4a4 does not know about
//   it: its k is then rounded up to even. With a_zero the accumulator is sum_k a w - a_zero *
//   w_colsum, in int32.
struct GemmInteger {
  const uint8_t* a;
  const float* a_scale;     // [m]
  const int32_t* a_zero;    // [m], optional
  const uint8_t* w;         // [n, nibble_bytes(k)], signed nibbles; w8a8: int8 [n, k]
  const float* w_scale;     // [n]
  const int32_t* w_colsum;  // [n] = sum_k w, given when a_zero is
  const void* bias;         // bias_dtype [n], optional
  const void* residual;     // out_dtype [m, n], optional
  void* out;                // out_dtype [m, n]
  int64_t m, n, k;          // k <= kMaxGemmK
  Dtype bias_dtype, out_dtype;
};

// out = round_T(sum_k x * (w * w_scale[group of k]) + bias), float32 accumulation. Outer dimension:
// tiles of the output, cpu::gemm_tiles(args) of them.
struct GemmW4A16 {
  const void* x;         // T [m, k]
  const uint8_t* w;      // [n, packed_bytes(k, bits)], signed
  const float* w_scale;  // [n, groups]; group g covers k in [g * k / groups, (g + 1) * k / groups)
  const void* bias;      // bias_dtype [n], optional
  void* out;             // T [m, n]
  int64_t m, n, k, groups;
  int32_t bits;  // 2, 3, 4
  Dtype dtype, bias_dtype;
};

// x -> asymmetric codes per token and head, written into a cache from position `start` on. Outer
// dimension: batch_heads * t, the rows of x; row r is head r / t, position start + r % t.
struct KvQuantizeAppend {
  const void* x;          // T [batch_heads, t, head_dim]
  const void* transform;  // P: transform_dtype [head_dim, head_dim], optional; y = x round_T(P)
  const float* clip;      // [2] = (max, min), optional
  uint8_t* codes;         // [batch_heads, capacity, packed_bytes(head_dim, bits)], unsigned codes
  float* scale;           // [batch_heads, capacity]
  uint8_t* zero;          // [batch_heads, capacity]
  int64_t batch_heads, t, capacity, start, head_dim;
  int32_t bits;  // 2..8
  Dtype dtype, transform_dtype;
  // Paged, which cuda:: knows only: a cache of `blocks` blocks of [kv_heads, capacity, ...]. Token
  // i of sequence b goes to position slots[b, i] % capacity of block slots[b, i] / capacity; it is
  // left out if there is no such block. `start` means nothing then.
  const int64_t* slots = nullptr;  // [batch, t], optional
  int64_t kv_heads = 0, blocks = 0;
};

// The first `length` positions of a cache, as floats: round((q - z) * s). Outer dimension:
// batch_heads * length, the rows of out.
struct KvDequantize {
  const uint8_t* codes;
  const float* scale;
  const uint8_t* zero;
  void* out;  // out_dtype [batch_heads, length, head_dim]
  int64_t batch_heads, capacity, length, head_dim;
  int32_t bits;
  Dtype out_dtype;
  // As in AttentionDecode, for cuda:: only. Positions from lengths[b] on give 0.
  const int32_t* block_table = nullptr;
  const int32_t* lengths = nullptr;
  int64_t kv_heads = 0, blocks = 0, max_blocks = 0;
};

enum class Mask : int32_t { kNone = 0, kBool = 1, kAdditive = 2 };

// out = softmax(q k^T * scaling + mask) v over the first `length` positions of a quantized cache,
// float32 inside; k and v are (q - z) * s, not rounded. Query head h reads cache head h / (heads /
// kv_heads). Outer dimension: batch * heads * tq, the rows of q; the consecutive queries of one
// cache head in [begin, end) share the unpacking of its codes.
//   A position may be attended to unless the mask says false or -Inf there; a query that may attend
//   to nothing gives 0. A cache row whose scale is NaN gives NaN to exactly the queries that may
//   attend to it.
struct AttentionDecode {
  const void* q;           // T [batch, heads, tq, head_dim]
  const uint8_t* k_codes;  // [batch, kv_heads, capacity, packed_bytes(head_dim, k_bits)]
  const float* k_scale;    // [batch, kv_heads, capacity]
  const uint8_t* k_zero;
  const uint8_t* v_codes;  // [batch, kv_heads, capacity, packed_bytes(head_dim, v_bits)]
  const float* v_scale;
  const uint8_t* v_zero;
  const void* mask;  // bool bytes or mask_dtype [batch, heads, tq, length], by mask_strides
  void* out;         // T [batch, heads, tq, head_dim]
  int64_t batch, heads, kv_heads, tq, head_dim, capacity, length;
  int64_t mask_strides[4];  // in elements; 0 where the mask is broadcast
  int32_t k_bits, v_bits;
  float scaling;
  Mask mask_kind;
  Dtype dtype, mask_dtype;
  // What follows cuda:: knows only. Paged: a cache of `blocks` blocks of [kv_heads, capacity, ...];
  // position j of sequence b is in block block_table[b, j / capacity], and counts as a row of scale
  // NaN if there is no such block.
  const int32_t* block_table = nullptr;  // [batch, max_blocks], optional
  // Query i may attend to positions below min(lengths[b], length) - tq + 1 + i, and if window > 0
  // to the last `window` of those. Both on the device, so that a CUDA graph serves all lengths.
  const int32_t* lengths = nullptr;  // [batch], optional
  int64_t blocks = 0, max_blocks = 0, window = 0;
};

// x -> (q - z) * s, the quantized values as floats, for calibration. Outer dimension: rows.
struct FakeQuantize {
  const float* x;     // [rows, k]
  const float* clip;  // [2] = (max, min) ratios, or [2, rows] if clip_per_row
  float* y;           // [rows, k]
  int64_t rows, k;
  int32_t bits;
  bool symmetric, clip_per_row;
};

// Its gradient: rounding passes it on, clamping stops it, the scale passes it to clip ratios and to
// the largest and smallest element. Outer dimension: rows.
struct FakeQuantizeBackward {
  const float* grad;  // [rows, k], of y
  const float* x;     // [rows, k]
  const float* clip;  // as above
  float* grad_x;      // [rows, k]
  float* grad_clip;   // [2, rows]
  int64_t rows, k;
  int32_t bits;
  bool symmetric, clip_per_row;
};

namespace cpu {

void quantize_activation(const QuantizeActivation& args, int64_t begin, int64_t end);  // rows
void kronecker(const Kronecker& args, int64_t begin, int64_t end);                     // rows
void kronecker_quantize(const KroneckerQuantize& args, int64_t begin, int64_t end);    // rows
void hadamard(const Hadamard& args, int64_t begin, int64_t end);                       // rows
void gemm_w4a4(const GemmInteger& args, int64_t begin, int64_t end);  // tiles of out
void gemm_w4a8(const GemmInteger& args, int64_t begin, int64_t end);  // tiles of out
void gemm_w8a8(const GemmInteger& args, int64_t begin, int64_t end);  // tiles of out
void gemm_w4a16(const GemmW4A16& args, int64_t begin, int64_t end);   // tiles of out
int64_t gemm_tiles(const GemmInteger& args);
int64_t gemm_tiles(const GemmW4A16& args);
void kv_quantize_append(const KvQuantizeAppend& args, int64_t begin,
                        int64_t end);                                      // batch_heads * t
void kv_dequantize(const KvDequantize& args, int64_t begin, int64_t end);  // batch_heads * length
void attention_decode(const AttentionDecode& args, int64_t begin,
                      int64_t end);                                        // batch * heads * tq
void fake_quantize(const FakeQuantize& args, int64_t begin, int64_t end);  // rows
void fake_quantize_backward(const FakeQuantizeBackward& args, int64_t begin, int64_t end);  // rows

}  // namespace cpu

namespace cuda {

int quantize_activation(const QuantizeActivation& args, void* workspace, void* stream);
int kronecker(const Kronecker& args, void* workspace, void* stream);
int kronecker_quantize(const KroneckerQuantize& args, void* workspace, void* stream);
int hadamard(const Hadamard& args, void* workspace, void* stream);
int gemm_w4a4(const GemmInteger& args, void* workspace, void* stream);
int gemm_w4a8(const GemmInteger& args, void* workspace, void* stream);
int gemm_w8a8(const GemmInteger& args, void* workspace, void* stream);
int gemm_w4a16(const GemmW4A16& args, void* workspace, void* stream);
int kv_quantize_append(const KvQuantizeAppend& args, void* workspace, void* stream);
int kv_dequantize(const KvDequantize& args, void* workspace, void* stream);
int attention_decode(const AttentionDecode& args, void* workspace, void* stream);

// Of the current device, and only what that op needs there.
int64_t gemm_w4a4_workspace(const GemmInteger& args);
int64_t attention_decode_workspace(const AttentionDecode& args);

const char* error_string(int error);

}  // namespace cuda
}  // namespace fq
