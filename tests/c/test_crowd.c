// When a loop does with fewer threads: invented times, no threads.
#include "check.h"
#include "core/crowd.h"

enum { MS = 1000000, CALL_NS = 300000 };

typedef struct {
    hb_crowd crowd;
    int64_t now;
    int threads, slice_ms; // how often a crowded loop waits, and for how long
    int64_t next_wait;
    int late, crowded, calls;
} machine;

// Loops for `ms`. On a crowded machine a loop of all threads waits once in two slices.
static void run(machine *m, bool crowded, int ms)
{
    const int64_t end = m->now + (int64_t)ms * MS;
    while (m->now < end) {
        m->calls++;
        const int threads = hb_crowd_threads(&m->crowd, m->threads, m->now);
        if (threads < m->threads) m->crowded++;
        int64_t late = 0;
        if (crowded && threads == m->threads && m->now >= m->next_wait) {
            late = (int64_t)m->slice_ms * MS;
            m->next_wait = m->now + 2 * late;
            m->late++;
        }
        m->now += CALL_NS + late;
        if (threads > 1)
            hb_crowd_judge(&m->crowd, m->threads, m->now, late, (int64_t)(threads - 1) * CALL_NS);
        else
            m->now += (int64_t)(m->threads - 1) * CALL_NS;
    }
}

CHECK_GROUP_ONCE(crowd)
{
    machine quiet = {.now = 1, .threads = 2, .slice_ms = 4};
    run(&quiet, false, 10000);
    CHECK(c, quiet.crowded == 0, "a quiet machine: all threads in all loops");

    machine busy = {.now = 1, .threads = 2, .slice_ms = 4};
    run(&busy, true, 100);
    CHECK(c, busy.late <= 4, "noticed after %d waits", busy.late);
    busy.late = busy.calls = 0;
    run(&busy, true, 60000);
    CHECK(c, 200 * busy.late <= busy.calls, "%d waits of %d", busy.late, busy.calls);
    busy.crowded = 0;
    run(&busy, false, 2000);
    const int left = busy.crowded;
    run(&busy, false, 10000);
    CHECK(c, left > 0 && busy.crowded == left, "all threads again within two seconds");

    // One late loop in two hundred is no reason: the helper gained more.
    machine odd = {.now = 1, .threads = 2, .slice_ms = 3};
    for (int i = 0; i < 100; i++) {
        odd.next_wait = 0;
        run(&odd, true, 1);
        odd.next_wait = INT64_MAX;
        run(&odd, true, 66);
    }
    CHECK(c, odd.late == 100 && odd.crowded == 0, "%d late, %d crowded", odd.late, odd.crowded);

    // Of many threads one is left out, not all: the others are worth more than the wait.
    machine wide = {.now = 1, .threads = 8, .slice_ms = 4};
    hb_crowd_judge(&wide.crowd, 8, 50, 9 * MS, 0);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, 51) == 7, "one of eight");
    CHECK(c, hb_crowd_threads(&wide.crowd, 4, 51) == 3, "of fewer that are wanted now as well");
    hb_crowd_judge(&wide.crowd, 8, 60, 9 * MS, 7 * 9 * 16 * MS);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, 61) == 7, "a wait that was worth it");
    for (int i = 0; i < 20; i++) hb_crowd_judge(&wide.crowd, 8, 70 + i, 9 * MS, 0);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, 100) == 1, "never fewer than the caller");
    CHECK(c, hb_crowd_threads(&wide.crowd, 1, 100) == 1, "one thread is one");
    hb_crowd_suffer(&wide.crowd, 100);
    hb_crowd_judge(&wide.crowd, 8, 200, 900 * MS, 300 * MS);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, 201) == 8, "suffered");
    hb_crowd_judge(&wide.crowd, 8, 100 + (int64_t)HB_CROWD_SUFFER_NS, 900 * MS, 0);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, 300 + (int64_t)HB_CROWD_SUFFER_NS) == 7, "no longer");
    const int64_t later = 400 + (int64_t)HB_CROWD_SUFFER_NS;
    hb_crowd_suffer(&wide.crowd, later);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, later) == 8, "again");
    hb_crowd_judge(&wide.crowd, 8, later, 900 * MS, 100 * MS);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, later + 1) == 7, "a wait beyond suffering");
    hb_crowd_suffer(&wide.crowd, later + 2);
    CHECK(c, hb_crowd_threads(&wide.crowd, 8, later + 3) == 7, "which is remembered");
}
