// From tensors to the structs of ops.h: every check of user input and every allocation of an
// output, the same for all devices. What fails throws std::runtime_error, a RuntimeError in Python,
// whose message names the op, the argument, its value and the rule.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"

namespace fq::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // codes, scale, zero
struct Nothing {};                                     // the result of an op that returns none

// An op that is ready to run.
template <class Args, class Out>
struct Prepared {
  Args args;
  Out out;
  int64_t units;             // size of the op's outer dimension; 0 if there is nothing to do
  int64_t work;              // of all units, in very roughly nanoseconds of one core
  std::vector<Tensor> kept;  // converted inputs that args points into
};

Prepared<QuantizeActivation, Quantized> quantize_activation(Tensor x, MaybeTensor clip,
                                                            int64_t bits, bool symmetric,
                                                            bool narrow, int64_t layout);
Prepared<Kronecker, Tensor> kronecker(Tensor x, MaybeTensor left, MaybeTensor right,
                                      MaybeTensor channel_scale, ScalarType out_dtype);
Prepared<KroneckerQuantize, Quantized> kronecker_quantize(
    Tensor x, MaybeTensor gate, MaybeTensor channel_scale, std::optional<double> rms_eps,
    MaybeTensor left, MaybeTensor right, MaybeTensor clip, int64_t bits, bool symmetric,
    bool narrow, int64_t layout);
Prepared<Hadamard, Tensor> hadamard(Tensor x, MaybeTensor base, double scale);
Prepared<GemmInteger, Tensor> gemm_w4a4(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype);
Prepared<GemmInteger, Tensor> gemm_w4a8(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype);
Prepared<GemmInteger, Tensor> gemm_w8a8(Tensor a, Tensor a_scale, MaybeTensor a_zero, Tensor w,
                                        Tensor w_scale, MaybeTensor w_colsum, MaybeTensor bias,
                                        MaybeTensor residual, ScalarType out_dtype);
Prepared<GemmW4A16, Tensor> gemm_w4a16(Tensor x, Tensor w, Tensor w_scale, MaybeTensor bias,
                                       int64_t bits);
Prepared<KvQuantizeAppend, Nothing> kv_quantize_append(Tensor x, MaybeTensor transform,
                                                       MaybeTensor clip, int64_t bits, Tensor codes,
                                                       Tensor scale, Tensor zero, int64_t start,
                                                       MaybeTensor slots);
Prepared<KvDequantize, Tensor> kv_dequantize(Tensor codes, Tensor scale, Tensor zero, int64_t bits,
                                             int64_t head_dim, int64_t length, ScalarType out_dtype,
                                             MaybeTensor block_table, MaybeTensor lengths);
Prepared<AttentionDecode, Tensor> attention_decode(Tensor q, Tensor k_codes, Tensor k_scale,
                                                   Tensor k_zero, Tensor v_codes, Tensor v_scale,
                                                   Tensor v_zero, MaybeTensor mask, int64_t k_bits,
                                                   int64_t v_bits, int64_t length, double scaling,
                                                   MaybeTensor block_table, MaybeTensor lengths,
                                                   int64_t window);
Prepared<FakeQuantize, Tensor> fake_quantize(Tensor x, Tensor clip, int64_t bits, bool symmetric);
Prepared<FakeQuantizeBackward, std::tuple<Tensor, Tensor>> fake_quantize_backward(
    Tensor grad, Tensor x, Tensor clip, int64_t bits, bool symmetric);

}  // namespace fq::binding
