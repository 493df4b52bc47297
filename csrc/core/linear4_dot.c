// 4-bit products of a few rows of x: weights are decoded in registers and multiplied at once.
#include "core/linear4.h"

void hb_product4_store(const hb_product4 *p, int64_t m, int64_t begin, int64_t n, const float *sums)
{
    const float *bias = p->bias != NULL ? p->bias + begin : NULL;
    const hb_kernels_linear4 *kernels = &p->context->kernels.linear4;
    if (p->y_regular)
        kernels->finish(sums, bias, n, p->y.view->dtype,
                        hb_matrix_element(&p->y, m * p->y_stride + begin));
    else
        hb_matrix_finish(kernels, &p->y, m, begin, n, sums, bias);
}

static void dot_rows(const hb_product4 *p, const hb_matrix4 *block, int64_t row, int64_t n_rows,
                     float *sums)
{
    const hb_linear4_set *set = p->set;
    for (int64_t m = 0; m < p->m_count; m += set->dot_rows) {
        int n_x = (int)hb_least(set->dot_rows, p->m_count - m);
        set->dot(block, n_rows, p->steps, p->packed + m * p->packed_stride, n_x, sums,
                 HB_LINEAR4_DOT_CHUNK_ROWS);
        for (int t = 0; t < n_x; t++)
            hb_product4_store(p, p->m_begin + m + t, row, n_rows,
                              sums + t * HB_LINEAR4_DOT_CHUNK_ROWS);
    }
}

void hb_product4_dot_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    float *sums = (float *)(scratch + p->sums_at);
    float *scales = (float *)(scratch + p->scales_at);
    int64_t row_end = hb_least(end * HB_LINEAR4_DOT_CHUNK_ROWS, p->outputs);
    int64_t at_once = p->expand ? HB_LINEAR4_DOT_SCALE_ROWS : HB_LINEAR4_DOT_CHUNK_ROWS;
    for (int64_t row = begin * HB_LINEAR4_DOT_CHUNK_ROWS; row < row_end; row += at_once) {
        int64_t n_rows = hb_least(at_once, row_end - row);
        if (p->expand) hb_product4_expand_scales(p, row, n_rows, scales);
        hb_matrix4 block = hb_product4_block(p, row, 0, scales);
        dot_rows(p, &block, row, n_rows, sums);
    }
}

void hb_product4_permute_rows(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    (void)lane;
    const int64_t bytes = (int64_t)hb_dtype_bytes(p->x.view->dtype);
    for (int64_t m = begin; m < end; m++) {
        unsigned char *target = p->gathered == NULL ? NULL : p->gathered + m * p->steps * bytes;
        int64_t stride;
        const void *row = hb_matrix_rows(&p->x, p->m_begin + m, 1, target, &stride);
        p->set->permute_x(row, p->x.view->dtype, p->steps, p->packed + m * p->packed_stride);
    }
}
