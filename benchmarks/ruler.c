// The rulers as a small shared library, for benchmarks in Python: the same loops and the same pool
// as bench_machine.c, in the process whose other numbers they are laid beside.
#include "core/parallel.h"
#include "machine_loops.h"

#define EXPORT __attribute__((visibility("default")))

enum { PIECE = 1 << 18, MULTIPLY_ROUNDS = 1000 };

typedef struct {
    read_fn read;
    fma_fn fma;
    const uint8_t *data;
    volatile uint64_t read_sink[64];
    volatile float sink[64];
} job;

static hb_pool *pool; // of this library's only user, a benchmark's main thread

EXPORT int ruler_open(int threads);
EXPORT void ruler_read(const void *data, int64_t bytes);
EXPORT int64_t ruler_multiply(int kind, int64_t calls);

static void read_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->read_sink[lane & 63] = j->read(j->data + begin * PIECE, (end - begin) * PIECE);
}

static void multiply(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->sink[lane & 63] = j->fma(MULTIPLY_ROUNDS * (end - begin));
}

// 0 when the library is ready.
int ruler_open(int threads)
{
    if (pool == NULL) pool = hb_pool_create(threads);
    return pool == NULL;
}

// Reads `bytes` (rounded down to 256 KiB) once.
void ruler_read(const void *data, int64_t bytes)
{
    job j = {.read = widest_read(hb_cpu_detect()), .data = data};
    hb_parallel_for(pool, bytes / PIECE, read_pieces, &j);
}

// `calls` times some thousand multiply-adds in registers: of float32 (kind 0), bfloat16 (1), int8
// (2), with the instructions that halfbyte uses. Returns the operations, a multiply-add counted as
// two, or 0 where no such loop was written.
int64_t ruler_multiply(int kind, int64_t calls)
{
    int64_t operations = 0;
    int unknown;
    const uint32_t flags = hb_cpu_flags(&unknown);
    job j = {.fma = kind == 0   ? widest_fma(flags, &operations)
                    : kind == 1 ? bf16_dots(flags, &operations)
                                : int8_dots(flags, &operations)};
    if (j.fma == NULL) return 0;
    hb_parallel_for(pool, calls, multiply, &j);
    return operations * MULTIPLY_ROUNDS * calls;
}
