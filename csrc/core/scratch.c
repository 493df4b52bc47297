#include "core/scratch.h"

#include <inttypes.h>
#include <stdlib.h>

hb_status hb_scratch_open(hb_scratch *scratch, unsigned char *stack, int64_t stack_bytes,
                          const char *function, unsigned char **memory, hb_error *error)
{
    *memory = stack;
    if (scratch->bytes <= stack_bytes) return HB_OK;
    unsigned char *allocated = scratch->allocated = malloc((size_t)scratch->bytes + 64);
    HB_CHECK(error, allocated != NULL, HB_ERR_MEMORY,
             "%s: no memory for %" PRId64 " bytes of scratch", function, scratch->bytes);
    *memory = allocated + (64 - (uintptr_t)allocated % 64) % 64;
    return HB_OK;
}

void hb_scratch_close(hb_scratch *scratch)
{
    free(scratch->allocated);
    scratch->allocated = NULL;
}
