// Kernels of y = x W^T and dx = dy W with a 4-bit W (any 16-entry codebook with block scales).
//
// Three ways to multiply. "dot", y for a few rows of x: decode weights in registers, multiply at
// once, x brought once per call into the order in which the decoder yields weights. "add", dx for a
// few rows of dy: the same lookup walks W by rows, as it lies, and adds dy[r] w[r, k] to sums of
// the columns, which stay in the L1 cache in the order of the lookup. "panel", for many rows:
// decode a block of weights to a small panel, multiply it with all rows of x by a register tile.
// linear_4bit.c chooses, linear4_*.c split and store; kernels never see strides of x or y, ends of
// rows that are no multiple of 32, or nested scales.
//
// A set's functions belong together: the layout of permuted x is known only inside the set. An ISA
// replaces a whole set, or copies the set below and replaces some functions where layouts agree.
//
//                      float32 set                    bfloat16 set
//   x                  float32, exact                 rounded to bfloat16 (nearest even)
//   weight in dot      code * sum, scaled by absmax   code rounded to bfloat16, the rest float32
//   weight in add and  float32(code * absmax)         the same, rounded to bfloat16
//   in panels
//   sums               float32                        float32
//
// Accuracy of the float32 set, u = 2^-24, |err| <= c u sum_k |w[k]| |x[k]|:
//   dot     c = depth/128 + 22: in each lane up to 16 products (16 roundings), their scale (1), the
//           groups of 128 or 256 columns and parts of the columns (depth/128), the sum of up to 16
//           lanes (4), one to spare for second order
//   panel   c = panel_steps + depth/panel_steps + 3: the weight (1), the steps of a panel summed
//   from
//           zero, then one addition per panel, one to spare
//   add     the same c: every panel_steps rows a column's sum begins at zero, a row of W adds one
//           rounding (fused multiply-add), the sums of so many rows are then added to a total
// The bfloat16 set adds, per product, the roundings of x and of the weight (2^-8 each at
// most; a set on hardware dot products may also flush subnormals; on tile registers panels have c =
// depth/32 + 18). Infinities and NaN in x, or in the absmax of a nonzero weight, make y non-finite.
// Panels, tiles and packed x are 64-byte aligned; everything else has its element's alignment.
//
// The integer sets (opt-in) quantize x and the codebook; limit L = 16383 (int16) or 127 (int8):
//   x step  s = max(amax / L, 2^-112) for every 64 columns of a row of x, amax the largest
//   magnitude
//           there; x ~ q s with q = rint(x (1/s)), so |x - q s| <= 0.502 s. Stored is s 2^-14 or
//           s 2^-7, which keeps sums below |y|. NaN if one of the 64 is not finite: y is NaN then.
//   weight  ~ absmax * code * step of hb_codebook_round.
//   dot     Sixteen float32 totals per y, each over 8 columns of every 128, exact int32 sums of
//           which (columns of lane i in a chunk of 64, int8: 8i..8i+7; int16: 4i..4i+3 and 16 more
//           for i < 4, 32 more for i >= 4; the totals of even chunks come first) are added as
//           fma((float)sum, absmax * (stored s), total), in order. The totals t are added as
//           t[i] + t[i+8], + 4, + 2, + 1; the result times step 2^14 (2^7).
//   panel   (int8, blocksize >= 64 and even in 64s) one total per y, each 64 columns added as
//           fma((float)sum, absmax * (stored s), total); the result times step 2^7 by `unscale`.
// Every operation is exact or rounded once in this order: all ISAs give the same bits.
// |err| <= sum absmax (|c| |x - q s| + |c - code step| |q s|) + (depth/128 + 10) u sum |w| |q s| in
// dot, depth/64 + 5 in panels, as long as absmax times amax is a finite float32 and above 2^-126.
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
    const hb_codebook_int *rounded; // for the integer sets: the same in integers of their size
} hb_matrix4;

#define HB_LINEAR4_MAX_TILE_ROWS 32
#define HB_LINEAR4_MAX_TILE_COLS 64
#define HB_LINEAR4_X_GROUP       128 // permuted x is padded with zeros to a multiple of this
#define HB_LINEAR4_X_BLOCK       16  // what most sets have as x_block
#define HB_LINEAR4_ADD_GROUP     64  // columns that add_rows keeps together

typedef struct {
    int32_t dot_rows;      // rows of x that one call of dot takes at most
    int32_t dot_until;     // rows of x up to which dot beats the panel
    int32_t add_until;     // rows of dy up to which add beats the panel, <= tile_rows; 0: has none
    int32_t tile_rows;     // rows of x in a tile, <= HB_LINEAR4_MAX_TILE_ROWS
    int32_t tile_cols;     // columns of a panel: 16, 32 or 64
    int32_t panel_steps;   // values of the summed index per panel: a power of two, 128..1024
    int32_t pair;          // 1, or 2: steps 16i + j and 16i + j + 8 beside one another (see below)
    int32_t element_bytes; // of permuted x, packed x and panels: 4 float32, 2 bfloat16
    int32_t x_block;       // packed x keeps so many steps of a row together: 16 or 32
    // Integer sets: what comes with each 64 columns (scales, corrections), in bytes; 0 otherwise.
    int32_t dot_extra;   // per row of permuted x: all of them behind the row's codes
    int32_t x_extra;     // per row of packed x, with the 64 columns
    int32_t panel_extra; // per row of W in a panel, with the 64 columns
    // Column of W, counted from the panel's first, at each place of a decode_cols panel.
    uint8_t column_order[HB_LINEAR4_MAX_TILE_COLS];
    bool columns_in_order; // column_order[c] == c for all c
    // The same for each HB_LINEAR4_ADD_GROUP columns of the sums of add_rows.
    uint8_t add_order[HB_LINEAR4_ADD_GROUP];

    // x [depth] of dtype (float32, bfloat16, float16) -> permuted [depth rounded up to X_GROUP].
    void (*permute_x)(const void *x, hb_dtype dtype, int64_t depth, void *permuted);
    // y[t * y_stride + r] = sum_k w[r, k] x[t, k] for r < n_rows, t < n_x (1..dot_rows). depth is a
    // multiple of 32. Row t of permuted x begins hb_linear4_permuted_bytes() after row t - 1. Each
    // y has the same bits whatever n_rows; it may depend on n_x.
    void (*dot)(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const void *permuted, int n_x,
                float *y, int64_t y_stride);
    // One tile of x: n_x (1..tile_rows) rows at x + t * x_stride elements of dtype ->
    // packed[ceil(steps / x_block)][tile_rows][x_block], zeros where there is no row or step;
    // within x_block in the order of hb_linear4_place.
    void (*pack_x)(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   void *packed);
    // Forward panel: rows r < n_rows (<= tile_cols) of w, columns k < depth (a multiple of 32, at
    // most panel_steps) -> panel[depth / pair][tile_cols][pair], summed over k, which has the order
    // of hb_linear4_place; any values at r >= n_rows.
    void (*decode_rows)(const hb_matrix4 *w, int64_t n_rows, int64_t depth, void *panel);
    // Backward panel: rows r < n_rows (<= panel_steps), columns c < n_cols (a multiple of 16, at
    // most tile_cols) -> panel[hb_linear4_padded_steps(n_rows) / pair][tile_cols][pair], summed
    // over r in the order of hb_linear4_place, columns in column_order; any values at c >= n_cols,
    // zeros at the r behind n_rows.
    void (*decode_cols)(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, void *panel);
    // sums[t * tile_cols + c] (+)= sum_s packed x[t][s] * panel[s][c] for t < n_x (1..tile_rows),
    // over steps (any number; packed x and panel are padded); adds when `accumulate`, else
    // overwrites.
    // Each sum has the same bits whatever n_x. A set with `begin` has tiles multiplied between
    // begin() and end(), on one thread, which does nothing else of the set meanwhile.
    void (*tile)(const void *packed, const void *panel, int64_t steps, int n_x, bool accumulate,
                 float *sums);
    // sums[t * sums_stride + place of c] += sum_r packed x[t][r] * weight(r, c) for t < n_x
    // (1..add_until), rows r < n_rows of w in ascending order, columns c < n_cols (a multiple of
    // 32). Places: add_order in every ADD_GROUP columns; sums have room for whole groups, any
    // values at c >= n_cols, and are 64-byte aligned, sums_stride a multiple of 16. Each sum has
    // the same bits wherever its column lies in w. NULL: has none.
    void (*add_rows)(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, const void *packed,
                     int n_x, float *sums, int64_t sums_stride);
    // Both are NULL where tiles leave no state behind, and in the float32 set.
    void (*begin)(void);
    void (*end)(void);
} hb_linear4_set;

typedef struct {
    // The integer sets have no decode_cols; where tile is NULL (tile_rows, tile_cols, pair,
    // x_block: 1) many rows of x take the f32 set.
    hb_linear4_set f32, bf16, i16, i8;
    // y[i] = round_to_dtype(sums[i] + bias[i]) for i < n; bias float32 or NULL. sums 64-byte
    // aligned.
    void (*finish)(const float *sums, const float *bias, int64_t n, hb_dtype dtype, void *y);
} hb_kernels_linear4;

// Sets with pairs: a pair is one lane of vdpbf16ps, and pairs eight steps apart are what 64 bits of
// codes hold in both halves, so that decoding a panel never has to bring two results together.
#define HB_LINEAR4_PAIRED_STEPS 16

// Place of a step in a panel or packed x.
static inline int64_t hb_linear4_place(const hb_linear4_set *set, int64_t step)
{
    if (set->pair == 1) return step;
    const int64_t within = step % HB_LINEAR4_PAIRED_STEPS, half = HB_LINEAR4_PAIRED_STEPS / 2;
    return step - within + within % half * 2 + within / half;
}

// Steps that a panel of so many has room for.
static inline int64_t hb_linear4_padded_steps(const hb_linear4_set *set, int64_t steps)
{
    const int64_t unit = set->pair == 1 ? 1 : HB_LINEAR4_PAIRED_STEPS;
    return (steps + unit - 1) / unit * unit;
}

// Bytes from one row of permuted x to the next.
static inline int64_t hb_linear4_permuted_bytes(const hb_linear4_set *set, int64_t depth)
{
    int64_t groups = hb_ceil_div(depth, HB_LINEAR4_X_GROUP);
    int64_t bytes = groups * (HB_LINEAR4_X_GROUP * set->element_bytes + 2 * set->dot_extra);
    return (bytes + 63) / 64 * 64;
}

// Each fills the members that its ISA does better. Called from that folder's table.c.
void hb_linear4_table_ref(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx2(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx512(hb_kernels_linear4 *kernels);
void hb_linear4_table_avx512bf16(hb_kernels_linear4 *kernels);
void hb_linear4_table_amx(hb_kernels_linear4 *kernels);
void hb_linear4_table_neon(hb_kernels_linear4 *kernels);
void hb_linear4_int_table_ref(hb_kernels_linear4 *kernels);
void hb_linear4_int_table_avx2(hb_kernels_linear4 *kernels);
void hb_linear4_int_table_avxvnni(hb_kernels_linear4 *kernels);
void hb_linear4_int_table_avx512vnni(hb_kernels_linear4 *kernels);

#endif
