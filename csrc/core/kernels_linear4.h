// Kernels of y = x W^T and dx = dy W with a 4-bit W (any 16-entry codebook with block scales).
//
// Two ways to multiply. "dot", for a few rows of x: decode weights in registers, multiply at once,
// x brought once per call into the order in which the decoder yields weights. "panel", for many:
// decode a block of weights to a small panel, multiply it with all rows of x by a register tile.
// linear_4bit.c chooses, splits and stores; kernels never see strides of x or y, ends of rows that
// are no multiple of 32, or nested scales.
//
// A set's functions belong together: the layout of permuted x is known only inside the set. An ISA
// replaces a whole set, or copies the set below and replaces some functions where layouts agree.
//
//                      float32 set                    bfloat16 set
//   x                  float32, exact                 rounded to bfloat16 (nearest even)
//   weight in dot      code * sum, scaled by absmax   code rounded to bfloat16, the rest float32
//   weight in panels   float32(code * absmax)         the same, rounded to bfloat16
//   sums               float32                        float32
//
// Accuracy of the float32 set, u = 2^-24, |err| <= c u sum_k |w[k]| |x[k]|:
//   dot     c = depth/128 + 14: in each lane 8 products of a group of 128 (8 roundings), its scale
//   (1),
//           the groups (depth/128), the sum of up to 16 lanes (4), one to spare for second order
//   panel   c = panel_steps + depth/panel_steps + 3: the weight (1), the steps of a panel summed
//   from
//           zero, then one addition per panel, one to spare
// The bfloat16 set adds, per product, the roundings of x and of the weight (2^-8 each at most; a
// set on hardware dot products may also flush subnormals). Infinities and NaN in x, or in the
// absmax of a nonzero weight, make y non-finite. Panels, tiles and packed x are 64-byte aligned;
// everything else has its element's alignment.
#ifndef HB_CORE_KERNELS_LINEAR4_H
#define HB_CORE_KERNELS_LINEAR4_H

#include "core/formats.h"

// A block of rows and columns of a 4-bit matrix whose blocks do not straddle rows.
typedef struct {
    const uint8_t *packed; // first byte; even column in the high nibble
    int64_t row_bytes;     // from one row to the next
    const float *absmax;   // scale of the block that holds the first column
    int64_t absmax_stride; // floats from one row's scales to the next
    int64_t blocksize;     // power of two >= 32; column c of this block has scale [c / blocksize]
    const float *codebook; // [16] float32, 64-byte aligned
} hb_matrix4;

#define HB_LINEAR4_MAX_TILE_ROWS 32
#define HB_LINEAR4_MAX_TILE_COLS 64
#define HB_LINEAR4_X_GROUP       128 // permuted x is padded with zeros to a multiple of this
#define HB_LINEAR4_X_BLOCK       16  // what most sets have as x_block

typedef struct {
    int32_t dot_rows;    // rows of x that one call of dot takes at most
    int32_t dot_until;   // rows of x up to which dot beats the panel
    int32_t tile_rows;   // rows of x in a tile, <= HB_LINEAR4_MAX_TILE_ROWS
    int32_t tile_cols;   // columns of a panel: 16, 32 or 64
    int32_t panel_steps; // values of the summed index per panel: a power of two, 128..1024
    int32_t pair; // consecutive values of the summed index kept together: 1, or 2 for bfloat16
    int32_t element_bytes; // of permuted x, packed x and panels: 4 float32, 2 bfloat16
    int32_t x_block;       // packed x keeps so many steps of a row together: 16 or 32
    // Column of W, counted from the panel's first, at each place of a decode_cols panel.
    uint8_t column_order[HB_LINEAR4_MAX_TILE_COLS];
    bool columns_in_order; // column_order[c] == c for all c

    // x [depth] of dtype (float32, bfloat16, float16) -> permuted [depth rounded up to X_GROUP].
    void (*permute_x)(const void *x, hb_dtype dtype, int64_t depth, void *permuted);
    // y[t * y_stride + r] = sum_k w[r, k] x[t, k] for r < n_rows, t < n_x (1..dot_rows). depth is a
    // multiple of 32. Row t of permuted x begins depth (rounded up to X_GROUP) elements after t
    // - 1. Each y has the same bits whatever n_rows; it may depend on n_x.
    void (*dot)(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const void *permuted, int n_x,
                float *y, int64_t y_stride);
    // One tile of x: n_x (1..tile_rows) rows at x + t * x_stride elements of dtype ->
    // packed[ceil(steps / x_block)][tile_rows][x_block], zeros where there is no row or step.
    void (*pack_x)(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   void *packed);
    // Forward panel: rows r < n_rows (<= tile_cols) of w, columns k < depth (a multiple of 32, at
    // most panel_steps) -> panel[depth / pair][tile_cols][pair], summed over k; any
    // values at r >= n_rows.
    void (*decode_rows)(const hb_matrix4 *w, int64_t n_rows, int64_t depth, void *panel);
    // Backward panel: rows r < n_rows (<= panel_steps), columns c < n_cols (a multiple of 16, at
    // most tile_cols) -> panel[ceil(n_rows / pair)][tile_cols][pair], summed over r, columns in
    // column_order; any values at c >= n_cols, zeros at an r that completes a pair.
    void (*decode_cols)(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, void *panel);
    // sums[t * tile_cols + c] (+)= sum_s packed x[t][s] * panel[s][c] for t < n_x (1..tile_rows),
    // over steps (counted before pairing, odd allowed); adds when `accumulate`, else overwrites.
    // Each sum has the same bits whatever n_x. A set with `begin` has tiles multiplied between
    // begin() and end(), on one thread, which does nothing else of the set meanwhile.
    void (*tile)(const void *packed, const void *panel, int64_t steps, int n_x, bool accumulate,
                 float *sums);
    void (*begin)(
        void); // NULL, both of them, where tiles leave no state behind; the float32 set: always
    void (*end)(void);
} hb_linear4_set;

typedef struct {
    hb_linear4_set f32, bf16;
    // y[i] = round_to_dtype(sums[i] + bias[i]) for i < n; bias float32 or NULL. sums 64-byte
    // aligned.
    void (*finish)(const float *sums, const float *bias, int64_t n, hb_dtype dtype, void *y);
} hb_kernels_linear4;

// Each fills the members that its ISA does better. Called from that folder's table.c.
void hb_linear4_table_ref(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx2(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx512(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx512bf16(hb_kernels_linear4 *kernels);
void hb_linear4_table_amx(hb_kernels_linear4 *kernels);
void hb_linear4_table_neon(hb_kernels_linear4 *kernels);

#endif
