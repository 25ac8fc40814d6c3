// Comes before everything when a CUTLASS kernel of csrc/cuda is compiled for the host: CUDA's own
// types, which CUTLASS wants, and the emulator of tests/emulated for the rest.
//
// CUTLASS 2.x is ordinary C++ but for the instructions in cutlass/arch, and outside of nvcc it
// compiles as such. So this folder has three of those headers again, by the same names and found
// first, made of the emulator's operations.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>  // before the namespace: emulated_types.h includes them, too
#include <cstdint>

// The emulator was compiled with these; they have the layout of CUDA's, and no link between the two
// goes by their names.
namespace fq::emulated_types {
#include "emulated_types.h"
}
#include "emulator.h"
