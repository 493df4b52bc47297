// A thread pool for short memory-bound loops.
//
// One call owns the pool at a time (`owner`); it fills a job of the team (team.h), publishes it and
// takes part. The caller returns when every unit is done, whoever did it.
//
// In a process where torch has an OpenMP runtime of as many threads, its threads run the lanes
// (openmp.h says why). That loop ends only when every thread came, so a thread that the system has
// descheduled holds it up for milliseconds. With our own workers that happens as well, though only
// when the thread is in the middle of a piece. Either way the wait is measured, and crowd.h decides
// whether the next loops do with fewer threads, which are then ours. A loop that is left to its
// caller alone and turns out to be long calls the others after all: beside it a wait is short.
//
// fork(): a child drops the team of the parent unseen and never borrows threads.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // pthread_getcpuclockid
#endif
#include "core/parallel.h"

#include "core/crowd.h"
#include "core/integers.h"
#include "core/openmp.h"
#include "core/team.h"
#include "core/thread_count.h"

#include <stdlib.h>

enum {
    INVITE_NS = 3000000, // what is left of a loop of the caller alone when it calls for help
    FIRST_SHARE = 8,     // of such a loop, to see how long it takes
    // When fewer threads are used: torch's have stopped to spin after the first, and are then
    // looked at for the second.
    SETTLE_NS = 20000000,
    WATCH_NS = 10000000,
};

struct hb_pool {
    atomic_int threads;
    atomic_uint_least64_t owner; // (generation << 1) | 1 while a call owns the pool, else 0
    _Atomic(hb_team *) team;     // touched by the owner only
    atomic_uint_least64_t borrowed, late, crowded; // loops, see hb_pool_counts
    // Touched by the owner only:
    hb_crowd crowd;
    hb_openmp openmp;
    bool has_openmp, has_helper;
    clockid_t helper;                // processor time of one of torch's threads
    int64_t watched_ns, watched_cpu; // when that was last read, and what it was
    unsigned long long libraries;    // of the process, when torch was looked for
};

// ---- the pool -----------------------------------------------------------------------------------

hb_pool *hb_pool_create(int threads)
{
    hb_team_count_forks();
    hb_pool *pool = calloc(1, sizeof *pool);
    if (pool != NULL) hb_pool_set_threads(pool, threads);
    return pool;
}

void hb_pool_destroy(hb_pool *pool)
{
    if (pool == NULL) return;
    hb_team_destroy(pool->team);
    free(pool);
}

int hb_pool_threads(const hb_pool *pool)
{
    return atomic_load_explicit(&pool->threads, memory_order_relaxed);
}

hb_pool_counts hb_pool_count(const hb_pool *pool)
{
    return (hb_pool_counts){
        .borrowed = atomic_load_explicit(&pool->borrowed, memory_order_relaxed),
        .late = atomic_load_explicit(&pool->late, memory_order_relaxed),
        .crowded = atomic_load_explicit(&pool->crowded, memory_order_relaxed),
    };
}

void hb_pool_set_threads(hb_pool *pool, int threads)
{
    if (threads <= 0) threads = hb_thread_count_auto();
    if (threads > HB_MAX_THREADS) threads = HB_MAX_THREADS;
    atomic_store_explicit(&pool->threads, threads, memory_order_relaxed);
}

// A team of this process with room for `threads`, perhaps without any workers yet, or NULL when
// memory is short. Owner only.
static hb_team *own_team(hb_pool *pool, int threads, uint32_t generation)
{
    hb_team *team = pool->team;
    if (team == NULL || team->generation != generation || team->capacity < threads) {
        pool->team = NULL; // first: a child made now must not see a team that is half gone
        hb_team_destroy(team);
        pool->team = team = hb_team_create(threads, generation);
    }
    return team;
}

// What the caller of a loop of several threads did before it had nothing left to do but to wait.
typedef struct {
    hb_presence began;
    int64_t left_ns, absent_ns;
    uint64_t units;
} caller_part;

static void run_caller(hb_team *team, hb_job_slot *slot, caller_part *part)
{
    part->units = hb_team_run_lane(team, slot, 0, part->began);
    part->left_ns = hb_now_ns(); // first: the system may take the processor away in the next call
    part->absent_ns = hb_presence_absence(part->began, part->left_ns);
}

// Tells pool->crowd of a loop: how long it took because some thread had no processor, and what the
// helpers' work would have taken the caller. A caller that came to nothing shows no pace.
static void judge(hb_pool *pool, const hb_job_slot *slot, const caller_part *part,
                  int64_t waited_ns)
{
    const int64_t late = part->absent_ns + (waited_ns < HB_LATE_NS ? 0 : waited_ns);
    if (late > 0) atomic_fetch_add_explicit(&pool->late, 1, memory_order_relaxed);
    const double worked = (double)(part->left_ns - part->began.wall - part->absent_ns);
    const double others = (double)(slot->n_units - part->units);
    const int64_t gain = part->units == 0 ? 0 : (int64_t)(worked * others / (double)part->units);
    hb_crowd_judge(&pool->crowd, hb_pool_threads(pool), hb_now_ns(), late, gain);
}

static void run_job(hb_pool *pool, hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn,
                    void *arg)
{
    uint64_t name;
    hb_job_slot *slot = hb_team_slot(team, lanes, n_chunks, fn, arg, &name);
    caller_part part = {.began = hb_presence_begin()};
    hb_team_publish(team, slot, name);
    run_caller(team, slot, &part);
    hb_team_wait(team, slot);
    const int64_t waited = hb_now_ns() - part.left_ns;
    hb_team_withdraw(team);
    judge(pool, slot, &part, hb_least(waited, atomic_load(&slot->absent_ns)));
}

// For the caller alone, where others would only make it wait, unless it is long.
static void run_reserved(hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn, void *arg)
{
    uint64_t name;
    hb_job_slot *slot = hb_team_slot(team, lanes, n_chunks, fn, arg, &name);
    const uint64_t n = slot->n_units, first = (n + FIRST_SHARE - 1) / FIRST_SHARE;
    const hb_presence began = hb_presence_begin();
    hb_team_run_units(slot, 0, first, 0);
    const int64_t cpu =
        hb_clock_ns(CLOCK_THREAD_CPUTIME_ID) - began.cpu; // how busy others are is no matter
    if ((double)cpu * (double)(n - first) < (double)INVITE_NS * (double)first) {
        if (first < n) hb_team_run_units(slot, first, n, 0);
        return;
    }
    hb_team_split(slot, first);
    hb_team_finish(team, slot, first);
    hb_team_publish(team, slot, name);
    (void)hb_team_run_lane(team, slot, 0, began);
    hb_team_wait(team, slot);
    hb_team_withdraw(team);
}

// ---- borrowed threads ---------------------------------------------------------------------------

typedef struct {
    const hb_openmp *openmp;
    hb_team *team;
    hb_job_slot *slot;
    caller_part part;
    bool has_helper;
    clockid_t helper; // of lane 1
} borrowed_job;

static void borrowed_member(void *arg)
{
    borrowed_job *job = arg;
    hb_job_slot *slot = job->slot;
    int lane = job->openmp->thread_num();
#if defined(__linux__) // nor is anything borrowed elsewhere
    if (lane == 1) job->has_helper = pthread_getcpuclockid(pthread_self(), &job->helper) == 0;
#endif
    if (lane == 0)
        run_caller(job->team, slot, &job->part);
    else if (lane < slot->lanes)
        (void)hb_team_run_lane(job->team, slot, lane, hb_presence_begin());
}

// Whether this call may use torch's threads: they exist and are as many as ours.
static bool may_borrow(hb_pool *pool, uint32_t generation)
{
    if (!pool->has_openmp) {
        if (generation != 0) return false;
        unsigned long long libraries = hb_openmp_libraries();
        if (libraries == pool->libraries) return false;
        pool->libraries = libraries;
        if (!hb_openmp_find(&pool->openmp)) return false;
        pool->has_openmp = true;
    }
    return generation == 0 && pool->openmp.max_threads() == hb_pool_threads(pool) &&
           !pool->openmp.in_parallel();
}

static void run_borrowed(hb_pool *pool, hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn,
                         void *arg)
{
    uint64_t name;
    borrowed_job job = {.openmp = &pool->openmp, .team = team};
    job.slot = hb_team_slot(team, lanes, n_chunks, fn, arg, &name); // never published in `current`
    job.part.began = hb_presence_begin();
    // With all threads, though there may be fewer lanes: another number would end threads of the
    // runtime and start them again.
    pool->openmp.parallel(borrowed_member, &job, (unsigned)hb_pool_threads(pool), 0);
    atomic_fetch_add_explicit(&pool->borrowed, 1, memory_order_relaxed);
    pool->has_helper = job.has_helper;
    pool->helper = job.helper;
    pool->watched_ns = 0;
    // The caller waited for the last unit, perhaps because its thread was absent, and then for
    // threads that had nothing to do but to come.
    const int64_t left = job.part.left_ns, done = hb_most(atomic_load(&job.slot->done_ns), left);
    const int64_t absent = hb_least(done - left, atomic_load(&job.slot->absent_ns));
    judge(pool, job.slot, &job.part, hb_now_ns() - done + absent);
}

// Whether torch's threads are busy with loops of its own although none of ours has used them for a
// while. To leave them alone gains nothing then: who waits for an absent one is the next loop of
// torch, and meanwhile ours go without help.
static bool torch_is_busy(hb_pool *pool, int64_t now)
{
    if (!pool->has_helper || now - pool->crowd.left_ns < SETTLE_NS) return false;
    if (pool->watched_ns != 0 && now - pool->watched_ns < WATCH_NS) return false;
    struct timespec t;
    if (clock_gettime(pool->helper, &t) != 0) { // it has ended
        pool->has_helper = false;
        return false;
    }
    const int64_t cpu = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    const int64_t passed = now - pool->watched_ns;
    const bool busy = passed < 4 * WATCH_NS && cpu - pool->watched_cpu > passed / 16;
    pool->watched_ns = now;
    pool->watched_cpu = cpu;
    return busy;
}

// ---- one call -----------------------------------------------------------------------------------

// With the threads that are best now. False when there are none besides the caller. Owner only.
static bool run_shared(hb_pool *pool, hb_team *team, int lanes, uint32_t generation,
                       int64_t n_chunks, hb_chunk_fn fn, void *arg)
{
    const int threads = hb_pool_threads(pool);
    const bool borrow = may_borrow(pool, generation);
    int allowed = threads;
    if (pool->crowd.spared > 0 && !(borrow && pool->openmp.always)) {
        const int64_t now = hb_now_ns();
        if (borrow && torch_is_busy(pool, now)) hb_crowd_suffer(&pool->crowd, now);
        allowed = hb_crowd_threads(&pool->crowd, threads, now);
    }
    if (borrow && allowed == threads) {
        run_borrowed(pool, team, lanes, n_chunks, fn, arg);
        return true;
    }
    hb_team_start(team, lanes);
    if (lanes > team->started) lanes = team->started;
    if (lanes <= 1) return false;
    if (allowed < lanes) atomic_fetch_add_explicit(&pool->crowded, 1, memory_order_relaxed);
    if (allowed == 1)
        run_reserved(team, lanes, n_chunks, fn, arg);
    else
        run_job(pool, team, lanes < allowed ? lanes : allowed, n_chunks, fn, arg);
    return true;
}

void hb_parallel_for(hb_pool *pool, int64_t n_chunks, hb_chunk_fn fn, void *arg)
{
    hb_parallel_for_lanes(pool, HB_MAX_THREADS, n_chunks, fn, arg);
}

void hb_parallel_for_lanes(hb_pool *pool, int most_lanes, int64_t n_chunks, hb_chunk_fn fn,
                           void *arg)
{
    if (n_chunks <= 0) return;
    int lanes = pool != NULL ? hb_pool_threads(pool) : 1;
    if (lanes > most_lanes) lanes = most_lanes;
    if (lanes > n_chunks) lanes = (int)n_chunks;
    if (lanes > 1) {
        const uint32_t generation = hb_team_generation();
        const uint64_t mine = ((uint64_t)generation << 1) | 1;
        uint64_t owner = atomic_load(&pool->owner);
        // An owner of another generation is a thread of the parent: it does not exist here.
        if (owner != mine && atomic_compare_exchange_strong(&pool->owner, &owner, mine)) {
            hb_team *team = own_team(pool, lanes, generation);
            if (team != NULL && run_shared(pool, team, lanes, generation, n_chunks, fn, arg)) {
                atomic_store(&pool->owner, 0);
                return;
            }
            atomic_store(&pool->owner, 0);
        }
    }
    fn(arg, 0, n_chunks, 0);
}
