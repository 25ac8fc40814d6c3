// See fiber.h.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fq::emulated {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

void* scheduler_context = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

unsigned char* new_stack() {
  void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0)
    throw std::runtime_error("emulator: no memory for the stack of a fiber");
  return static_cast<unsigned char*>(memory);
}

// The first thing on a fiber and the last on every switch to it.
void arrived_on_fiber(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#else
  static_cast<void>(fake_stack);
#endif
}

}  // namespace

void forbid_access([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(data, bytes);
#endif
}

void allow_access([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(data, bytes);
#endif
}

#if defined(__x86_64__)

// Saves the registers that a called function must keep and the stack pointer, and goes on where
// another call did that.
extern "C" void fq_emulated_switch(void** save, void* load);
asm(R"(
.text
.hidden fq_emulated_switch
.globl fq_emulated_switch
.type fq_emulated_switch, @function
fq_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fq_emulated_switch, .-fq_emulated_switch
)");

namespace {

void switch_context(void** save, void** load) { fq_emulated_switch(save, *load); }

void (*fiber_entry)() = nullptr;  // one for all fibers

void begin() {
  arrived_on_fiber(nullptr);
  fiber_entry();
}

void* first_context(unsigned char* stack, void (*entry)()) {
  fiber_entry = entry;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where begin() would return to; also aligns its frame
  *--top = reinterpret_cast<void*>(begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

}  // namespace

#else

namespace {

void switch_context(void** save, void** load) {
  if (!*save) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(*load));
}

void (*fiber_entry)() = nullptr;  // one for all fibers

void begin() {
  arrived_on_fiber(nullptr);
  fiber_entry();
}

void* first_context(unsigned char* stack, void (*entry)()) {
  fiber_entry = entry;
  ucontext_t* const context = new ucontext_t;  // a few hundred bytes, kept as long as the stack
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, begin, 0);
  return context;
}

}  // namespace

#endif

void make_fiber(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) fiber.stack = new_stack();
  allow_access(fiber.stack, kStackBytes);
  fiber.context = first_context(fiber.stack, entry);
  fiber.fake_stack = nullptr;
}

void switch_to_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  switch_context(&scheduler_context, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void switch_to_scheduler(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  switch_context(&fiber.context, &scheduler_context);
  arrived_on_fiber(fiber.fake_stack);
}

}  // namespace fq::emulated
