// Weights of a 4-bit product: scales copied out, blocks for the kernels, panels. See linear4.h.
#include "core/linear4.h"

void hb_product4_expand_scales(const hb_product4 *p, int64_t row, int64_t n_rows, float *scales)
{
    const hb_tensor4 *w = p->w;
    const int64_t stride = w->depth / p->blocksize;
    if (p->blocksize == w->blocksize) { // rows follow one another in the stored scales too
        hb_expand_absmax(p->context, w, row * stride, n_rows * stride, scales);
        return;
    }
    for (int64_t r = 0; r < n_rows; r++, scales += stride) {
        const int64_t start = (row + r) * w->depth;
        const int64_t first = start / w->blocksize, last = (start + w->depth - 1) / w->blocksize;
        hb_expand_absmax(p->context, w, first, last - first + 1, scales);
        // Copied within the same array, from the end: a scale's source never lies behind its place.
        for (int64_t i = stride - 1; i >= 0; i--)
            scales[i] = scales[(start + i * p->blocksize) / w->blocksize - first];
    }
}

hb_matrix4 hb_product4_block(const hb_product4 *p, int64_t row, int64_t column, const float *scales)
{
    const hb_tensor4 *w = p->w;
    return (hb_matrix4){
        .packed = w->packed + (row * w->depth + column) / 2,
        .row_bytes = w->depth / 2,
        .blocksize = p->blocksize,
        .codebook = p->codebook,
        .rounded = p->rounded,
        .absmax = p->expand ? scales + column / p->blocksize
                            : w->absmax + (row * w->depth + column) / w->blocksize,
        .absmax_stride = w->depth / p->blocksize,
    };
}

// Any depth: weights of n_rows x n_cols from (row, column) into a panel, one by one.
static void decode_elements(const hb_product4 *p, int64_t row, int64_t n_rows, int64_t column,
                            int64_t n_cols, float *scales, unsigned char *panel)
{
    const hb_tensor4 *w = p->w;
    const hb_linear4_set *set = p->set;
    int64_t n_steps = hb_linear4_padded_steps(set, p->backward ? n_rows : n_cols);
    memset(panel, 0, (size_t)(n_steps * set->tile_cols * set->element_bytes));
    uint8_t place_of[HB_LINEAR4_MAX_TILE_COLS];
    for (int c = 0; c < set->tile_cols; c++) place_of[set->column_order[c]] = (uint8_t)c;
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t start = (row + r) * w->depth + column;
        int64_t first_block = start / w->blocksize;
        int64_t last_block = (start + n_cols - 1) / w->blocksize;
        hb_expand_absmax(p->context, w, first_block, last_block - first_block + 1, scales);
        for (int64_t c = 0; c < n_cols; c++) {
            int64_t i = start + c;
            unsigned code = i % 2 == 0 ? w->packed[i / 2] >> 4 : w->packed[i / 2] & 15u;
            float value = p->codebook[code] * scales[i / w->blocksize - first_block];
            int64_t step = hb_linear4_place(set, p->backward ? r : c);
            int64_t place = p->backward ? place_of[c] : r;
            int64_t at = (step / set->pair * set->tile_cols + place) * set->pair + step % set->pair;
            uint16_t half = hb_bf16_from_f32(value);
            if (set->element_bytes == 2)
                ((uint16_t *)panel)[at] = half;
            else
                ((float *)panel)[at] = p->bf16 ? hb_f32_from_bf16(half) : value;
        }
    }
}

void hb_product4_decode_panel(const hb_product4 *p, int64_t out, int64_t n_out, int64_t step,
                              int64_t n_steps, float *scales, int64_t scales_row,
                              unsigned char *panel)
{
    if (p->blocksize == 0) {
        if (p->backward)
            decode_elements(p, step, n_steps, out, n_out, scales, panel);
        else
            decode_elements(p, out, n_out, step, n_steps, scales, panel);
    } else if (p->backward) {
        if (p->expand) scales += (step - scales_row) * (p->outputs / p->blocksize);
        hb_matrix4 block = hb_product4_block(p, step, out, scales);
        p->set->decode_cols(&block, n_steps, n_out, panel);
    } else {
        hb_matrix4 block = hb_product4_block(p, out, step, scales);
        p->set->decode_rows(&block, n_out, n_steps, panel);
    }
}
