// What the machine can do: the rulers of core/ops.h, that the other benchmarks are read against,
// and copy: memcpy between two buffers far larger than the caches, bytes read plus bytes written.
// read: from such a buffer, or from 256 KiB ("L2"). write: to it, by stores past the caches where
// there are such. fma, dot: multiply-adds in registers.
#include "check.h"
#include "cpu/simd.h"

#include <stdlib.h>

enum {
    MIB = 1 << 20,
    DRAM_BYTES = 256 * MIB,
    TURN_BYTES = 16 * MIB,
    PIECE = MIB / 4,
    L2_BYTES = 256 << 10
};

static void copy_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    uint8_t *const *const from_to = arg;
    (void)lane;
    memcpy(from_to[1] + begin * PIECE, from_to[0] + begin * PIECE, (size_t)(end - begin) * PIECE);
}

static void write_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    uint8_t *to = (uint8_t *)arg + begin * PIECE;
    const int64_t n = (end - begin) * PIECE;
    (void)lane;
#if defined(__SSE2__)
    for (int64_t i = 0; i < n; i += 16) _mm_stream_si128((__m128i *)(to + i), _mm_setzero_si128());
    _mm_sfence();
#else
    memset(to, 0, (size_t)n);
#endif
}

BENCH_GROUP(machine)
{
    uint8_t *memory = aligned_alloc(4096, DRAM_BYTES);
    if (memory == NULL) return;
    memset(memory, 1, DRAM_BYTES);
    hb_pool *pool = c->context->pool;
    for (int threads = 1; threads <= 2; threads++) {
        hb_pool_set_threads(pool, threads);
        CHECK_BENCH(c, b, "machine read DRAM", TURN_BYTES, 0)
        hb_read_memory(c->context, memory + (int64_t)b.copy * TURN_BYTES % DRAM_BYTES, TURN_BYTES);
        CHECK_BENCH(c, b, "machine copy DRAM", 2 * TURN_BYTES, 0)
        {
            uint8_t *from = memory + (int64_t)b.copy * TURN_BYTES % (DRAM_BYTES / 2);
            uint8_t *from_to[] = {from, from + DRAM_BYTES / 2};
            hb_parallel_for(pool, TURN_BYTES / PIECE, copy_pieces, from_to);
        }
        CHECK_BENCH(c, b, "machine write DRAM", TURN_BYTES, 0)
        hb_parallel_for(pool, TURN_BYTES / PIECE, write_pieces,
                        memory + (int64_t)b.copy * TURN_BYTES % DRAM_BYTES);
        enum { CALLS = 64 };
        static const char *const names[] = {"machine fma f32", "machine dot bf16",
                                            "machine dot int8"};
        for (hb_ruler_kind kind = HB_RULER_F32; kind <= HB_RULER_INT8; kind++) {
            const int64_t operations = hb_multiply_adds(c->context, kind, CALLS);
            if (operations == 0) continue;
            CHECK_BENCH(c, b, names[kind], 0, operations)
            hb_multiply_adds(c->context, kind, CALLS);
        }
    }
    hb_pool_set_threads(pool, 1);
    CHECK_BENCH(c, b, "machine read L2", L2_BYTES, 0)
    hb_read_memory(c->context, memory, L2_BYTES);
    free(memory);
}
