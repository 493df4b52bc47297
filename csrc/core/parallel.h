// The one way to use more than one thread.
//
// Chunks are given out in contiguous ranges; completion means that every chunk is done, never that
// every worker came. The caller takes part. Where torch has an OpenMP runtime its threads are used.
// Safe after fork(): a child starts a pool of its own. The result of an operation must not depend
// on how chunks are spread.
#ifndef HB_CORE_PARALLEL_H
#define HB_CORE_PARALLEL_H

#include <stdint.h>

typedef struct hb_pool hb_pool;

// Creates a pool for up to `threads` threads, the caller included (<= 0: HALFBYTE_NUM_THREADS, then
// OMP_NUM_THREADS, then cgroup quota, then affinity). Workers start at the first parallel call.
// Returns NULL when memory is short.
hb_pool *hb_pool_create(int threads);
void hb_pool_destroy(hb_pool *pool);
int hb_pool_threads(const hb_pool *pool);
// Loops so far: on the threads of torch's OpenMP runtime; with a wait for a thread that had no
// processor; with fewer threads because of such waits (crowd.h).
typedef struct {
    uint64_t borrowed, late, crowded;
} hb_pool_counts;
hb_pool_counts hb_pool_count(const hb_pool *pool);
// Changes the number of threads used by calls that start later.
void hb_pool_set_threads(hb_pool *pool, int threads);

// Work on chunks [begin, end); `lane` in 0..threads-1 is unique among concurrent callbacks of one
// call.
typedef void (*hb_chunk_fn)(void *arg, int64_t begin, int64_t end, int lane);

// Runs fn over chunks 0..n_chunks-1 with up to hb_pool_threads(pool) threads; nested or concurrent
// calls are allowed (a call that finds the pool busy runs on its own thread). Cannot fail.
void hb_parallel_for(hb_pool *pool, int64_t n_chunks, hb_chunk_fn fn, void *arg);
// The same with lanes below `most_lanes`: for callers with memory for each lane, since the number
// of threads may be raised meanwhile.
void hb_parallel_for_lanes(hb_pool *pool, int most_lanes, int64_t n_chunks, hb_chunk_fn fn,
                           void *arg);

#endif
