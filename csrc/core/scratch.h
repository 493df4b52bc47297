// Scratch memory of one call: what it needs is reserved piece by piece, then had as one.
//
// A context keeps up to HB_SCRATCH_KEPT blocks for the calls that follow. How soon malloc gives
// freed memory back, and so whether the next call has to have its pages mapped anew (a product of
// 512 rows: 1400 of them), hangs on what the rest of the process asked for and freed before.
#ifndef HB_CORE_SCRATCH_H
#define HB_CORE_SCRATCH_H

#include "core/integers.h"
#include "core/status.h"

enum {
    HB_SCRATCH_KEPT = 4,              // blocks; one call has at most that many open at a time
    HB_SCRATCH_KEPT_BYTES = 16 << 20, // of one block; larger ones are freed
};

typedef struct hb_scratch_store hb_scratch_store;
typedef struct hb_scratch_block hb_scratch_block;

// NULL: no memory. Threads may share a store; it is destroyed when all scratch is closed.
hb_scratch_store *hb_scratch_store_create(void);
void hb_scratch_store_destroy(hb_scratch_store *store);

typedef struct {
    int64_t bytes; // reserved so far
    hb_scratch_store *store;
    hb_scratch_block *block; // NULL while not open, and where the caller's stack was enough
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
hb_status hb_scratch_open(hb_scratch *scratch, hb_scratch_store *store, unsigned char *stack,
                          int64_t stack_bytes, const char *function, unsigned char **memory,
                          hb_error *error);
void hb_scratch_close(hb_scratch *scratch);

#endif
