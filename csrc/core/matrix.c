#include "core/matrix.h"

#include <inttypes.h>

hb_matrix hb_matrix_of(const hb_view *view)
{
    int last = view->ndim - 1;
    hb_matrix m = {
        .view = view, .rows = 1, .cols = view->shape[last], .col_stride = view->stride[last]};
    for (int d = 0; d < last; d++) m.rows *= view->shape[d];
    if (m.cols == 1) m.col_stride = 1;
    return m;
}

int64_t hb_matrix_row_offset(const hb_matrix *m, int64_t row)
{
    int64_t offset = 0;
    for (int d = m->view->ndim - 2; d >= 0; d--) {
        int64_t size = m->view->shape[d];
        offset += row % size * m->view->stride[d];
        row /= size;
    }
    return offset;
}

unsigned char *hb_matrix_element(const hb_matrix *m, int64_t offset)
{
    return (unsigned char *)m->view->data + offset * (int64_t)hb_dtype_bytes(m->view->dtype);
}

// Whether the dimensions before the last are those of one contiguous dimension, cut up.
static bool rows_are_one_dimension(const hb_view *view)
{
    int inner = view->ndim - 2;
    for (int d = inner - 1; d >= 0; d--) {
        if (view->shape[d] == 1) continue;
        if (view->shape[inner] != 1 && view->stride[d] != view->shape[inner] * view->stride[inner])
            return false;
        inner = d;
    }
    return true;
}

bool hb_matrix_rows_are_regular(const hb_matrix *m, int64_t begin, int64_t n, int64_t *stride)
{
    *stride = n > 1 ? hb_matrix_row_offset(m, begin + 1) - hb_matrix_row_offset(m, begin) : m->cols;
    if (m->col_stride != 1) return false;
    if (m->view->ndim <= 2 || rows_are_one_dimension(m->view)) return true;
    for (int64_t i = 2; i < n; i++)
        if (hb_matrix_row_offset(m, begin + i) - hb_matrix_row_offset(m, begin + i - 1) != *stride)
            return false;
    return true;
}

void hb_matrix_gather_row(const hb_matrix *m, int64_t row, void *target)
{
    int64_t offset = hb_matrix_row_offset(m, row);
    if (hb_dtype_bytes(m->view->dtype) == 4) {
        for (int64_t i = 0; i < m->cols; i++)
            ((uint32_t *)target)[i] =
                *(const uint32_t *)hb_matrix_element(m, offset + i * m->col_stride);
    } else {
        for (int64_t i = 0; i < m->cols; i++)
            ((uint16_t *)target)[i] =
                *(const uint16_t *)hb_matrix_element(m, offset + i * m->col_stride);
    }
}

const void *hb_matrix_rows(const hb_matrix *m, int64_t begin, int64_t n, void *target,
                           int64_t *stride)
{
    if (hb_matrix_rows_are_regular(m, begin, n, stride))
        return hb_matrix_element(m, hb_matrix_row_offset(m, begin));
    *stride = m->cols;
    const int64_t row_bytes = m->cols * (int64_t)hb_dtype_bytes(m->view->dtype);
    for (int64_t i = 0; i < n; i++)
        hb_matrix_gather_row(m, begin + i, (unsigned char *)target + i * row_bytes);
    return target;
}

void hb_matrix_finish(const hb_kernels_linear4 *kernels, const hb_matrix *y, int64_t row,
                      int64_t begin, int64_t n, const float *sums, const float *bias)
{
    const hb_dtype dtype = y->view->dtype;
    const int64_t offset = hb_matrix_row_offset(y, row) + begin * y->col_stride;
    if (y->col_stride == 1) {
        kernels->finish(sums, bias, n, dtype, hb_matrix_element(y, offset));
        return;
    }
    _Alignas(64) float dense[HB_LINEAR4_MAX_TILE_COLS];
    kernels->finish(sums, bias, n, dtype, dense);
    const size_t bytes = hb_dtype_bytes(dtype);
    for (int64_t i = 0; i < n; i++)
        memcpy(hb_matrix_element(y, offset + i * y->col_stride),
               (unsigned char *)dense + (size_t)i * bytes, bytes);
}

hb_status hb_matrix_check_view(const hb_view *view, const char *function, const char *name,
                               hb_error *error)
{
    HB_CHECK(error, view->device.type == HB_CPU || view->device.type == HB_CUDA, HB_ERR_DEVICE,
             "%s: %s, expected memory of the CPU or CUDA, got device type %d", function, name,
             (int)view->device.type);
    HB_CHECK(error, view->device.type == HB_CPU || hb_view_is_contiguous(view), HB_ERR_VALUE,
             "%s: %s, expected contiguous memory on CUDA, got strides", function, name);
    HB_CHECK(error, hb_dtype_is_io(view->dtype), HB_ERR_TYPE,
             "%s: %s, expected float32, bfloat16 or float16, got %s", function, name,
             hb_dtype_name(view->dtype));
    HB_CHECK(error, view->ndim >= 1, HB_ERR_VALUE,
             "%s: %s, expected at least one dimension, got none", function, name);
    return HB_OK;
}

hb_status hb_matrix_check_rows(const hb_view *view, hb_dtype dtype, const char *function,
                               const char *name, hb_error *error)
{
    HB_TRY(hb_matrix_check_view(view, function, name, error));
    HB_CHECK(error, view->device.type == HB_CPU, HB_ERR_DEVICE,
             "%s: %s, expected memory of the CPU, got CUDA", function, name);
    HB_CHECK(error, view->dtype == dtype, HB_ERR_TYPE, "%s: %s, expected %s, got %s", function,
             name, hb_dtype_name(dtype), hb_dtype_name(view->dtype));
    const int last = view->ndim - 1;
    HB_CHECK(error, view->stride[last] == 1 || view->shape[last] <= 1 || hb_view_numel(view) == 0,
             HB_ERR_VALUE, "%s: %s, expected contiguous rows, got a stride of %" PRId64, function,
             name, view->stride[last]);
    return HB_OK;
}

hb_status hb_matrix_check_views(const hb_view *x, int64_t x_cols, const char *x_name,
                                const char *x_size, const hb_view *y, int64_t y_cols,
                                const char *y_name, const char *y_size, const char *function,
                                hb_error *error)
{
    HB_TRY(hb_matrix_check_view(x, function, x_name, error));
    HB_TRY(hb_matrix_check_view(y, function, y_name, error));
    HB_CHECK(error, hb_device_is_same(x->device, y->device), HB_ERR_DEVICE,
             "%s: %s, expected the device of %s, got another", function, y_name, x_name);
    HB_CHECK(error, !y->readonly, HB_ERR_BUFFER, "%s: %s, expected writable memory, got read-only",
             function, y_name);
    HB_CHECK(error, x->shape[x->ndim - 1] == x_cols, HB_ERR_VALUE,
             "%s: %s has %s %" PRId64 ", weight has %" PRId64, function, x_name, x_size,
             x->shape[x->ndim - 1], x_cols);
    HB_CHECK(error, y->shape[y->ndim - 1] == y_cols, HB_ERR_VALUE,
             "%s: %s has %s %" PRId64 ", weight has %" PRId64, function, y_name, y_size,
             y->shape[y->ndim - 1], y_cols);
    HB_CHECK(error, x->ndim == y->ndim, HB_ERR_VALUE,
             "%s: %s, expected %d dimensions like %s, got %d", function, y_name, x->ndim, x_name,
             y->ndim);
    for (int d = 0; d < x->ndim - 1; d++)
        HB_CHECK(error, x->shape[d] == y->shape[d], HB_ERR_VALUE,
                 "%s: %s, expected size %" PRId64 " in dimension %d like %s, got %" PRId64,
                 function, y_name, x->shape[d], d, x_name, y->shape[d]);
    return HB_OK;
}

hb_status hb_matrix_check_bias(const hb_view *bias, int64_t n, const char *function,
                               hb_error *error)
{
    HB_TRY(hb_matrix_check_view(bias, function, "bias", error));
    HB_CHECK(error, bias->ndim == 1 && bias->shape[0] == n, HB_ERR_VALUE,
             "%s: bias, expected shape [%" PRId64 "], got %d dimensions of %" PRId64 " elements",
             function, n, bias->ndim, hb_view_numel(bias));
    return HB_OK;
}

bool hb_matrix_bias_is_plain(const hb_view *bias)
{
    return bias->dtype == HB_F32 && (bias->stride[0] == 1 || bias->shape[0] <= 1);
}

void hb_matrix_copy_bias(const hb_view *bias, float *target)
{
    for (int64_t i = 0; i < bias->shape[0]; i++)
        target[i] = hb_load_f32(bias->data, i * bias->stride[0], bias->dtype);
}
