// How many threads a loop should use on a machine that others use too.
//
// When there are more runnable threads than processors, the system takes one of ours off its
// processor in the middle of a piece of work, for a time slice of some milliseconds, and everybody
// waits for it. A short loop then takes ten times as long, and on the average several threads are
// no faster than those that have a processor for themselves. So a loop tells how long it waited
// for absent threads and how much its helpers did; where the waits cost more than a sixteenth of
// what the help gained, fewer threads are used for a while, and then more are tried again.
#ifndef HB_CORE_CROWD_H
#define HB_CORE_CROWD_H

#include <stdint.h>

enum {
    HB_CROWD_DEBT_NS = 8000000,       // waits beyond the allowance until threads are left out
    HB_CROWD_TRIAL_NS = 100000000,    // so long after more are tried ...
    HB_CROWD_TRIAL_DEBT_NS = 2000000, // ... less is suffered
    HB_CROWD_REST_NS = 200000000,     // until the first trial
    HB_CROWD_DOUBLINGS = 3,           // of that time, each when threads are left out again ...
    HB_CROWD_SOON_NS = 1000000000,    // ... so soon after a trial
    HB_CROWD_SUFFER_NS = 2000000000, // that waits are suffered where nothing is gained without them
    HB_CROWD_SUFFER_TIMES = 4,       // as long as the gain, at most; otherwise not again ...
    HB_CROWD_REFUSE_NS = 2000000000, // ... for so long
    HB_CROWD_SHARE = 16,             // of the gain, which waits may cost
};

// All zero at first. Times are nanoseconds of one clock that never goes back.
typedef struct {
    int spared;        // threads left out now
    int doublings;     // of the next rest
    int64_t debt;      // waits beyond the allowance
    int64_t left_ns;   // when threads were last left out
    int64_t refuse_ns; // waits are not suffered before
    int64_t tried_ns;  // when threads were last added
    int64_t
        until_ns; // spared > 0: when the next are added; spared == 0: waits are suffered until then
} hb_crowd;

// Threads for a loop that begins now and may use `threads` (>= 1): 1..threads.
int hb_crowd_threads(hb_crowd *crowd, int threads, int64_t now_ns);

// After a loop with several threads, of `threads` that were wanted: all had to wait for late_ns (0:
// nobody was absent); the work that others than the caller did would have taken it gain_ns.
void hb_crowd_judge(hb_crowd *crowd, int threads, int64_t now_ns, int64_t late_ns, int64_t gain_ns);

// All threads from now on, and a milder judgement for a while; unless that has just failed.
void hb_crowd_suffer(hb_crowd *crowd, int64_t now_ns);

#endif
