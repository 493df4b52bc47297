// Parts of a transformer block in one call: what a layer computes between two norms, for few rows.
//
// Nothing is computed here that ops.h does not have by itself. What is saved is around it: a token
// of a model of 24 layers is some 170 products of 35 to 200 us, each with a call through torch's
// modules, a tensor made and freed, x permuted and a parallel loop begun.
#include "core/integers.h"
#include "core/matrix.h"
#include "core/ops.h"

#include <inttypes.h>

// Contiguous memory with x's shape but for the last size.
static hb_view like_rows(const hb_view *x, int64_t cols, void *data)
{
    hb_view view = *x;
    view.data = data;
    view.readonly = false;
    view.shape[x->ndim - 1] = cols;
    hb_contiguous_strides(view.ndim, view.shape, view.stride);
    return view;
}

static int64_t bytes_of(const hb_view *view)
{
    return hb_view_numel(view) * (int64_t)hb_dtype_bytes(view->dtype);
}

// [batch, heads, 1, depth] or [batch, 1, heads, depth], contiguous -> [batch, 1, heads * depth].
static hb_view joined_heads(const hb_view *view)
{
    hb_view rows = *view;
    const int64_t cols = view->shape[1] * view->shape[2] * view->shape[3];
    rows.ndim = 3;
    rows.shape[1] = 1;
    rows.shape[2] = cols;
    rows.stride[0] = rows.stride[1] = cols;
    rows.stride[2] = 1;
    return rows;
}

hb_status hb_mlp_4bit(hb_context *context, const hb_view *x, const hb_linear4_item *gate,
                      const hb_linear4_item *up, const hb_linear4_item *down, hb_activation f,
                      hb_compute compute, const hb_view *y, hb_error *error)
{
    static const char function[] = "mlp_4bit";
    HB_TRY(hb_matrix_check_rows(x, x->dtype, function, "x", error));
    HB_CHECK(error, gate->w->rows == up->w->rows && down->w->depth == up->w->rows, HB_ERR_VALUE,
             "%s: down, expected a depth of %" PRId64
             " and as many rows of gate and up, got %" PRId64 ", %" PRId64 " and %" PRId64,
             function, up->w->rows, down->w->depth, gate->w->rows, up->w->rows);
    HB_CHECK(error, gate->w->rows == 0 || hb_matrix_of(x).rows <= INT64_MAX / 16 / gate->w->rows,
             HB_ERR_VALUE, "%s: x, expected a size of 64 bits between the products, got more",
             function);
    hb_view inner[2] = {like_rows(x, gate->w->rows, NULL), like_rows(x, up->w->rows, NULL)};
    hb_scratch scratch = {0};
    unsigned char *memory;
    const int64_t gate_at = hb_scratch_reserve(&scratch, bytes_of(&inner[0]));
    const int64_t up_at = hb_scratch_reserve(&scratch, bytes_of(&inner[1]));
    HB_TRY(hb_scratch_open(&scratch, context->scratch, NULL, 0, function, &memory, error));
    inner[0].data = memory + gate_at;
    inner[1].data = memory + up_at;
    const hb_linear4_item both[2] = {{gate->w, gate->bias, &inner[0]},
                                     {up->w, up->bias, &inner[1]}};
    hb_status status = hb_linear_4bit_group(context, x, 2, both, compute, error);
    if (status == HB_OK) status = hb_gate(context, &inner[0], &inner[1], f, &inner[0], error);
    if (status == HB_OK)
        status = hb_linear_4bit(context, &inner[0], down->w, down->bias, compute, y, NULL, error);
    hb_scratch_close(&scratch);
    return status;
}

hb_status hb_qkv_4bit(hb_context *context, const hb_view *x, const hb_linear4_item *items,
                      const hb_view *cosine, const hb_view *sine, hb_compute compute,
                      hb_error *error)
{
    static const char function[] = "qkv_4bit";
    static const char *const names[3] = {"q", "k", "v"};
    hb_view rows[3];
    hb_linear4_item each[3];
    HB_CHECK(error, x->ndim == 3 && x->shape[1] == 1, HB_ERR_VALUE,
             "%s: x, expected shape [batch, 1, depth], got %d dimensions of %" PRId64 " elements",
             function, x->ndim, hb_view_numel(x));
    for (int i = 0; i < 3; i++) {
        const hb_view *y = items[i].y;
        HB_CHECK(error, y->ndim == 4 && y->shape[2] == 1 && hb_view_is_contiguous(y), HB_ERR_VALUE,
                 "%s: %s, expected contiguous memory of [batch, heads, 1, depth], got other memory",
                 function, names[i]);
        rows[i] = joined_heads(y);
        each[i] = (hb_linear4_item){items[i].w, items[i].bias, &rows[i]};
    }
    HB_TRY(hb_linear_4bit_group(context, x, 3, each, compute, error));
    for (int i = 0; i < 2; i++)
        HB_TRY(hb_rotate(context, items[i].y, cosine, sine, items[i].y, error));
    return HB_OK;
}

hb_status hb_attend_4bit(hb_context *context, const hb_view *q, const hb_view *k, const hb_view *v,
                         float scale, const hb_linear4_item *out, hb_compute compute,
                         const hb_view *y, hb_error *error)
{
    static const char function[] = "attend_4bit";
    HB_CHECK(error, q->ndim == 4 && q->shape[2] == 1, HB_ERR_VALUE,
             "%s: q, expected shape [batch, heads, 1, depth], got %d dimensions of %" PRId64
             " elements",
             function, q->ndim, hb_view_numel(q));
    hb_view attended = *q;
    attended.shape[1] = 1;
    attended.shape[2] = q->shape[1];
    attended = like_rows(&attended, q->shape[3], NULL);
    hb_scratch scratch = {0};
    unsigned char *memory;
    hb_scratch_reserve(&scratch, bytes_of(&attended));
    HB_TRY(hb_scratch_open(&scratch, context->scratch, NULL, 0, function, &memory, error));
    attended.data = memory;
    const hb_view rows = joined_heads(&attended);
    hb_status status = hb_attend(context, q, k, v, scale, &attended, error);
    if (status == HB_OK)
        status = hb_linear_4bit(context, &rows, out->w, out->bias, compute, y, NULL, error);
    hb_scratch_close(&scratch);
    return status;
}
