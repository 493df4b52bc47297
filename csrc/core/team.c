#ifndef _GNU_SOURCE
#define _GNU_SOURCE // pthread_setname_np
#endif
#include "core/team.h"

#include "core/thread_count.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

enum { SPIN_NS = 50000 };

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

void hb_team_count_forks(void)
{
    pthread_once(&atfork_once, register_atfork);
}

uint32_t hb_team_generation(void)
{
    return atomic_load(&fork_generation);
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

int64_t hb_clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t hb_now_ns(void)
{
    return hb_clock_ns(CLOCK_MONOTONIC);
}

// Spins for at most SPIN_NS while *value == old.
static void spin_while_equal(atomic_uint_least64_t *value, uint64_t old)
{
    const int64_t start = hb_now_ns();
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(value, memory_order_acquire) != old) return;
            relax();
        }
    } while (hb_now_ns() - start < SPIN_NS);
}

// ---- taking units -------------------------------------------------------------------------------

// Takes half of what is left (at least one unit) from the front or the tail. False when empty.
static bool take(hb_lane_range *lane, bool from_tail, uint64_t *begin, uint64_t *end)
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

hb_presence hb_presence_begin(void)
{
    return (hb_presence){hb_now_ns(), hb_clock_ns(CLOCK_THREAD_CPUTIME_ID)};
}

int64_t hb_presence_absence(hb_presence since, int64_t now)
{
    const int64_t passed = now - since.wall;
    if (passed < HB_LATE_NS) return 0; // the usual case: no system call
    const int64_t absent = passed - (hb_clock_ns(CLOCK_THREAD_CPUTIME_ID) - since.cpu);
    return absent < HB_LATE_NS ? 0 : absent;
}

static void note_absence(hb_job_slot *slot, int64_t absent)
{
    int64_t longest = atomic_load_explicit(&slot->absent_ns, memory_order_relaxed);
    while (absent > longest &&
           !atomic_compare_exchange_weak_explicit(&slot->absent_ns, &longest, absent,
                                                  memory_order_relaxed, memory_order_relaxed)) {
    }
}

void hb_team_finish(hb_team *team, hb_job_slot *slot, uint64_t units)
{
    if (atomic_fetch_add(&slot->units_done, units) + units != slot->n_units) return;
    atomic_store_explicit(&slot->done_ns, hb_now_ns(), memory_order_relaxed);
    if (!atomic_load(&slot->caller_sleeps)) return;
    pthread_mutex_lock(&team->done_mutex);
    pthread_cond_broadcast(&team->done);
    pthread_mutex_unlock(&team->done_mutex);
}

void hb_team_run_units(const hb_job_slot *slot, uint64_t begin, uint64_t end, int lane)
{
    int64_t first = (int64_t)begin * slot->chunks_per_unit;
    int64_t last = (int64_t)end * slot->chunks_per_unit;
    slot->fn(slot->arg, first, last < slot->n_chunks ? last : slot->n_chunks, lane);
}

uint64_t hb_team_run_lane(hb_team *team, hb_job_slot *slot, int lane, hb_presence since)
{
    uint64_t units = 0;
    for (int i = 0; i < slot->lanes; i++) {
        int victim = (lane + i) % slot->lanes;
        uint64_t begin, end;
        while (take(&slot->ranges[victim], victim != lane, &begin, &end)) {
            hb_team_run_units(slot, begin, end, lane);
            if (lane != 0)
                note_absence(
                    slot, hb_presence_absence(since, hb_now_ns())); // before the caller may go on
            units += end - begin;
            hb_team_finish(team, slot, end - begin);
        }
    }
    return units;
}

// ---- workers ------------------------------------------------------------------------------------

static void sleep_until_new(hb_worker *self, uint64_t seen)
{
    hb_team *team = self->team;
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->sleeps, true);
    while (atomic_load(&team->current) == seen && !atomic_load(&team->stop))
        pthread_cond_wait(&self->wake, &self->mutex);
    atomic_store(&self->sleeps, false);
    pthread_mutex_unlock(&self->mutex);
}

static void wake(hb_worker *sleeper)
{
    if (!atomic_load(&sleeper->sleeps)) return;
    pthread_mutex_lock(&sleeper->mutex);
    pthread_cond_signal(&sleeper->wake);
    pthread_mutex_unlock(&sleeper->mutex);
}

static void *worker_main(void *arg)
{
    hb_worker *self = arg;
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
        hb_job_slot *slot = &team->slots[current % HB_TEAM_SLOTS];
        atomic_fetch_add(&slot->holders, 1);
        if (atomic_load(&team->current) == current && self->lane < slot->lanes)
            (void)hb_team_run_lane(team, slot, self->lane, hb_presence_begin());
        atomic_fetch_sub(&slot->holders, 1);
    }
    return NULL;
}

// ---- teams --------------------------------------------------------------------------------------

static void *allocate_lines(size_t count, size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, HB_CACHE_LINE, count * size) != 0) return NULL;
    return memset(memory, 0, count * size);
}

static void team_release(hb_team *team)
{
    if (team == NULL) return;
    free(team->workers);
    free(team->ranges);
    free(team);
}

hb_team *hb_team_create(int capacity, uint32_t generation)
{
    hb_team *team = allocate_lines(1, sizeof *team);
    if (team == NULL) return NULL;
    team->workers = allocate_lines((size_t)capacity, sizeof *team->workers);
    team->ranges = allocate_lines((size_t)capacity * HB_TEAM_SLOTS, sizeof *team->ranges);
    if (team->workers == NULL || team->ranges == NULL) {
        team_release(team);
        return NULL;
    }
    team->generation = generation;
    team->capacity = capacity;
    team->started = 1;
    pthread_mutex_init(&team->done_mutex, NULL);
    pthread_cond_init(&team->done, NULL);
    for (int i = 0; i < HB_TEAM_SLOTS; i++) team->slots[i].ranges = team->ranges + i * capacity;
    return team;
}

void hb_team_destroy(hb_team *team)
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

void hb_team_start(hb_team *team, int threads)
{
    if (team->started >= threads) return;
    sigset_t all, before;
    sigfillset(&all); // signals belong to the threads of the application
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team->started < threads) {
        hb_worker *next = &team->workers[team->started];
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

// ---- jobs ---------------------------------------------------------------------------------------

// A slot that nobody looks at. Each holder leaves after at most one piece of work.
static hb_job_slot *free_slot(hb_team *team, uint64_t *name)
{
    for (;;) {
        team->serial++;
        hb_job_slot *slot = &team->slots[team->serial % HB_TEAM_SLOTS];
        if (atomic_load(&slot->holders) == 0) {
            *name = team->serial;
            return slot;
        }
        relax();
    }
}

// Spins for at most SPIN_NS while units are missing. True when none are.
static bool spin_until_done(hb_job_slot *slot)
{
    const int64_t start = hb_now_ns();
    do {
        if (atomic_load(&slot->units_done) == slot->n_units) return true;
        relax();
    } while (hb_now_ns() - start < SPIN_NS);
    return false;
}

void hb_team_wait(hb_team *team, hb_job_slot *slot)
{
    if (spin_until_done(slot)) return;
    pthread_mutex_lock(&team->done_mutex);
    atomic_store(&slot->caller_sleeps, true);
    while (atomic_load(&slot->units_done) != slot->n_units)
        pthread_cond_wait(&team->done, &team->done_mutex);
    pthread_mutex_unlock(&team->done_mutex);
}

void hb_team_split(hb_job_slot *slot, uint64_t first)
{
    const uint64_t lanes = (uint64_t)slot->lanes, n = slot->n_units - first;
    for (uint64_t lane = 0, begin = first; lane < lanes; lane++) {
        uint64_t end = first + n * (lane + 1) / lanes;
        atomic_store_explicit(&slot->ranges[lane].range, (end << 32) | begin, memory_order_relaxed);
        begin = end;
    }
}

hb_job_slot *hb_team_slot(hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn, void *arg,
                          uint64_t *name)
{
    hb_job_slot *slot = free_slot(team, name);
    slot->fn = fn;
    slot->arg = arg;
    slot->n_chunks = n_chunks;
    slot->chunks_per_unit = n_chunks / INT32_MAX + 1; // units must fit in 32 bits
    slot->n_units = (uint64_t)((n_chunks - 1) / slot->chunks_per_unit + 1);
    slot->lanes = lanes;
    atomic_store(&slot->caller_sleeps, false);
    atomic_store(&slot->units_done, 0);
    atomic_store_explicit(&slot->done_ns, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->absent_ns, 0, memory_order_relaxed);
    hb_team_split(slot, 0);
    return slot;
}

void hb_team_publish(hb_team *team, hb_job_slot *slot, uint64_t name)
{
    atomic_store(&team->current, name);
    for (int i = 1; i < slot->lanes; i++) wake(&team->workers[i]);
}

void hb_team_withdraw(hb_team *team)
{
    atomic_store(&team->current, 0);
}
