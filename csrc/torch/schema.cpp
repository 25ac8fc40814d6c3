// The schema of every op, once. No defaults: flatquant_cuda/ops.py states those.
#include <torch/csrc/stable/library.h>

#ifndef FQ_LIBRARY
#define FQ_LIBRARY flatquant_cuda
#endif

STABLE_TORCH_LIBRARY(FQ_LIBRARY, m) {
  m.def(
      "quantize_activation(Tensor x, Tensor? clip, int bits, bool symmetric, bool narrow,"
      " int layout) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "kronecker(Tensor x, Tensor? left, Tensor? right, Tensor? channel_scale,"
      " ScalarType out_dtype) -> Tensor");
  m.def(
      "kronecker_quantize(Tensor x, Tensor? gate, Tensor? channel_scale, float? rms_eps,"
      " Tensor? left, Tensor? right, Tensor? clip, int bits, bool symmetric, bool narrow,"
      " int layout) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def("hadamard(Tensor x, Tensor? base, float scale) -> Tensor");
  m.def(
      "gemm_w4a4(Tensor a, Tensor a_scale, Tensor? a_zero, Tensor w, Tensor w_scale,"
      " Tensor? w_colsum, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor");
  m.def(
      "gemm_w4a8(Tensor a, Tensor a_scale, Tensor? a_zero, Tensor w, Tensor w_scale,"
      " Tensor? w_colsum, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor");
  m.def(
      "gemm_w8a8(Tensor a, Tensor a_scale, Tensor? a_zero, Tensor w, Tensor w_scale,"
      " Tensor? w_colsum, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor");
  m.def("gemm_w4a16(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int bits) -> Tensor");
  m.def(
      "kv_quantize_append(Tensor x, Tensor? transform, Tensor? clip, int bits, Tensor(a!) codes,"
      " Tensor(b!) scale, Tensor(c!) zero, int start, Tensor? slots) -> ()");
  m.def(
      "kv_dequantize(Tensor codes, Tensor scale, Tensor zero, int bits, int head_dim, int length,"
      " ScalarType out_dtype, Tensor? block_table, Tensor? lengths) -> Tensor");
  m.def(
      "attention_decode(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_zero, Tensor v_codes,"
      " Tensor v_scale, Tensor v_zero, Tensor? mask, int k_bits, int v_bits, int length,"
      " float scaling, Tensor? block_table, Tensor? lengths, int window) -> Tensor");
  m.def("fake_quantize(Tensor x, Tensor clip, int bits, bool symmetric) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor clip, int bits, bool symmetric)"
      " -> (Tensor grad_x, Tensor grad_clip)");
}
