// The small operations between a model's matrix products, each in one pass over a row: what torch
// does in four to twelve operations, of a few microseconds each however small the tensor is.
//
// A row is widened to float32 in pieces that stay in the L1 cache, worked on and narrowed again,
// with the roundings that the same operations have in torch. Rows are split over the pool, a row
// never: results do not depend on the number of threads.
#include "core/integers.h"
#include "core/matrix.h"
#include "core/ops.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

enum {
    PIECE = 1024,             // elements; a multiple of HB_FUSED_LANES, so that lanes go on
    SERIAL_ELEMENTS = 1 << 15 // work worth a thread
};

static hb_status check_same_shape(const hb_view *view, const hb_view *like, const char *function,
                                  const char *name, const char *like_name, hb_error *error)
{
    HB_CHECK(error, view->ndim == like->ndim, HB_ERR_VALUE,
             "%s: %s, expected %d dimensions like %s, got %d", function, name, like->ndim,
             like_name, view->ndim);
    for (int d = 0; d < view->ndim; d++)
        HB_CHECK(error, view->shape[d] == like->shape[d], HB_ERR_VALUE,
                 "%s: %s, expected size %" PRId64 " in dimension %d like %s, got %" PRId64,
                 function, name, like->shape[d], d, like_name, view->shape[d]);
    return HB_OK;
}

static hb_status check_output(const hb_view *y, const hb_view *like, const char *function,
                              const char *like_name, hb_error *error)
{
    HB_TRY(hb_matrix_check_rows(y, like->dtype, function, "y", error));
    HB_TRY(check_same_shape(y, like, function, "y", like_name, error));
    HB_CHECK(error, !y->readonly, HB_ERR_BUFFER, "%s: y, expected writable memory, got read-only",
             function);
    return HB_OK;
}

// Rows in chunks over the pool, or here when they are little work.
static void for_rows(hb_context *context, int64_t rows, int64_t cols, hb_chunk_fn fn, void *arg)
{
    if (rows * cols < SERIAL_ELEMENTS)
        fn(arg, 0, rows, 0);
    else
        hb_parallel_for(context->pool, rows, fn, arg);
}

static const unsigned char *row_of(const hb_matrix *m, int64_t row)
{
    return hb_matrix_element(m, hb_matrix_row_offset(m, row));
}

// ---- the norm ----------------------------------------------------------------------------------

typedef struct {
    const hb_kernels *kernels;
    hb_matrix x, y;
    const unsigned char *w;
    hb_dtype io;
    float eps;
} norm;

static float inverse_root_of_mean(const norm *p, const unsigned char *x)
{
    const int64_t n = p->x.cols, item = (int64_t)hb_dtype_bytes(p->io);
    double lanes[HB_FUSED_LANES] = {0}, sum = 0;
    _Alignas(64) float wide[PIECE];
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        const int64_t part = hb_least(PIECE, n - begin);
        p->kernels->optim.widen[p->io](x + begin * item, part, wide);
        p->kernels->fused.squares(wide, part, lanes);
    }
    for (int l = 0; l < HB_FUSED_LANES; l++) sum += lanes[l];
    return 1.0f / sqrtf((float)(sum / (double)n) + p->eps);
}

static void norm_rows(void *arg, int64_t begin_row, int64_t end_row, int lane)
{
    const norm *p = arg;
    const hb_kernels_optim *convert = &p->kernels->optim;
    const hb_kernels_fused *fused = &p->kernels->fused;
    const int64_t n = p->x.cols, item = (int64_t)hb_dtype_bytes(p->io);
    _Alignas(64) float wide[PIECE], weight[PIECE];
    (void)lane;
    for (int64_t row = begin_row; row < end_row; row++) {
        const unsigned char *x = row_of(&p->x, row);
        unsigned char *y = (unsigned char *)row_of(&p->y, row);
        const float factor = inverse_root_of_mean(p, x);
        for (int64_t begin = 0; begin < n; begin += PIECE) {
            const int64_t part = hb_least(PIECE, n - begin), at = begin * item;
            convert->widen[p->io](x + at, part, wide);
            fused->scale(wide, part, factor);
            if (p->io != HB_F32) { // y is where it is rounded
                convert->narrow[p->io](wide, part, y + at);
                convert->widen[p->io](y + at, part, wide);
            }
            convert->widen[p->io](p->w + at, part, weight);
            fused->multiply(wide, weight, part);
            convert->narrow[p->io](wide, part, y + at);
        }
    }
}

hb_status hb_rms_norm(hb_context *context, const hb_view *x, const hb_view *w, float eps,
                      const hb_view *y, hb_error *error)
{
    static const char function[] = "rms_norm";
    HB_TRY(hb_matrix_check_rows(x, x->dtype, function, "x", error));
    HB_TRY(hb_matrix_check_rows(w, x->dtype, function, "weight", error));
    HB_CHECK(error, w->ndim == 1 && w->shape[0] == x->shape[x->ndim - 1], HB_ERR_VALUE,
             "rms_norm: weight, expected shape [%" PRId64 "], got %d dimensions of %" PRId64
             " elements",
             x->shape[x->ndim - 1], w->ndim, hb_view_numel(w));
    HB_TRY(check_output(y, x, function, "x", error));
    norm p = {.kernels = &context->kernels,
              .x = hb_matrix_of(x),
              .y = hb_matrix_of(y),
              .w = w->data,
              .io = x->dtype,
              .eps = eps};
    if (p.x.cols > 0) for_rows(context, p.x.rows, p.x.cols, norm_rows, &p);
    return HB_OK;
}

// ---- activation and product --------------------------------------------------------------------

typedef struct {
    const hb_kernels *kernels;
    hb_matrix gate, up, y;
    hb_activation f;
    hb_dtype io;
    int64_t pieces; // of a row
} gating;

static void gate_pieces(void *arg, int64_t begin_chunk, int64_t end_chunk, int lane)
{
    const gating *p = arg;
    const hb_kernels_optim *convert = &p->kernels->optim;
    const int64_t item = (int64_t)hb_dtype_bytes(p->io);
    _Alignas(64) float wide[PIECE], factor[PIECE];
    (void)lane;
    for (int64_t chunk = begin_chunk; chunk < end_chunk; chunk++) {
        const int64_t row = chunk / p->pieces, begin = chunk % p->pieces * PIECE;
        const int64_t part = hb_least(PIECE, p->y.cols - begin), at = begin * item;
        unsigned char *y = (unsigned char *)row_of(&p->y, row) + at;
        convert->widen[p->io](row_of(&p->gate, row) + at, part, wide);
        convert->widen[p->io](row_of(&p->up, row) + at, part, factor);
        p->kernels->fused.activate[p->f](wide, part);
        if (p->io != HB_F32) { // y is where it is rounded
            convert->narrow[p->io](wide, part, y);
            convert->widen[p->io](y, part, wide);
        }
        p->kernels->fused.multiply(wide, factor, part);
        convert->narrow[p->io](wide, part, y);
    }
}

hb_status hb_gate(hb_context *context, const hb_view *gate, const hb_view *up, hb_activation f,
                  const hb_view *y, hb_error *error)
{
    static const char function[] = "gate";
    HB_TRY(hb_matrix_check_rows(gate, gate->dtype, function, "gate", error));
    HB_TRY(hb_matrix_check_rows(up, gate->dtype, function, "up", error));
    HB_TRY(check_same_shape(up, gate, function, "up", "gate", error));
    HB_TRY(check_output(y, gate, function, "gate", error));
    gating p = {.kernels = &context->kernels,
                .gate = hb_matrix_of(gate),
                .up = hb_matrix_of(up),
                .y = hb_matrix_of(y),
                .f = f,
                .io = gate->dtype};
    p.pieces = hb_ceil_div(p.y.cols, PIECE);
    if (p.y.cols > 0)
        for_rows(context, p.y.rows * p.pieces, hb_least(p.y.cols, PIECE), gate_pieces, &p);
    return HB_OK;
}
