// The integer GEMM kernels behind cuda::gemm_w4a4, gemm_w4a8 and gemm_w8a8. Pure C++, no CUDA
// header.
//
// gemm.cu asks plan_gemm.h which kernel and tile to take and calls one of these. All of them
// compute what GemmInteger in ../ops.h says, exactly:
//
//   acc[m, n] = sum_k a w, in int32;  acc -= a_zero[m] * w_colsum[n], if a_zero is given, wrapping
//   y = float(acc) * (a_scale[m] * w_scale[n]);  y = y + bias[n], if given;  out = round_T(y), or
//   round_T(residual + round_T(y))
//
// so the answer does not depend on the choice. They enqueue on a stream and return a cudaError_t.
// Pointers in GemmInteger mean what the op says: `a` holds nibbles or bytes by the kernel's name.
//
// The CUTLASS kernels (*_cutlass_*.cu, compiled only where CUTLASS is found; FQ_CUTLASS is defined
// then) may rely on: k % 32 == 0, n % 8 == 0, every pointer but the scales', a_zero's, w_colsum's
// and bias's aligned to 16 bytes, out_dtype bfloat16 or float16, m >= 1, n >= 1, a tile from
// kGemmTiles of their own kind, the right architecture, and a_zero null unless takes_zero(kernel).
#pragma once

#include "../ops.h"
#include "plan_gemm.h"

namespace fq::cuda {

// Hand-written, s8 mma.sync: every architecture from 80 on, any shape, dtype and alignment.
// a: nibbles (a_bits 4) or bytes (8), unsigned if a_zero is given; w: nibbles or bytes.
int gemm_mma(const GemmInteger& args, int a_bits, int w_bits, const GemmPlan& plan, void* stream);

// The same for few tokens: weights stream past the tensor cores once. k * a_bits and k * w_bits are
// multiples of 128, a and w aligned to 16 bytes.
int gemm_stream(const GemmInteger& args, int a_bits, int w_bits, const StreamPlan& plan,
                void* stream);

// a: nibbles, unsigned if a_zero is given, w: nibbles; s4 mma.sync, native on 80, 86 and 89 only.
int gemm_s4_sm8x(const GemmInteger& args, const GemmTile& tile, void* stream);

// a: int8, w: nibbles, widened in registers; 80, 86, 89.
int gemm_s8s4_sm8x(const GemmInteger& args, const GemmTile& tile, void* stream);

// a: int8, w: nibbles, widened in registers; wgmma with w from registers; 90a.
int gemm_mixed_sm90(const GemmInteger& args, const GemmTile& tile, void* stream);

// a: int8, w: int8; wgmma with both from shared memory; 90a.
int gemm_bytes_sm90(const GemmInteger& args, const GemmTile& tile, void* stream);

}  // namespace fq::cuda
