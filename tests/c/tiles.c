// The state of the emulated tile registers; see simde/simde_tiles.h.
#if defined(HB_EMULATE_TILES)
#include "simde_tiles.h"

#include "check.h"

#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static atomic_int configured;
static atomic_llong dots;

tiles_state *tiles_of_thread(void)
{
    static _Thread_local tiles_state state;
    return &state;
}

void tiles_fault(const char *instruction, const char *what)
{
    fflush(stdout);
    printf("FAULT of %s: %s\n", instruction, what);
    check_print_place();
    fflush(stdout);
    _exit(3);
}

void tiles_count_configured(int change)
{
    atomic_fetch_add(&configured, change);
}

int tiles_configured(void)
{
    return atomic_load(&configured);
}

void tiles_count_dot(void)
{
    atomic_fetch_add(&dots, 1);
}

int64_t tiles_dots(void)
{
    return atomic_load(&dots);
}
#else
typedef int tiles_are_not_emulated; // a translation unit must not be empty
#endif
