// The workers of one process and the job that they share; what the pool of parallel.h is made of.
//
// A job's chunks are grouped in units. Every lane has a contiguous range of units. Lane l belongs
// to worker l (lane 0 to the caller), which takes halves from the front of its own range, so that
// memory streams stay long, and then halves from the tail of other lanes' ranges. A job is over
// when every unit is done; a worker that the system has descheduled before it began costs nothing,
// its range is stolen.
//
// A late worker may still look at a job that is over. Hence slots are reused only when nobody holds
// them: a worker raises `holders`, then looks whether `current` still names the slot; the caller
// takes `current` away, then looks at `holders` (sequentially consistent on both sides).
//
// fork(): a child has the memory but not the threads. A counter that the atfork handler raises
// tells a team of the parent from one of this process.
#ifndef HB_CORE_TEAM_H
#define HB_CORE_TEAM_H

#include "core/parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

enum {
    HB_TEAM_SLOTS = 8,
    HB_CACHE_LINE = 64,
    HB_LATE_NS = 300000, // absences shorter than this do not count
};

// Units [begin, end) still to be taken: begin in the low, end in the high 32 bits.
typedef struct {
    _Alignas(HB_CACHE_LINE) atomic_uint_least64_t range;
} hb_lane_range;

typedef struct {
    _Alignas(HB_CACHE_LINE) atomic_int holders; // threads that may look at the rest
    _Alignas(HB_CACHE_LINE) atomic_uint_least64_t units_done;
    atomic_int_least64_t done_ns;   // when the last unit was done
    atomic_int_least64_t absent_ns; // longest time that a helper was off its processor at work
    atomic_bool caller_sleeps;
    hb_chunk_fn fn;
    void *arg;
    int64_t n_chunks, chunks_per_unit;
    uint64_t n_units;
    int lanes;
    hb_lane_range *ranges; // [capacity]
} hb_job_slot;

typedef struct hb_team hb_team;

typedef struct {
    _Alignas(HB_CACHE_LINE) atomic_bool sleeps;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t thread;
    hb_team *team;
    int lane;
} hb_worker;

// What belongs to one process. capacity counts the caller.
struct hb_team {
    _Alignas(HB_CACHE_LINE) atomic_uint_least64_t
        current; // serial of the job in slots[serial % HB_TEAM_SLOTS]; 0: none
    atomic_bool stop;
    uint64_t serial;
    uint32_t generation;
    int capacity, started;
    pthread_mutex_t done_mutex;
    pthread_cond_t done;
    hb_job_slot slots[HB_TEAM_SLOTS];
    hb_worker *workers;    // [capacity], entry 0 unused
    hb_lane_range *ranges; // [HB_TEAM_SLOTS * capacity]
};

// When a thread began to work.
typedef struct {
    int64_t wall, cpu; // ns
} hb_presence;

int64_t hb_clock_ns(clockid_t clock);
int64_t hb_now_ns(void); // of the clock of hb_presence.wall
hb_presence hb_presence_begin(void);
// How long this thread, which began to work then, had no processor until `now`; 0 when that is too
// short to matter.
int64_t hb_presence_absence(hb_presence since, int64_t now);

void hb_team_count_forks(void);    // from now on; any number of times
uint32_t hb_team_generation(void); // forks between the first process and this one

// Room for `capacity` threads, the caller's included, none started yet. NULL when memory is short.
hb_team *hb_team_create(int capacity, uint32_t generation);
// Ends a team of this process; of a team of the parent only the memory is given back.
void hb_team_destroy(hb_team *team);
// Starts workers up to `threads`; goes on with fewer when the system gives no more.
void hb_team_start(hb_team *team, int threads);

// A job for `lanes` lanes, not yet published; `name` is for hb_team_publish.
hb_job_slot *hb_team_slot(hb_team *team, int lanes, int64_t n_chunks, hb_chunk_fn fn, void *arg,
                          uint64_t *name);
// Gives every lane a range of the units from `first` on.
void hb_team_split(hb_job_slot *slot, uint64_t first);
// Shows the job to the workers and wakes them. Afterwards, when it is over: withdraw.
void hb_team_publish(hb_team *team, hb_job_slot *slot, uint64_t name);
void hb_team_withdraw(hb_team *team);
// Works on the job as lane `lane` until nothing is left to take. Returns the units that it did.
uint64_t hb_team_run_lane(hb_team *team, hb_job_slot *slot, int lane, hb_presence since);
// Works on units [begin, end), which nobody else can take; and says that as many are done.
void hb_team_run_units(const hb_job_slot *slot, uint64_t begin, uint64_t end, int lane);
void hb_team_finish(hb_team *team, hb_job_slot *slot, uint64_t units);
// Returns when every unit is done.
void hb_team_wait(hb_team *team, hb_job_slot *slot);

#endif
