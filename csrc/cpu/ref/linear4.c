// Products with 4-bit weights in plain C: the meaning of every member of hb_linear4_set.
//
// Both sets keep x and panels in float32 (the bfloat16 set holds values that are bfloat16 numbers),
// x in plain order, and sum in double within a call: one rounding per dot, one per panel in a tile.
#include "core/kernels_linear4.h"
#include "cpu/linear4_entries.h"

enum {
    TILE_ROWS = 4,
    TILE_COLS = 16,
    PANEL_STEPS = 128,
    DOT_ROWS = 4,
    DOT_UNTIL = DOT_ROWS,
    ADD_UNTIL = 4
};

static inline float rounded_to_bf16(float value)
{
    return hb_f32_from_bf16(hb_bf16_from_f32(value));
}

static inline unsigned code_at(const hb_matrix4 *w, int64_t row, int64_t column)
{
    uint8_t byte = w->packed[row * w->row_bytes + column / 2];
    return column % 2 == 0 ? byte >> 4 : byte & 15;
}

static inline float scale_at(const hb_matrix4 *w, int64_t row, int64_t column)
{
    return w->absmax[row * w->absmax_stride + column / w->blocksize];
}

static void permute_x(const void *x, hb_dtype dtype, int64_t depth, bool bf16, float *permuted)
{
    int64_t padded = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    for (int64_t k = 0; k < padded; k++) {
        float value = k < depth ? hb_load_f32(x, k, dtype) : 0.0f;
        permuted[k] = bf16 ? rounded_to_bf16(value) : value;
    }
}

static void dot(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const float *permuted, int n_x,
                bool bf16, float *y, int64_t y_stride)
{
    float codebook[16];
    for (int i = 0; i < 16; i++)
        codebook[i] = bf16 ? rounded_to_bf16(w->codebook[i]) : w->codebook[i];
    int64_t padded = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    int64_t step = w->blocksize < depth ? w->blocksize : depth;
    for (int64_t r = 0; r < n_rows; r++) {
        double total[DOT_ROWS] = {0};
        for (int64_t first = 0; first < depth; first += step) {
            int64_t last = first + step < depth ? first + step : depth;
            double sum[DOT_ROWS] = {0};
            for (int64_t k = first; k < last; k++) {
                double value = codebook[code_at(w, r, k)];
                for (int t = 0; t < n_x; t++) sum[t] += value * permuted[t * padded + k];
            }
            double scale = scale_at(w, r, first);
            for (int t = 0; t < n_x; t++) total[t] += sum[t] * scale;
        }
        for (int t = 0; t < n_x; t++) y[t * y_stride + r] = (float)total[t];
    }
}

static int64_t packed_index(int64_t step, int t)
{
    int64_t block = step / HB_LINEAR4_X_BLOCK;
    return (block * TILE_ROWS + t) * HB_LINEAR4_X_BLOCK + step % HB_LINEAR4_X_BLOCK;
}

static void pack_x(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   bool bf16, float *packed)
{
    int64_t padded = hb_ceil_div(steps, HB_LINEAR4_X_BLOCK) * HB_LINEAR4_X_BLOCK;
    for (int64_t s = 0; s < padded; s++)
        for (int t = 0; t < TILE_ROWS; t++) {
            bool present = t < n_x && s < steps;
            float value = present ? hb_load_f32(x, t * x_stride + s, dtype) : 0.0f;
            packed[packed_index(s, t)] = bf16 ? rounded_to_bf16(value) : value;
        }
}

static void decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, bool bf16, float *panel)
{
    for (int64_t r = 0; r < TILE_COLS; r++)
        for (int64_t k = 0; k < depth; k++) {
            float value = 0.0f;
            if (r < n_rows) value = w->codebook[code_at(w, r, k)] * scale_at(w, r, k);
            panel[k * TILE_COLS + r] = bf16 ? rounded_to_bf16(value) : value;
        }
}

static void decode_cols(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, bool bf16,
                        float *panel)
{
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < TILE_COLS; c++) {
            float value = 0.0f;
            if (c < n_cols) value = w->codebook[code_at(w, r, c)] * scale_at(w, r, c);
            panel[r * TILE_COLS + c] = bf16 ? rounded_to_bf16(value) : value;
        }
}

static void add_rows(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, const float *packed,
                     int n_x, bool bf16, float *sums, int64_t sums_stride)
{
    for (int t = 0; t < n_x; t++)
        for (int64_t c = 0; c < n_cols; c++) {
            double sum = sums[t * sums_stride + c];
            for (int64_t r = 0; r < n_rows; r++) {
                float value = w->codebook[code_at(w, r, c)] * scale_at(w, r, c);
                if (bf16) value = rounded_to_bf16(value);
                sum += (double)packed[packed_index(r, t)] * value;
            }
            sums[t * sums_stride + c] = (float)sum;
        }
}

// ---- entries -----------------------------------------------------------------------------------

HB_LINEAR4_ENTRIES(f32, ref, false)
HB_LINEAR4_ENTRIES(bf16, ref, true)
HB_LINEAR4_ADD_ENTRY(f32, ref, false)
HB_LINEAR4_ADD_ENTRY(bf16, ref, true)

static void hb_linear4_tile_f32_ref(const void *packed, const void *panel, int64_t steps, int n_x,
                                    bool accumulate, float *sums)
{
    const float *x = packed, *w = panel;
    for (int t = 0; t < n_x; t++) {
        double sum[TILE_COLS] = {0};
        for (int64_t s = 0; s < steps; s++) {
            double value = x[packed_index(s, t)];
            for (int c = 0; c < TILE_COLS; c++) sum[c] += value * w[s * TILE_COLS + c];
        }
        for (int c = 0; c < TILE_COLS; c++) {
            float *target = &sums[t * TILE_COLS + c];
            *target = accumulate ? (float)(*target + sum[c]) : (float)sum[c];
        }
    }
}

static void hb_linear4_finish_ref(const float *sums, const float *bias, int64_t n, hb_dtype dtype,
                                  void *y)
{
    for (int64_t i = 0; i < n; i++)
        hb_store_f32(y, i, dtype, bias != NULL ? sums[i] + bias[i] : sums[i]);
}

void hb_linear4_table_ref(hb_kernels_linear4 *kernels)
{
    kernels->f32 = HB_LINEAR4_SET(f32, ref);
    kernels->bf16 = HB_LINEAR4_SET(bf16, ref);
    for (int c = 0; c < HB_LINEAR4_MAX_TILE_COLS; c++)
        kernels->bf16.column_order[c] = kernels->f32.column_order[c] = (uint8_t)c;
    kernels->bf16.columns_in_order = kernels->f32.columns_in_order = true;
    for (int c = 0; c < HB_LINEAR4_ADD_GROUP; c++)
        kernels->bf16.add_order[c] = kernels->f32.add_order[c] = (uint8_t)c;
    kernels->bf16.add_until = kernels->f32.add_until = ADD_UNTIL;
    kernels->f32.add_rows = hb_linear4_add_rows_f32_ref;
    kernels->bf16.add_rows = hb_linear4_add_rows_bf16_ref;
    kernels->finish = hb_linear4_finish_ref;
}
