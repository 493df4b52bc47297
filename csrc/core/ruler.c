// Rulers on all threads of the pool.
#include "core/ops.h"

#include <stdatomic.h>

enum { PIECE = HB_RULER_PIECE, ROUNDS = 1000 };

typedef struct {
    const hb_kernels_ruler *kernels;
    const uint8_t *data;
    float (*multiply)(int64_t rounds);
    _Atomic uint64_t sum;
    _Atomic uint32_t sink; // so that nobody may leave the products out
} ruler_job;

static void read_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    ruler_job *job = arg;
    const uint64_t sum = job->kernels->read(job->data + begin * PIECE, (end - begin) * PIECE);
    atomic_fetch_add_explicit(&job->sum, sum, memory_order_relaxed);
}

static void multiply(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    ruler_job *job = arg;
    const float result = job->multiply(ROUNDS * (end - begin));
    atomic_fetch_add_explicit(&job->sink, result > 0.0f, memory_order_relaxed);
}

uint64_t hb_read_memory(hb_context *context, const void *data, int64_t bytes)
{
    ruler_job job = {.kernels = &context->kernels.ruler, .data = data};
    hb_parallel_for(context->pool, bytes / PIECE, read_pieces, &job);
    return job.sum;
}

int64_t hb_multiply_adds(hb_context *context, hb_ruler_kind kind, int64_t calls)
{
    const hb_kernels_ruler *kernels = &context->kernels.ruler;
    const hb_ruler *ruler = kind == HB_RULER_F32    ? &kernels->f32
                            : kind == HB_RULER_BF16 ? &kernels->bf16
                                                    : &kernels->int8;
    if (ruler->run == NULL || calls <= 0) return 0;
    ruler_job job = {.multiply = ruler->run};
    hb_parallel_for(context->pool, calls, multiply, &job);
    return ruler->operations * ROUNDS * calls;
}
