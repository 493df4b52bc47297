// Scratch memory of one call: what it needs is reserved piece by piece, then had as one.
#ifndef HB_CORE_SCRATCH_H
#define HB_CORE_SCRATCH_H

#include "core/integers.h"
#include "core/status.h"

typedef struct {
    int64_t bytes;   // reserved so far
    void *allocated; // NULL while not open, and where the caller's stack was enough
} hb_scratch;

// Reserves `bytes` (0: nothing) behind what was reserved before: the offset, a multiple of 64.
static inline int64_t hb_scratch_reserve(hb_scratch *scratch, int64_t bytes)
{
    int64_t at = scratch->bytes;
    scratch->bytes += hb_round_up(bytes, 64);
    return at;
}

// *memory is 64-byte aligned and not zeroed: `stack` (64-byte aligned; NULL with 0 bytes) where
// stack_bytes are enough. Closed by hb_scratch_close, on failure too.
hb_status hb_scratch_open(hb_scratch *scratch, unsigned char *stack, int64_t stack_bytes,
                          const char *function, unsigned char **memory, hb_error *error);
void hb_scratch_close(hb_scratch *scratch);

#endif
