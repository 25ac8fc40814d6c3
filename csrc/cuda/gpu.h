// What the planners know of a GPU: a table from the vendor's documents, for tests and floors, and
// the device at hand, for launches. No CUDA header.
//
// Sources. Shared memory and registers: CUDA C++ Programming Guide, "Technical Specifications per
// Compute Capability". The rest: NVIDIA A100 Tensor Core GPU Architecture (whitepaper) and the A100
// datasheet; NVIDIA Ampere GA102 GPU Architecture (whitepaper) and the A40 datasheet; NVIDIA Ada
// GPU Architecture (whitepaper) and the L40S datasheet; NVIDIA H100 Tensor Core GPU Architecture
// (whitepaper) and the H100 and H200 datasheets; NVIDIA Blackwell Tuning Guide and the DGX B200
// datasheet; NVIDIA RTX Blackwell GPU Architecture (whitepaper).
#pragma once

#include <cstdint>

namespace fq::cuda {

struct Gpu {
  const char* name;
  int32_t arch;              // 10 * major + minor of the compute capability; 0: no device
  int32_t sms;               // streaming multiprocessors
  int32_t shared_per_block;  // bytes, the most a kernel may ask for
  int32_t shared_per_sm;     // bytes; each resident block takes 1 KiB more than it asks for
  int32_t registers_per_sm;  // 32-bit
  int32_t l2_bytes;
  int32_t bandwidth_gb;  // of its memory, 10^9 bytes a second; 0: unknown
};

constexpr int32_t kKiB = 1024, kMiB = 1024 * kKiB;

// clang-format off
constexpr Gpu kGpus[] = {
    // name        arch  SMs  shared: block,      SM  registers         L2  GB/s
    {"A100-80G",     80, 108, 163 * kKiB, 164 * kKiB, 65536,  40 * kMiB, 2039},  // SXM
    {"A100-40G",     80, 108, 163 * kKiB, 164 * kKiB, 65536,  40 * kMiB, 1555},
    {"A40",          86,  84,  99 * kKiB, 100 * kKiB, 65536,   6 * kMiB,  696},
    {"RTX 3090",     86,  82,  99 * kKiB, 100 * kKiB, 65536,   6 * kMiB,  936},
    {"RTX 4090",     89, 128,  99 * kKiB, 100 * kKiB, 65536,  72 * kMiB, 1008},
    // L40S: 48 or 96 MB (the whole chip) of L2, by source; the smaller is the safer.
    {"L40S",         89, 142,  99 * kKiB, 100 * kKiB, 65536,  48 * kMiB,  864},
    {"H100 SXM",     90, 132, 227 * kKiB, 228 * kKiB, 65536,  50 * kMiB, 3350},
    {"H100 PCIe",    90, 114, 227 * kKiB, 228 * kKiB, 65536,  50 * kMiB, 2000},
    {"H200",         90, 132, 227 * kKiB, 228 * kKiB, 65536,  50 * kMiB, 4800},
    {"B200",        100, 148, 227 * kKiB, 228 * kKiB, 65536, 126 * kMiB, 8000},
    {"RTX 5090",    120, 170,  99 * kKiB, 100 * kKiB, 65536,  96 * kMiB, 1792},
};
// clang-format on

// The current device, asked once per device; arch is 0 when there is none. Any thread may call it,
// also while a CUDA graph is captured.
const Gpu& current_gpu();

}  // namespace fq::cuda
