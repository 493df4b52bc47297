// What the machine can do: the rulers that the other benchmarks are read against.
//
// - read: sum of all 64-byte words of a buffer far larger than the caches, or of 256 KiB ("L2").
//   Eight streams with software prefetch: of the ways to read that were tried, the fastest on
//   pages of 4 KiB, which is what weights lie in. A ruler must not lose to what it measures.
// - copy: memcpy between two such buffers, bytes read plus bytes written.
// - fma: independent chains of float32 fused multiply-adds in registers, at the widest vectors.
// - dot: the same with dot products of bfloat16 (vdpbf16ps) and int8 (vpdpbusd), where the
// processor
//   has them.
#include "check.h"
#include "machine_loops.h"

#include <stdlib.h>

enum {
    MIB = 1 << 20,
    DRAM_BYTES = 256 * MIB,
    TURN_BYTES = 16 * MIB,
    PIECE = MIB / 4,
    L2_BYTES = 256 << 10
};

typedef struct {
    read_fn read;
    fma_fn fma;
    const uint8_t *from;
    uint8_t *to;
    volatile float sink[64];
    volatile uint64_t read_sink[64];
} job;

static void read_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->read_sink[lane & 63] = j->read(j->from + begin * PIECE, (end - begin) * PIECE);
}

static void copy_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    (void)lane;
    memcpy(j->to + begin * PIECE, j->from + begin * PIECE, (size_t)(end - begin) * PIECE);
}

static void compute(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->sink[lane & 63] = j->fma(1000 * (end - begin));
}

BENCH_GROUP(machine)
{
    uint8_t *memory = aligned_alloc(4096, DRAM_BYTES);
    if (memory == NULL) return;
    memset(memory, 1, DRAM_BYTES);
    hb_pool *pool = c->context->pool;
    job j = {.read = widest_read(c->flags)};
    for (int threads = 1; threads <= 2; threads++) {
        hb_pool_set_threads(pool, threads);
        CHECK_BENCH(c, b, "machine read DRAM", TURN_BYTES, 0)
        {
            j.from = memory + (int64_t)b.copy * TURN_BYTES % DRAM_BYTES;
            hb_parallel_for(pool, TURN_BYTES / PIECE, read_pieces, &j);
        }
        CHECK_BENCH(c, b, "machine copy DRAM", 2 * TURN_BYTES, 0)
        {
            j.from = memory + (int64_t)b.copy * TURN_BYTES % (DRAM_BYTES / 2);
            j.to = (uint8_t *)(uintptr_t)j.from + DRAM_BYTES / 2;
            hb_parallel_for(pool, TURN_BYTES / PIECE, copy_pieces, &j);
        }
        enum { CALLS = 64, ROUNDS = 1000 };
        int64_t operations = 0;
        j.fma = widest_fma(c->flags, &operations);
        if (j.fma != NULL) CHECK_BENCH(c, b, "machine fma f32", 0, operations * ROUNDS * CALLS)
        hb_parallel_for(pool, CALLS, compute, &j);
        j.fma = bf16_dots(c->flags, &operations);
        if (j.fma != NULL) CHECK_BENCH(c, b, "machine dot bf16", 0, operations * ROUNDS * CALLS)
        hb_parallel_for(pool, CALLS, compute, &j);
        j.fma = int8_dots(c->flags, &operations);
        if (j.fma != NULL) CHECK_BENCH(c, b, "machine dot int8", 0, operations * ROUNDS * CALLS)
        hb_parallel_for(pool, CALLS, compute, &j);
    }
    hb_pool_set_threads(pool, 1);
    CHECK_BENCH(c, b, "machine read L2", L2_BYTES, 0) j.read_sink[0] = j.read(memory, L2_BYTES);
    free(memory);
}
