// Products with 4-bit weights in integers, in plain C: kernels_linear4.h has the definition, which
// this follows word by word; every other ISA gives the same bits.
//
// Permuted x: the codes in plain order, then a scale for every 64 columns. Packed x, for each 64
// steps: [tile_rows][64] codes, [tile_rows] scales. Panels: [tile_cols][64] codes, [tile_cols]
// scales.
#include "core/kernels_linear4.h"

#include <math.h>

enum { CHUNK = 64, TOTALS = 16, DOT_ROWS = 4, TILE_ROWS = 4, TILE_COLS = 16, PANEL_STEPS = 128 };

// What differs between the two sets.
typedef struct {
    int limit;
    float unit; // what a step is stored in
} kind;

static const kind kind_of_i16 = {HB_INT16_LIMIT, 0x1p-14f};
static const kind kind_of_i8 = {HB_INT8_LIMIT, 0x1p-7f};

static inline unsigned code_at(const hb_matrix4 *w, int64_t row, int64_t column)
{
    uint8_t byte = w->packed[row * w->row_bytes + column / 2];
    return column % 2 == 0 ? byte >> 4 : byte & 15;
}

static inline float scale_at(const hb_matrix4 *w, int64_t row, int64_t column)
{
    return w->absmax[row * w->absmax_stride + column / w->blocksize];
}

// n <= 64 elements of x from `at`; returns the stored scale and fills all 64 codes.
static float quantize_chunk(kind k, const void *x, hb_dtype dtype, int64_t at, int64_t n,
                            int16_t *codes)
{
    float value[CHUNK] = {0}, largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < n; i++) {
        value[i] = hb_load_f32(x, at + i, dtype);
        finite = finite && fabsf(value[i]) <= 0x1.fffffep127f;
        largest = fmaxf(largest, fabsf(value[i]));
    }
    memset(codes, 0, CHUNK * sizeof *codes);
    if (!finite) return NAN;
    float step = fmaxf(largest / (float)k.limit, 0x1p-112f), inverse = 1.0f / step;
    for (int64_t i = 0; i < n; i++) codes[i] = (int16_t)rintf(value[i] * inverse);
    return step * k.unit;
}

static int64_t padded_of(int64_t depth)
{
    return hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
}

static void permute_x(kind k, const void *x, hb_dtype dtype, int64_t depth, void *permuted)
{
    const int64_t padded = padded_of(depth);
    const bool wide = k.limit > HB_INT8_LIMIT;
    float *scales = (float *)((char *)permuted + padded * (wide ? 2 : 1));
    for (int64_t c = 0; c < padded; c += CHUNK) {
        int16_t codes[CHUNK];
        int64_t n = depth - c < 0 ? 0 : depth - c < CHUNK ? depth - c : CHUNK;
        scales[c / CHUNK] = quantize_chunk(k, x, dtype, c, n, codes);
        for (int64_t i = 0; i < CHUNK; i++)
            if (wide)
                ((int16_t *)permuted)[c + i] = codes[i];
            else
                ((int8_t *)permuted)[c + i] = (int8_t)codes[i];
    }
}

// Which of a chunk's eight totals a column counts towards.
static int total_of(kind k, int64_t column)
{
    if (k.limit == HB_INT8_LIMIT) return (int)(column % CHUNK / 8);
    return (int)(column % CHUNK / 32 * 4 + column % 16 / 4);
}

static float dot_one(kind k, const hb_matrix4 *w, int64_t row, int64_t depth, const char *permuted)
{
    const bool wide = k.limit > HB_INT8_LIMIT;
    const int16_t *codes16 = (const void *)permuted;
    const int8_t *codes8 = (const void *)permuted;
    const float *scales = (const float *)(permuted + padded_of(depth) * (wide ? 2 : 1));
    float total[TOTALS] = {0};
    for (int64_t c = 0; c < depth; c += CHUNK) {
        int32_t sum[8] = {0};
        float scale[8] = {0};
        for (int64_t i = c; i < c + CHUNK && i < depth; i++) {
            int32_t x = wide ? codes16[i] : codes8[i];
            sum[total_of(k, i)] += w->rounded->code[code_at(w, row, i)] * x;
            scale[total_of(k, i)] = scale_at(w, row, i) * scales[c / CHUNK];
        }
        float *t = total + c / CHUNK % 2 * 8;
        for (int i = 0; i < 8; i++) t[i] = fmaf((float)sum[i], scale[i], t[i]);
    }
    for (int n = TOTALS / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) total[i] += total[i + n];
    return total[0] * (w->rounded->step / k.unit);
}

static void dot(kind k, const hb_matrix4 *w, int64_t n_rows, int64_t depth, const void *permuted,
                int n_x, int64_t x_bytes, float *y, int64_t y_stride)
{
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < n_rows; r++)
            y[t * y_stride + r] =
                dot_one(k, w, r, depth, (const char *)permuted + (int64_t)t * x_bytes);
}

// ---- entries ------------------------------------------------------------------------------------

#define ENTRIES(set)                                                                               \
    static hb_linear4_set set_of_##set(void);                                                      \
    static void hb_linear4_permute_x_##set##_ref(const void *x, hb_dtype dtype, int64_t depth,     \
                                                 void *permuted)                                   \
    {                                                                                              \
        permute_x(kind_of_##set, x, dtype, depth, permuted);                                       \
    }                                                                                              \
    static void hb_linear4_dot_##set##_ref(const hb_matrix4 *w, int64_t n_rows, int64_t depth,     \
                                           const void *permuted, int n_x, float *y,                \
                                           int64_t y_stride)                                       \
    {                                                                                              \
        const hb_linear4_set this_set = set_of_##set();                                            \
        dot(kind_of_##set, w, n_rows, depth, permuted, n_x,                                        \
            hb_linear4_permuted_bytes(&this_set, depth), y, y_stride);                             \
    }

ENTRIES(i16)
ENTRIES(i8)

static hb_linear4_set set_of_i16(void)
{
    return (hb_linear4_set){.dot_rows = DOT_ROWS,
                            .dot_until = DOT_ROWS,
                            .tile_rows = 1,
                            .tile_cols = 1,
                            .pair = 1,
                            .x_block = 1,
                            .element_bytes = sizeof(int16_t),
                            .dot_extra = sizeof(float),
                            .permute_x = hb_linear4_permute_x_i16_ref,
                            .dot = hb_linear4_dot_i16_ref};
}

// ---- panels, int8 -------------------------------------------------------------------------------

enum { X_BYTES = TILE_ROWS * (CHUNK + 4), PANEL_BYTES = TILE_COLS * (CHUNK + 4) };

static void hb_linear4_pack_x_i8_ref(const void *x, hb_dtype dtype, int64_t x_stride, int n_x,
                                     int64_t steps, void *packed)
{
    for (int64_t s = 0; s < steps; s += CHUNK) {
        int8_t *codes = (int8_t *)packed + s / CHUNK * X_BYTES;
        float *scales = (float *)(codes + TILE_ROWS * CHUNK);
        for (int t = 0; t < TILE_ROWS; t++) {
            int16_t wide[CHUNK];
            int64_t n = t < n_x ? (steps - s < CHUNK ? steps - s : CHUNK) : 0;
            scales[t] = quantize_chunk(kind_of_i8, x, dtype, t * x_stride + s, n, wide);
            for (int i = 0; i < CHUNK; i++) codes[t * CHUNK + i] = (int8_t)wide[i];
        }
    }
}

static void hb_linear4_decode_rows_i8_ref(const hb_matrix4 *w, int64_t n_rows, int64_t depth,
                                          void *panel)
{
    for (int64_t k = 0; k < depth; k += CHUNK) {
        int8_t *codes = (int8_t *)panel + k / CHUNK * PANEL_BYTES;
        float *scales = (float *)(codes + TILE_COLS * CHUNK);
        for (int64_t r = 0; r < TILE_COLS; r++) {
            scales[r] = r < n_rows ? scale_at(w, r, k) : 0.0f;
            for (int64_t i = 0; i < CHUNK; i++)
                codes[r * CHUNK + i] =
                    r < n_rows ? (int8_t)w->rounded->code[code_at(w, r, k + i)] : 0;
        }
    }
}

static void hb_linear4_tile_i8_ref(const void *packed, const void *panel, int64_t steps, int n_x,
                                   bool accumulate, float *sums)
{
    for (int t = 0; t < n_x; t++)
        for (int r = 0; r < TILE_COLS; r++) {
            float total = accumulate ? sums[t * TILE_COLS + r] : 0.0f;
            for (int64_t c = 0; c < hb_ceil_div(steps, CHUNK); c++) {
                const int8_t *x = (const int8_t *)packed + c * X_BYTES;
                const int8_t *w = (const int8_t *)panel + c * PANEL_BYTES;
                float x_scale = ((const float *)(x + TILE_ROWS * CHUNK))[t];
                float w_scale = ((const float *)(w + TILE_COLS * CHUNK))[r];
                int32_t sum = 0;
                for (int i = 0; i < CHUNK; i++) sum += x[t * CHUNK + i] * w[r * CHUNK + i];
                total = fmaf((float)sum, w_scale * x_scale, total);
            }
            sums[t * TILE_COLS + r] = total;
        }
}

static hb_linear4_set set_of_i8(void)
{
    return (hb_linear4_set){.dot_rows = DOT_ROWS,
                            .dot_until = DOT_ROWS,
                            .tile_rows = TILE_ROWS,
                            .tile_cols = TILE_COLS,
                            .panel_steps = PANEL_STEPS,
                            .pair = 1,
                            .x_block = 1,
                            .element_bytes = sizeof(int8_t),
                            .dot_extra = sizeof(float),
                            .x_extra = sizeof(float),
                            .panel_extra = sizeof(float),
                            .permute_x = hb_linear4_permute_x_i8_ref,
                            .dot = hb_linear4_dot_i8_ref,
                            .pack_x = hb_linear4_pack_x_i8_ref,
                            .decode_rows = hb_linear4_decode_rows_i8_ref,
                            .tile = hb_linear4_tile_i8_ref};
}

void hb_linear4_int_table_ref(hb_kernels_linear4 *kernels)
{
    kernels->i16 = set_of_i16();
    kernels->i8 = set_of_i8();
}
