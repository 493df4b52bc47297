// What the tests say to the emulator, through ctypes.
#ifndef HB_TESTS_CUDA_EMULATOR_H
#define HB_TESTS_CUDA_EMULATOR_H

#include <stdint.h>

extern "C" {
#pragma GCC visibility push(default)
// Forgets buffers and fault. order: 0 ascending, 1 descending, 2 random with `seed`. Asynchronous
// operations complete early with order 0, late with 1, either way with 2, until hb_host_async.
void hb_host_reset(int order, uint32_t seed);
// When asynchronous operations read and write their data: 0 early, when they are issued; 1 late,
// when somebody waits for them; 2 each one early or late at random.
void hb_host_async(int completion);
// The same, but keeps the buffers.
void hb_host_restart(int order, uint32_t seed);
// Memory that kernels may touch: an input, or an output that each launch writes at most once.
void hb_host_register(const void *start, int64_t bytes, int writable);
// Takes the buffer that starts here back.
void hb_host_forget(const void *start);
// What went wrong since the last reset, or "".
const char *hb_host_fault(void);
#pragma GCC visibility pop
}

#endif
