// The functions that the table of products with 4-bit weights points at, over the inline functions
// which each ISA's linear4.c (linear4_int.h) defines under the names permute_x, dot, pack_x,
// decode_rows, decode_cols and tile. Whether x and W are rounded to bfloat16, and tile's number of
// rows of x, are constants in each call.
#ifndef HB_CPU_LINEAR4_ENTRIES_H
#define HB_CPU_LINEAR4_ENTRIES_H

#include "core/kernels_linear4.h"

// set: f32, bf16, i16 or i8; how: the argument of permute_x and dot that tells them apart.
#define HB_LINEAR4_DOT_ENTRIES(set, isa, how)                                                      \
    static void hb_linear4_permute_x_##set##_##isa(const void *x, hb_dtype dtype, int64_t depth,   \
                                                   void *permuted)                                 \
    {                                                                                              \
        permute_x(x, dtype, depth, how, permuted);                                                 \
    }                                                                                              \
    static void hb_linear4_dot_##set##_##isa(const hb_matrix4 *w, int64_t n_rows, int64_t depth,   \
                                             const void *permuted, int n_x, float *y,              \
                                             int64_t y_stride)                                     \
    {                                                                                              \
        dot(w, n_rows, depth, permuted, n_x, how, y, y_stride);                                    \
    }

#define HB_LINEAR4_ENTRIES(set, isa, bf16)                                                         \
    HB_LINEAR4_DOT_ENTRIES(set, isa, bf16)                                                         \
    static void hb_linear4_pack_x_##set##_##isa(const void *x, hb_dtype dtype, int64_t x_stride,   \
                                                int n_x, int64_t steps, void *packed)              \
    {                                                                                              \
        pack_x(x, dtype, x_stride, n_x, steps, bf16, packed);                                      \
    }                                                                                              \
    static void hb_linear4_decode_rows_##set##_##isa(const hb_matrix4 *w, int64_t n_rows,          \
                                                     int64_t depth, void *panel)                   \
    {                                                                                              \
        decode_rows(w, n_rows, depth, bf16, panel);                                                \
    }                                                                                              \
    static void hb_linear4_decode_cols_##set##_##isa(const hb_matrix4 *w, int64_t n_rows,          \
                                                     int64_t n_cols, void *panel)                  \
    {                                                                                              \
        decode_cols(w, n_rows, n_cols, bf16, panel);                                               \
    }

// For ADD_UNTIL == 4, over an inline add_rows that takes n_x as a constant.
#define HB_LINEAR4_ADD_ENTRY(set, isa, bf16)                                                       \
    static void hb_linear4_add_rows_##set##_##isa(const hb_matrix4 *w, int64_t n_rows,             \
                                                  int64_t n_cols, const void *packed, int n_x,     \
                                                  float *sums, int64_t sums_stride)                \
    {                                                                                              \
        switch (n_x) {                                                                             \
        case 1: add_rows(w, n_rows, n_cols, packed, 1, bf16, sums, sums_stride); break;            \
        case 2: add_rows(w, n_rows, n_cols, packed, 2, bf16, sums, sums_stride); break;            \
        case 3: add_rows(w, n_rows, n_cols, packed, 3, bf16, sums, sums_stride); break;            \
        default: add_rows(w, n_rows, n_cols, packed, 4, bf16, sums, sums_stride); break;           \
        }                                                                                          \
    }

// For TILE_ROWS == 6.
#define HB_LINEAR4_TILE(set, isa)                                                                  \
    static void hb_linear4_tile_##set##_##isa(const void *packed, const void *panel,               \
                                              int64_t steps, int n_x, bool accumulate,             \
                                              float *sums)                                         \
    {                                                                                              \
        switch (n_x) {                                                                             \
        case 1: tile(packed, panel, steps, accumulate, sums, 1); break;                            \
        case 2: tile(packed, panel, steps, accumulate, sums, 2); break;                            \
        case 3: tile(packed, panel, steps, accumulate, sums, 3); break;                            \
        case 4: tile(packed, panel, steps, accumulate, sums, 4); break;                            \
        case 5: tile(packed, panel, steps, accumulate, sums, 5); break;                            \
        default: tile(packed, panel, steps, accumulate, sums, 6); break;                           \
        }                                                                                          \
    }

// A set of float32 panels, but for its order of columns; tile is the float32 one of the ISA.
#define HB_LINEAR4_SET(set, isa)                                                                   \
    (hb_linear4_set)                                                                               \
    {                                                                                              \
        .dot_rows = DOT_ROWS, .dot_until = DOT_UNTIL, .tile_rows = TILE_ROWS,                      \
        .tile_cols = TILE_COLS, .panel_steps = PANEL_STEPS, .pair = 1,                             \
        .element_bytes = sizeof(float), .x_block = HB_LINEAR4_X_BLOCK,                             \
        .permute_x = hb_linear4_permute_x_##set##_##isa, .dot = hb_linear4_dot_##set##_##isa,      \
        .pack_x = hb_linear4_pack_x_##set##_##isa,                                                 \
        .decode_rows = hb_linear4_decode_rows_##set##_##isa,                                       \
        .decode_cols = hb_linear4_decode_cols_##set##_##isa, .tile = hb_linear4_tile_f32_##isa,    \
    }

#endif
