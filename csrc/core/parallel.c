// A thread pool for short memory-bound loops.
//
// One call owns the pool at a time (`owner`); it takes a free job slot, gives every lane a
// contiguous range of units and publishes the slot in `current`. Lane l belongs to worker l (lane 0
// to the caller), which takes halves from the front of its own range, so that memory streams stay
// long, and then halves from the tail of other lanes' ranges. The caller returns when every unit is
// done; a worker that the system has descheduled before it began costs nothing, its range is
// stolen.
//
// A late worker may still look at a job that is over. Hence slots are reused only when nobody holds
// them: a worker raises `holders`, then looks whether `current` still names the slot; the caller
// takes `current` away, then looks at `holders` (sequentially consistent on both sides).
//
// In a process where torch has an OpenMP runtime of as many threads, its threads run the lanes
// (openmp.h says why). That loop ends only when every thread came, so a thread that the system has
// descheduled holds it up for milliseconds; when that happens often, our own workers take over for
// a while, longer each time it happens again soon.
//
// fork(): a child has the memory but not the threads. A counter that the atfork handler raises
// tells a team and an owner of the parent from those of this process; the child drops them unseen
// and never borrows threads.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // pthread_setname_np
#endif
#include "core/parallel.h"

#include "core/openmp.h"
#include "core/thread_count.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SLOTS = 8,
    CACHE_LINE = 64,
    SPIN_NS = 50000,
    // Borrowed threads: a wait this long after all work was done is one for a descheduled thread.
    LATE_NS = 300000,
    // Such waits are a debt, of which an eighth of all time that passes is forgiven; beyond this
    // ...
    DEBT_NS = 16000000,
    SHUN_NS = 100000000, // ... our own threads for that long,
    SHUN_DOUBLINGS = 6,  // longer if it happens again within PATIENCE prompt calls
    PATIENCE = 1000,
};

// Units [begin, end) still to be taken: begin in the low, end in the high 32 bits.
typedef struct {
    _Alignas(CACHE_LINE) atomic_uint_least64_t range;
} lane_range;

typedef struct {
    _Alignas(CACHE_LINE) atomic_int holders; // threads that may look at the rest
    _Alignas(CACHE_LINE) atomic_uint_least64_t units_done;
    atomic_bool caller_sleeps;
    hb_chunk_fn fn;
    void *arg;
    int64_t n_chunks, chunks_per_unit;
    uint64_t n_units;
    int lanes;
    lane_range *ranges; // [capacity]
} job_slot;

typedef struct hb_team hb_team;

typedef struct {
    _Alignas(CACHE_LINE) atomic_bool sleeps;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t thread;
    hb_team *team;
    int lane;
} worker;

// What belongs to one process. capacity counts the caller.
struct hb_team {
    _Alignas(CACHE_LINE)
        atomic_uint_least64_t current; // serial of the job in slots[serial % SLOTS]; 0: none
    atomic_bool stop;
    uint64_t serial;
    uint32_t generation;
    int capacity, started;
    pthread_mutex_t done_mutex;
    pthread_cond_t done;
    job_slot slots[SLOTS];
    worker *workers;    // [capacity], entry 0 unused
    lane_range *ranges; // [SLOTS * capacity]
};

struct hb_pool {
    atomic_int threads;
    atomic_uint_least64_t owner;    // (generation << 1) | 1 while a call owns the pool, else 0
    _Atomic(hb_team *) team;        // touched by the owner only
    atomic_uint_least64_t borrowed; // loops on torch's threads
    // Touched by the owner only:
    hb_openmp openmp;
    bool has_openmp;
    unsigned long long libraries;        // of the process, when it was looked for
    int64_t shunned_until, debt, judged; // ns
    int64_t prompt_calls;                // since the last late one
    int shun_doublings;
};

// ---- processes ----------------------------------------------------------------------------------

// Counts the forks between the first process and this one. The one global: it describes the
// process.
static atomic_uint fork_generation;
static pthread_once_t atfork_once = PTHREAD_ONCE_INIT;

static void count_fork(void)
{
    atomic_fetch_add(&fork_generation, 1);
}

static void register_atfork(void)
{
    (void)pthread_atfork(NULL, NULL, count_fork);
}

// ---- waiting ------------------------------------------------------------------------------------

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Spins for at most SPIN_NS while *value == old.
static void spin_while_equal(atomic_uint_least64_t *value, uint64_t old)
{
    const int64_t start = now_ns();
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(value, memory_order_acquire) != old) return;
            relax();
        }
    } while (now_ns() - start < SPIN_NS);
}

// ---- taking units -------------------------------------------------------------------------------

// Takes half of what is left (at least one unit) from the front or the tail. False when empty.
static bool take(lane_range *lane, bool from_tail, uint64_t *begin, uint64_t *end)
{
    uint64_t range = atomic_load_explicit(&lane->range, memory_order_relaxed);
    for (;;) {
        uint64_t first = range & 0xffffffffu, last = range >> 32;
        if (first >= last) return false;
        uint64_t n = (last - first + 1) / 2;
        *begin = from_tail ? last - n : first;
        *end = *begin + n;
        uint64_t left = from_tail ? (*begin << 32) | first : (last << 32) | *end;
        if (atomic_compare_exchange_weak_explicit(&lane->range, &range, left, memory_order_relaxed,
                                                  memory_order_relaxed))
            return true;
    }
}

// Works on the job as lane `lane` until nothing is left to take.
static void run_lane(hb_team *team, job_slot *slot, int lane)
{
    for (int i = 0; i < slot->lanes; i++) {
        int victim = (lane + i) % slot->lanes;
        uint64_t begin, end;
        while (take(&slot->ranges[victim], victim != lane, &begin, &end)) {
            int64_t first = (int64_t)begin * slot->chunks_per_unit;
            int64_t last = (int64_t)end * slot->chunks_per_unit;
            slot->fn(slot->arg, first, last < slot->n_chunks ? last : slot->n_chunks, lane);
            uint64_t done = atomic_fetch_add(&slot->units_done, end - begin) + (end - begin);
            if (done == slot->n_units && atomic_load(&slot->caller_sleeps)) {
                pthread_mutex_lock(&team->done_mutex);
                pthread_cond_broadcast(&team->done);
                pthread_mutex_unlock(&team->done_mutex);
            }
        }
    }
}

// ---- workers ------------------------------------------------------------------------------------

static void sleep_until_new(worker *self, uint64_t seen)
{
    hb_team *team = self->team;
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->sleeps, true);
    while (atomic_load(&team->current) == seen && !atomic_load(&team->stop))
        pthread_cond_wait(&self->wake, &self->mutex);
    atomic_store(&self->sleeps, false);
    pthread_mutex_unlock(&self->mutex);
}

static void wake(worker *sleeper)
{
    if (!atomic_load(&sleeper->sleeps)) return;
    pthread_mutex_lock(&sleeper->mutex);
    pthread_cond_signal(&sleeper->wake);
    pthread_mutex_unlock(&sleeper->mutex);
}

static void *worker_main(void *arg)
{
    worker *self = arg;
    hb_team *team = self->team;
    hb_thread_unbind();
#if defined(__linux__)
    (void)pthread_setname_np(pthread_self(), "halfbyte");
#endif
    uint64_t seen = 0;
    while (!atomic_load(&team->stop)) {
        uint64_t current = atomic_load(&team->current);
        if (current == seen) {
            spin_while_equal(&team->current, seen);
            if (atomic_load(&team->current) == seen) sleep_until_new(self, seen);
            continue;
        }
        seen = current;
        if (current == 0) continue;
        job_slot *slot = &team->slots[current % SLOTS];
        atomic_fetch_add(&slot->holders, 1);
        if (atomic_load(&team->current) == current && self->lane < slot->lanes)
            run_lane(team, slot, self->lane);
        atomic_fetch_sub(&slot->holders, 1);
    }
    return NULL;
}

// ---- teams --------------------------------------------------------------------------------------

static void *allocate_lines(size_t count, size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, CACHE_LINE, count * size) != 0) return NULL;
    return memset(memory, 0, count * size);
}

static void team_release(hb_team *team)
{
    if (team == NULL) return;
    free(team->workers);
    free(team->ranges);
    free(team);
}

static hb_team *team_create(int capacity, uint32_t generation)
{
    hb_team *team = allocate_lines(1, sizeof *team);
    if (team == NULL) return NULL;
    team->workers = allocate_lines((size_t)capacity, sizeof *team->workers);
    team->ranges = allocate_lines((size_t)capacity * SLOTS, sizeof *team->ranges);
    if (team->workers == NULL || team->ranges == NULL) {
        team_release(team);
        return NULL;
    }
    team->generation = generation;
    team->capacity = capacity;
    team->started = 1;
    pthread_mutex_init(&team->done_mutex, NULL);
    pthread_cond_init(&team->done, NULL);
    for (int i = 0; i < SLOTS; i++) team->slots[i].ranges = team->ranges + i * capacity;
    return team;
}

// Ends a team of this process; of a team of the parent only the memory is given back.
static void team_destroy(hb_team *team)
{
    if (team == NULL) return;
    if (team->generation == atomic_load(&fork_generation)) {
        atomic_store(&team->stop, true);
        for (int i = 1; i < team->started; i++) wake(&team->workers[i]);
        for (int i = 1; i < team->started; i++) {
            pthread_join(team->workers[i].thread, NULL);
            pthread_mutex_destroy(&team->workers[i].mutex);
            pthread_cond_destroy(&team->workers[i].wake);
        }
        pthread_mutex_destroy(&team->done_mutex);
        pthread_cond_destroy(&team->done);
    }
    team_release(team);
}

// Starts workers up to `threads`; goes on with fewer when the system gives no more.
static void team_start(hb_team *team, int threads)
{
    if (team->started >= threads) return;
    sigset_t all, before;
    sigfillset(&all); // signals belong to the threads of the application
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team->started < threads) {
        worker *next = &team->workers[team->started];
        next->team = team;
        next->lane = team->started;
        pthread_mutex_init(&next->mutex, NULL);
        pthread_cond_init(&next->wake, NULL);
        if (pthread_create(&next->thread, NULL, worker_main, next) != 0) {
            pthread_mutex_destroy(&next->mutex);
            pthread_cond_destroy(&next->wake);
            break;
        }
        team->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

// ---- the pool -----------------------------------------------------------------------------------

hb_pool *hb_pool_create(int threads)
{
    pthread_once(&atfork_once, register_atfork);
    hb_pool *pool = calloc(1, sizeof *pool);
    if (pool != NULL) hb_pool_set_threads(pool, threads);
    return pool;
}

void hb_pool_destroy(hb_pool *pool)
{
    if (pool == NULL) return;
    team_destroy(pool->team);
    free(pool);
}

int hb_pool_threads(const hb_pool *pool)
{
    return atomic_load_explicit(&pool->threads, memory_order_relaxed);
}

uint64_t hb_pool_borrowed(const hb_pool *pool)
{
    return atomic_load_explicit(&pool->borrowed, memory_order_relaxed);
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
        team_destroy(team);
        pool->team = team = team_create(threads, generation);
    }
    return team;
}

// A slot that nobody looks at. Each holder leaves after at most one piece of work.
static job_slot *free_slot(hb_team *team, uint64_t *name)
{
    for (;;) {
        team->serial++;
        job_slot *slot = &team->slots[team->serial % SLOTS];
        if (atomic_load(&slot->holders) == 0) {
            *name = team->serial;
            return slot;
        }
        relax();
    }
}

// Spins for at most SPIN_NS while units are missing. True when none are.
static bool spin_until_done(job_slot *slot)
{
    const int64_t start = now_ns();
    do {
        if (atomic_load(&slot->units_done) == slot->n_units) return true;
        relax();
    } while (now_ns() - start < SPIN_NS);
    return false;
}

static void wait_until_done(hb_team *team, job_slot *slot)
{
    if (spin_until_done(slot)) return;
    pthread_mutex_lock(&team->done_mutex);
    atomic_store(&slot->caller_sleeps, true);
    while (atomic_load(&slot->units_done) != slot->n_units)
        pthread_cond_wait(&team->done, &team->done_mutex);
    pthread_mutex_unlock(&team->done_mutex);
}

static job_slot *fill_slot(hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn, void *arg,
                           uint64_t *name)
{
    job_slot *slot = free_slot(team, name);
    slot->fn = fn;
    slot->arg = arg;
    slot->n_chunks = n_chunks;
    slot->chunks_per_unit = n_chunks / INT32_MAX + 1; // units must fit in 32 bits
    slot->n_units = (uint64_t)((n_chunks - 1) / slot->chunks_per_unit + 1);
    slot->lanes = lanes;
    atomic_store(&slot->caller_sleeps, false);
    atomic_store(&slot->units_done, 0);
    for (uint64_t lane = 0, begin = 0; lane < (uint64_t)lanes; lane++) {
        uint64_t end = slot->n_units * (lane + 1) / (uint64_t)lanes;
        atomic_store_explicit(&slot->ranges[lane].range, (end << 32) | begin, memory_order_relaxed);
        begin = end;
    }
    return slot;
}

static void run_job(hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn, void *arg)
{
    uint64_t name;
    job_slot *slot = fill_slot(team, lanes, n_chunks, fn, arg, &name);
    atomic_store(&team->current, name);
    for (int i = 1; i < lanes; i++) wake(&team->workers[i]);
    run_lane(team, slot, 0);
    wait_until_done(team, slot);
    atomic_store(&team->current, 0);
}

// ---- borrowed threads ---------------------------------------------------------------------------

typedef struct {
    const hb_openmp *openmp;
    hb_team *team;
    job_slot *slot;
    int64_t done_ns; // when lane 0 saw that all units were done; 0: not seen
} borrowed_job;

static void borrowed_member(void *arg)
{
    borrowed_job *job = arg;
    job_slot *slot = job->slot;
    int lane = job->openmp->thread_num();
    if (lane < slot->lanes) run_lane(job->team, slot, lane);
    if (lane != 0) return;
    if (spin_until_done(slot)) job->done_ns = now_ns();
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
           !pool->openmp.in_parallel() &&
           (pool->shunned_until == 0 || now_ns() >= pool->shunned_until);
}

// Remembers whether the call ended promptly. A late one now and then costs less than sharing the
// processors with torch's threads; on a crowded machine nearly every call is late.
static void judge(hb_pool *pool, int64_t done_ns)
{
    const int64_t now = now_ns(), late = done_ns == 0 ? 0 : now - done_ns;
    pool->debt -= (now - pool->judged) / 8;
    if (pool->debt < 0) pool->debt = 0;
    pool->judged = now;
    if (late < LATE_NS) {
        if (pool->prompt_calls < PATIENCE && ++pool->prompt_calls == PATIENCE)
            pool->shun_doublings = 0;
        return;
    }
    pool->prompt_calls = 0;
    pool->debt += late;
    if (pool->debt < DEBT_NS) return;
    pool->shunned_until = now + ((int64_t)SHUN_NS << pool->shun_doublings);
    if (pool->shun_doublings < SHUN_DOUBLINGS) pool->shun_doublings++;
}

static void run_borrowed(hb_pool *pool, hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn,
                         void *arg)
{
    uint64_t name;
    borrowed_job job = {&pool->openmp, team, NULL, 0};
    job.slot = fill_slot(team, lanes, n_chunks, fn, arg, &name); // never published in `current`
    // With all threads, though there may be fewer lanes: another number would end threads of the
    // runtime and start them again.
    pool->openmp.parallel(borrowed_member, &job, (unsigned)hb_pool_threads(pool), 0);
    atomic_fetch_add_explicit(&pool->borrowed, 1, memory_order_relaxed);
    judge(pool, job.done_ns);
}

// ---- one call -----------------------------------------------------------------------------------

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
        const uint32_t generation = atomic_load(&fork_generation);
        const uint64_t mine = ((uint64_t)generation << 1) | 1;
        uint64_t owner = atomic_load(&pool->owner);
        // An owner of another generation is a thread of the parent: it does not exist here.
        if (owner != mine && atomic_compare_exchange_strong(&pool->owner, &owner, mine)) {
            hb_team *team = own_team(pool, lanes, generation);
            if (team != NULL && may_borrow(pool, generation)) {
                run_borrowed(pool, team, lanes, n_chunks, fn, arg);
                atomic_store(&pool->owner, 0);
                return;
            }
            if (team != NULL) team_start(team, lanes);
            if (team != NULL && team->started < lanes) lanes = team->started;
            if (team != NULL && lanes > 1) {
                run_job(team, lanes, n_chunks, fn, arg);
                atomic_store(&pool->owner, 0);
                return;
            }
            atomic_store(&pool->owner, 0);
        }
    }
    fn(arg, 0, n_chunks, 0);
}
