// Stand-ins for the types and the host functions of the CUDA runtime that csrc/cuda uses.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define FQ_VECTOR_TYPES(name, type)                                       \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };          \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FQ_VECTOR_TYPES(uchar, unsigned char)
FQ_VECTOR_TYPES(char, signed char)
FQ_VECTOR_TYPES(ushort, unsigned short)
FQ_VECTOR_TYPES(short, short)
FQ_VECTOR_TYPES(uint, unsigned)
FQ_VECTOR_TYPES(int, int)
FQ_VECTOR_TYPES(float, float)
#undef FQ_VECTOR_TYPES

using cudaStream_t = void*;

// With the numbers that the CUDA runtime gives them.
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};

cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream = nullptr);
