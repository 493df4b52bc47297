// Counts the instructions that a statement executes, exactly, on every instruction set that this
// processor has: the processor is told to trap after each instruction (the trap flag of x86-64),
// and the handler of the trap counts. A trap costs some microseconds, so a statement should execute
// tens of thousands of instructions, not millions. valgrind's callgrind counts the same, faster,
// but knows nothing beyond AVX2; under it the program leaves the counting to callgrind, and
// test_instructions.py compares the two.
#include "check.h"

#include <signal.h>
#include <stdio.h>

#if defined(__has_include)
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#endif
#endif
#if !defined(RUNNING_ON_VALGRIND)
#define RUNNING_ON_VALGRIND             0
#define CALLGRIND_TOGGLE_COLLECT        (void)0
#define CALLGRIND_ZERO_STATS            (void)0
#define CALLGRIND_DUMP_STATS_AT(reason) (void)(reason)
#endif

static volatile int64_t traps;

// Sets or clears the trap flag. The 128 bytes below the stack pointer may be in use.
#if defined(__x86_64__)
#define WITH_TRAP_FLAG(change)                                                                     \
    __asm__ volatile("subq $128, %%rsp\n\tpushfq\n\t" change "\n\tpopfq\n\taddq $128, %%rsp" ::    \
                         : "memory", "cc")
#define TRAP()   WITH_TRAP_FLAG("orq $0x100, (%%rsp)")
#define UNTRAP() WITH_TRAP_FLAG("andq $-0x101, (%%rsp)")

static void on_trap(int number)
{
    (void)number;
    traps++;
}

static void begin_traps(void)
{
    signal(SIGTRAP, on_trap);
}

bool check_can_count(void)
{
    return true;
}
#else
#define TRAP()   (void)0
#define UNTRAP() (void)0

static void begin_traps(void) {}

bool check_can_count(void)
{
    return false;
}
#endif

// How many traps an empty statement takes.
static int64_t traps_of_nothing(void)
{
    check_count empty = {.state = CHECK_COUNT_TRAPPED};
    while (check_count_next(&empty)) {
    }
    return traps;
}

bool check_count_next(check_count *count)
{
    const bool outside = RUNNING_ON_VALGRIND != 0;
    char reason[256];
    switch (count->state) {
    case CHECK_COUNT_FIRST: // binds what the linker left for the first call
        count->state = CHECK_COUNT_WARM;
        return check_count_wanted(count);
    case CHECK_COUNT_WARM:
        begin_traps();
        if (!outside) count->nothing = traps_of_nothing();
        if (outside) {
            CALLGRIND_ZERO_STATS;
            CALLGRIND_TOGGLE_COLLECT;
        }
        count->state = CHECK_COUNT_TRAPPED;
        return check_count_next(count);
    case CHECK_COUNT_TRAPPED:
        count->state = CHECK_COUNT_DONE;
        traps = 0;
        if (!outside) TRAP();
        return true;
    case CHECK_COUNT_DONE:
        UNTRAP();
        if (outside) {
            CALLGRIND_TOGGLE_COLLECT;
            check_count_name(count, reason, sizeof reason);
            CALLGRIND_DUMP_STATS_AT(reason);
        } else if (count->name != NULL) {
            check_count_report(count, traps - count->nothing);
        }
        return false;
    }
    return false;
}
