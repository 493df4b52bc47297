// One token's way through attention: rotary embedding, and softmax(q K^T) V with shared heads.
//
// torch's operations for it are made for many tokens; for one they cost 60 and 140 us a layer. K
// and V are read where the cache of keys and values has them: the scores by the kernels for
// products of few rows (the heads that share a K are the rows), V widened in pieces that stay in
// the L1 cache. A head is never split: results do not depend on the number of threads.
#include "core/integers.h"
#include "core/matrix.h"
#include "core/ops.h"

#include <inttypes.h>
#include <string.h>

enum {
    PIECE = 2048,             // elements of V or x at a time
    MAX_DEPTH = 1024,         // of a head
    STACK_BYTES = 16 << 10,   // scratch up to this size is not allocated
    SERIAL_PRODUCTS = 1 << 19 // work worth a thread
};

static hb_status check_operand(const hb_view *view, int ndim, hb_dtype dtype, const char *function,
                               const char *name, hb_error *error)
{
    HB_TRY(hb_matrix_check_rows(view, dtype, function, name, error));
    HB_CHECK(error, view->ndim == ndim, HB_ERR_VALUE, "%s: %s, expected %d dimensions, got %d",
             function, name, ndim, view->ndim);
    return HB_OK;
}

static hb_status check_size(const hb_view *view, int d, int64_t size, const char *function,
                            const char *name, hb_error *error)
{
    HB_CHECK(error, view->shape[d] == size, HB_ERR_VALUE,
             "%s: %s, expected size %" PRId64 " in dimension %d, got %" PRId64, function, name,
             size, d, view->shape[d]);
    return HB_OK;
}

static const char *at(const hb_view *view, int64_t i, int64_t j)
{
    return (const char *)view->data +
           (i * view->stride[0] + j * view->stride[1]) * (int64_t)hb_dtype_bytes(view->dtype);
}

// ---- rotary embedding --------------------------------------------------------------------------

static void round_to(const hb_kernels_optim *convert, hb_dtype io, float *x, int64_t n)
{
    float rounded[MAX_DEPTH];
    if (io == HB_F32) return;
    convert->narrow[io](x, n, rounded);
    convert->widen[io](rounded, n, x);
}

hb_status hb_rotate(hb_context *context, const hb_view *x, const hb_view *cosine,
                    const hb_view *sine, const hb_view *y, hb_error *error)
{
    static const char function[] = "rotate";
    const hb_view *const angles[2] = {cosine, sine};
    static const char *const names[2] = {"cos", "sin"};
    const hb_kernels_optim *convert = &context->kernels.optim;
    const hb_dtype io = x->dtype;
    HB_TRY(check_operand(x, 4, io, function, "x", error));
    HB_TRY(check_operand(y, 4, io, function, "y", error));
    for (int d = 0; d < 4; d++) HB_TRY(check_size(y, d, x->shape[d], function, "y", error));
    const int64_t batch = x->shape[0], heads = x->shape[1], depth = x->shape[3];
    HB_TRY(check_size(x, 2, 1, function, "x", error));
    HB_CHECK(error, depth % 2 == 0 && depth <= MAX_DEPTH, HB_ERR_VALUE,
             "rotate: x, expected an even depth of at most %d, got %" PRId64, MAX_DEPTH, depth);
    for (int i = 0; i < 2; i++) {
        HB_TRY(check_operand(angles[i], 3, io, function, names[i], error));
        if (angles[i]->shape[0] != 1)
            HB_TRY(check_size(angles[i], 0, batch, function, names[i], error));
        HB_TRY(check_size(angles[i], 1, 1, function, names[i], error));
        HB_TRY(check_size(angles[i], 2, depth, function, names[i], error));
    }
    const int64_t half = depth / 2;
    _Alignas(64) float factor[2][MAX_DEPTH], straight[MAX_DEPTH], turned[MAX_DEPTH];
    for (int64_t b = 0; b < batch; b++) {
        for (int i = 0; i < 2; i++)
            convert->widen[io](at(angles[i], angles[i]->shape[0] == 1 ? 0 : b, 0), depth,
                               factor[i]);
        for (int64_t h = 0; h < heads; h++) {
            convert->widen[io](at(x, b, h), depth, straight);
            for (int64_t i = 0; i < half; i++) turned[i] = -straight[half + i];
            memcpy(turned + half, straight, (size_t)half * sizeof *turned);
            context->kernels.fused.multiply(straight, factor[0], depth);
            context->kernels.fused.multiply(turned, factor[1], depth);
            round_to(convert, io, straight, depth);
            round_to(convert, io, turned, depth);
            for (int64_t i = 0; i < depth; i++) straight[i] += turned[i];
            convert->narrow[io](straight, depth, (void *)(uintptr_t)at(y, b, h));
        }
    }
    return HB_OK;
}

// ---- attention ---------------------------------------------------------------------------------

typedef struct {
    const hb_kernels *kernels;
    const hb_view *q, *k, *v, *y;
    int64_t groups, shared, length, depth; // heads = groups * shared
    float scale;
    float *scores; // [batch * heads, length]
} attention;

// Scores of the heads of one group: [shared, length].
static void score(const attention *p, int64_t b, int64_t g, float *scores)
{
    const hb_kernels_dense *dense = &p->kernels->dense;
    const hb_dtype io = p->q->dtype;
    for (int64_t s = 0; s < p->shared; s += dense->rows)
        dense->dot[io](at(p->k, b, g), p->k->stride[2], p->length, p->depth,
                       at(p->q, b, g * p->shared + s), p->q->stride[1],
                       (int)hb_least(dense->rows, p->shared - s), scores + s * p->length,
                       p->length);
}

static void attend_groups(void *arg, int64_t begin, int64_t end, int lane)
{
    const attention *p = arg;
    const hb_kernels_fused *fused = &p->kernels->fused;
    const hb_kernels_optim *convert = &p->kernels->optim;
    const hb_dtype io = p->q->dtype;
    const int64_t item = (int64_t)hb_dtype_bytes(io), stride = p->v->stride[2];
    const int64_t at_once = PIECE / p->depth > 0 ? PIECE / p->depth : 1;
    _Alignas(64) float wide[PIECE], out[MAX_DEPTH];
    (void)lane;
    for (int64_t group = begin; group < end; group++) {
        const int64_t b = group / p->groups, g = group % p->groups;
        float *scores = p->scores + group * p->shared * p->length;
        score(p, b, g, scores);
        for (int64_t s = 0; s < p->shared; s++) {
            float *mine = scores + s * p->length;
            const float sum = fused->exponentials(mine, p->length, p->scale);
            fused->scale(mine, p->length, 1.0f / sum);
        }
        // Heads share what is widened only while they are few enough to keep their sums; simpler
        // and as fast out of the L1 cache is to let each head walk through V.
        for (int64_t s = 0; s < p->shared; s++) {
            memset(out, 0, (size_t)p->depth * sizeof *out);
            for (int64_t t = 0; t < p->length; t += at_once) {
                const int64_t rows = hb_least(at_once, p->length - t);
                const char *v = at(p->v, b, g) + t * stride * item;
                if (stride == p->depth)
                    convert->widen[io](v, rows * p->depth, wide);
                else
                    for (int64_t r = 0; r < rows; r++)
                        convert->widen[io](v + r * stride * item, p->depth, wide + r * p->depth);
                fused->weigh(scores + s * p->length + t, wide, rows, p->depth, out);
            }
            convert->narrow[io](out, p->depth,
                                (char *)p->y->data +
                                    (b * p->y->stride[0] + (g * p->shared + s) * p->y->stride[2]) *
                                        item);
        }
    }
}

hb_status hb_attend(hb_context *context, const hb_view *q, const hb_view *k, const hb_view *v,
                    float scale, const hb_view *y, hb_error *error)
{
    static const char function[] = "attend";
    const hb_dtype io = q->dtype;
    HB_TRY(check_operand(q, 4, io, function, "q", error));
    HB_TRY(check_operand(k, 4, io, function, "k", error));
    HB_TRY(check_operand(v, 4, io, function, "v", error));
    HB_TRY(check_operand(y, 4, io, function, "y", error));
    const int64_t batch = q->shape[0], heads = q->shape[1], depth = q->shape[3];
    const int64_t groups = k->shape[1], length = k->shape[2];
    HB_TRY(check_size(q, 2, 1, function, "q", error));
    HB_TRY(check_size(k, 0, batch, function, "k", error));
    HB_TRY(check_size(k, 3, depth, function, "k", error));
    for (int d = 0; d < 4; d++) HB_TRY(check_size(v, d, k->shape[d], function, "v", error));
    HB_TRY(check_size(y, 0, batch, function, "y", error));
    HB_TRY(check_size(y, 1, 1, function, "y", error));
    HB_TRY(check_size(y, 2, heads, function, "y", error));
    HB_TRY(check_size(y, 3, depth, function, "y", error));
    HB_CHECK(error, groups > 0 && heads % groups == 0, HB_ERR_VALUE,
             "attend: q, expected a multiple of %" PRId64 " heads, got %" PRId64, groups, heads);
    HB_CHECK(error, depth > 0 && depth <= MAX_DEPTH, HB_ERR_VALUE,
             "attend: q, expected a depth of 1 to %d, got %" PRId64, MAX_DEPTH, depth);
    HB_CHECK(error, length > 0, HB_ERR_VALUE, "attend: k, expected at least one row, got none");
    HB_CHECK(error, !y->readonly, HB_ERR_BUFFER,
             "attend: y, expected writable memory, got read-only");
    if (batch * heads == 0) return HB_OK;
    attention p = {.kernels = &context->kernels,
                   .q = q,
                   .k = k,
                   .v = v,
                   .y = y,
                   .groups = groups,
                   .shared = heads / groups,
                   .length = length,
                   .depth = depth,
                   .scale = scale};
    _Alignas(64) unsigned char stack[STACK_BYTES];
    hb_scratch scratch = {0};
    unsigned char *memory;
    (void)hb_scratch_reserve(&scratch, batch * heads * length * (int64_t)sizeof *p.scores);
    HB_TRY(
        hb_scratch_open(&scratch, context->scratch, stack, sizeof stack, function, &memory, error));
    p.scores = (float *)memory;
    if (batch * heads * length * depth < SERIAL_PRODUCTS)
        attend_groups(&p, 0, batch * groups, 0);
    else
        hb_parallel_for(context->pool, batch * groups, attend_groups, &p);
    hb_scratch_close(&scratch);
    return HB_OK;
}
