#include "core/scratch.h"

#include "core/sanitizer.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

// Its memory begins behind it.
struct hb_scratch_block {
    _Alignas(64) int64_t bytes;
};

struct hb_scratch_store {
    _Atomic(hb_scratch_block *) kept[HB_SCRATCH_KEPT];
};

hb_scratch_store *hb_scratch_store_create(void)
{
    return calloc(1, sizeof(hb_scratch_store));
}

void hb_scratch_store_destroy(hb_scratch_store *store)
{
    if (store == NULL) return;
    for (int i = 0; i < HB_SCRATCH_KEPT; i++) free(atomic_load(&store->kept[i]));
    free(store);
}

// Takes the block out of its place, or NULL. Whoever has taken a block owns it alone, so that its
// size may be read.
static hb_scratch_block *take(hb_scratch_store *store, int i)
{
    return atomic_exchange_explicit(&store->kept[i], NULL, memory_order_acquire);
}

// False where the place is not empty.
static bool put(hb_scratch_store *store, int i, hb_scratch_block *block)
{
    hb_scratch_block *empty = NULL;
    return atomic_compare_exchange_strong_explicit(&store->kept[i], &empty, block,
                                                   memory_order_release, memory_order_relaxed);
}

static hb_scratch_block *block_of(hb_scratch_store *store, int64_t bytes)
{
    for (int i = 0; i < HB_SCRATCH_KEPT; i++) {
        hb_scratch_block *block = take(store, i);
        if (block == NULL) continue;
        if (block->bytes >= bytes) return block;
        if (!put(store, i, block)) free(block);
    }
    hb_scratch_block *block = aligned_alloc(64, sizeof *block + (size_t)bytes);
    if (block != NULL) block->bytes = bytes;
    return block;
}

hb_status hb_scratch_open(hb_scratch *scratch, hb_scratch_store *store, unsigned char *stack,
                          int64_t stack_bytes, const char *function, unsigned char **memory,
                          hb_error *error)
{
    *memory = stack;
    if (scratch->bytes <= stack_bytes) return HB_OK;
    scratch->store = store;
    scratch->block = block_of(store, scratch->bytes);
    HB_CHECK(error, scratch->block != NULL, HB_ERR_MEMORY,
             "%s: no memory for %" PRId64 " bytes of scratch", function, scratch->bytes);
    *memory = (unsigned char *)(scratch->block + 1);
    return HB_OK;
}

void hb_scratch_close(hb_scratch *scratch)
{
    hb_scratch_block *block = scratch->block;
    scratch->block = NULL;
    if (block == NULL) return;
    // AddressSanitizer would not see a write behind the end of what a kept block was asked for.
    if (!HB_ADDRESS_SANITIZER && block->bytes <= HB_SCRATCH_KEPT_BYTES) {
        for (int i = 0; i < HB_SCRATCH_KEPT; i++)
            if (put(scratch->store, i, block)) return;
        // All places are taken, by smaller blocks most likely: this one did not find room in them.
        block = atomic_exchange_explicit(&scratch->store->kept[0], block, memory_order_acq_rel);
    }
    free(block);
}
