// The layers of a model bound once, so that an op can run all of them.
//
// A plan is a uint8 tensor in the memory of the host that holds the structs of ../decoder_stack.h,
// pointers and all: whoever made it keeps the tensors alive that it was made of
// (flatquant_cuda/decoder.py does). Making it checks every shape and dtype, so that a call, which
// may be one token, checks only what is new.
#pragma once

#include "../decoder_stack.h"
#include "args.h"
#include "checks.h"

#ifndef FQ_LIBRARY
#define FQ_LIBRARY flatquant_cuda
#endif

namespace fq::binding {

struct Plan {
  const StackLayer* layers;
  int64_t count;
  const StackSizes& sizes;
};

// What lies in a tensor that decoder_plan returned; any other is refused, and a plan for another
// device than that of `first`.
Plan read_plan(const Checks& check, const Tensor& plan, const Tensor& first);

Prepared<DecoderStack, Tensor> decoder_stack(Tensor hidden, Tensor cos, Tensor sin,
                                             MaybeTensor mask, Tensor plan, Tensor cache,
                                             int64_t past, MaybeTensor slots, MaybeTensor lengths);

// Uninitialized uint8 [rows, row_bytes] in the memory of the host.
Tensor host_bytes(const Tensor& like, int64_t rows, int64_t row_bytes);

// Of whole words. What was not made here, or was changed since, is refused before a pointer of it
// is followed.
uint64_t digest(const void* data, int64_t bytes);

}  // namespace fq::binding
