// Working memory of a kernel: one buffer per thread, kept between calls, so that nothing is
// allocated in a hot path once every thread has seen its largest call.
#pragma once

#include <cstdint>

namespace fq::cpu {

// At least `bytes` bytes, 64-byte aligned, not cleared; valid until this thread's next call of
// scratch. Throws std::bad_alloc. Defined in a file of its own, so that no copy of it is compiled
// for a particular instruction set.
void* scratch(int64_t bytes);

}  // namespace fq::cpu
