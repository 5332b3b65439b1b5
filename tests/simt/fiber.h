// Fibers: functions with stacks of their own, which take turns with the one that resumes them.
//
// Registers are switched by hand on x86-64, where it takes ten nanoseconds, and by ucontext elsewhere, which is much
// slower because it asks the operating system for the signal mask. AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(NORMKERNELS_SIMT_UCONTEXT)
#define NORMKERNELS_SIMT_UCONTEXT
#endif
#ifdef NORMKERNELS_SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace nk::simt {

#ifdef NORMKERNELS_SIMT_UCONTEXT

using Registers = ucontext_t;

inline void switch_registers(Registers& save, Registers& load) {
  swapcontext(&save, &load);
}

inline void prepare_registers(Registers& registers, unsigned char* bottom, unsigned char* top, void (*entry)()) {
  getcontext(&registers);
  registers.uc_stack.ss_sp = bottom;
  registers.uc_stack.ss_size = top - bottom;
  registers.uc_link = nullptr;
  makecontext(&registers, entry, 0);
}

#else

using Registers = void*;  // the stack pointer; the others lie on the stack

// Switches the registers that a function must preserve, but no floating-point modes, which no kernel changes. It jumps
// instead of returning: the processor predicts returns from calls, and there was none.
extern "C" void normkernels_simt_switch(Registers* save, Registers* load);
asm(R"(
  .pushsection .text
  .type normkernels_simt_switch, @function
normkernels_simt_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rdx
  jmp *%rdx
  .size normkernels_simt_switch, . - normkernels_simt_switch
  .popsection
)");

inline void switch_registers(Registers& save, Registers& load) {
  normkernels_simt_switch(&save, &load);
}

// A stack as normkernels_simt_switch leaves one: six registers, where to go on, and, as if by a call from nowhere, a
// return address of zero, where backtraces end.
inline void prepare_registers(Registers& registers, unsigned char*, unsigned char* top, void (*entry)()) {
  auto* slots = reinterpret_cast<uintptr_t*>(top) - 8;
  for (int i = 0; i < 8; ++i) slots[i] = 0;
  slots[6] = reinterpret_cast<uintptr_t>(entry);
  registers = slots;
}

#endif

class Fiber {
 public:
  // The n-th fiber's stack starts a few cache lines lower than the one's before: a warp's lanes at the same place of a
  // kernel would otherwise compete for the same lines of the cache.
  explicit Fiber(unsigned n) : page_(sysconf(_SC_PAGESIZE)) {
    memory_ = static_cast<unsigned char*>(
        mmap(nullptr, page_ + BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, page_, PROT_NONE);  // an overflow ends the program instead of writing to the next stack
    top_ = memory_ + page_ + BYTES - n * 5 % 64 * 64;
  }
  ~Fiber() { munmap(memory_, page_ + BYTES); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(), which must end in finish(). A fiber that was left in the middle is forgotten.
  void prepare(void (*entry)()) {
    if (abandoned_) __asan_unpoison_memory_region(memory_ + page_, BYTES);
    abandoned_ = true;
    prepare_registers(registers_, memory_ + page_, top_, entry);
  }

  // Called from outside: goes on in the fiber until it calls suspend() or finish().
  void resume() {
    void* frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, memory_ + page_, BYTES);
    switch_registers(outside_, registers_);
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
  }

  // The following are called by the fiber itself. The first thing in it:
  void begun() { __sanitizer_finish_switch_fiber(nullptr, &outside_stack_, &outside_bytes_); }

  void suspend() {
    void* frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, outside_stack_, outside_bytes_);
    switch_registers(registers_, outside_);
    __sanitizer_finish_switch_fiber(frames, &outside_stack_, &outside_bytes_);
  }

  void finish() {
    abandoned_ = false;
    __sanitizer_start_switch_fiber(nullptr, outside_stack_, outside_bytes_);
    switch_registers(registers_, outside_);
  }

 private:
  static constexpr size_t BYTES = 256 * 1024;  // AddressSanitizer's frames are large; untouched pages cost nothing

  size_t page_;
  unsigned char* memory_;
  unsigned char* top_;
  Registers registers_{}, outside_{};
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
  bool abandoned_ = false;
};

}  // namespace nk::simt
