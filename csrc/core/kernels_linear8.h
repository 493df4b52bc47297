// Kernels of y = x W^T and dx = dy W with a row-wise int8 W: w[r, k] = codes[r, k] * scale[r] /
// 127.
//
// Three ways to multiply. "dot_int8": both sides int8, exact sums (LLM.int8() and the integer
// product); "tile_int8" and "pairs" are the same for many rows of x, where an ISA has one of them.
// "dot_f32", for a few rows of float32 x. Panels, for many rows: codes become float32 and the tile
// of the float32 set of kernels_linear4.h multiplies them. linear_8bit.c chooses, splits and
// stores.
//
// Codes are any int8, -128 included. W is row-major and dense: row r begins w_stride bytes after
// row r - 1; nothing is read outside the rows. Prepared x is 64-byte aligned; the rest has its
// element's alignment. The functions prepare_int8 and dot_int8 of an ISA belong together, and
// prepare_tile and tile_int8, and those of the pairs.
//
// Accuracy: dot_int8, tile_int8 and pairs are exact, modulo 2^32 (depth <= HB_INT8_MAX_DEPTH never
// wraps).
// dot_f32, with u = 2^-24: |err| <= (depth/8 + 16) u sum_k |w x|: at least 8 partial sums, folded
// pairwise.
#ifndef HB_CORE_KERNELS_LINEAR8_H
#define HB_CORE_KERNELS_LINEAR8_H

#include "core/formats.h"

#define HB_INT8_MAX_DEPTH 131071 // 2^17 * 2^14 = 2^31 would be one too many

// Two products by one multiplication, where nothing better than 16-bit multiplications is there:
//
//   a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1
//
// What is subtracted belongs to one row alone and is found as that row is widened to int16. Both
// sides are widened in blocks of HB_INT8_PAIR_STEPS inner indices; between two blocks sums are in
// c. Source: S. Winograd, "A new algorithm for inner product", IEEE Trans. Comput. C-17 (1968).
enum {
    HB_INT8_PAIR_STEPS = 1024,
    HB_INT8_PAIR_W = 64,        // rows of W at most that are widened to one panel
    HB_INT8_PAIR_GROUP = 32,    // blocks are filled up with zeros to a multiple
    HB_INT8_PAIR_ROW_BYTES = 32 // of a row of a block, before its elements: what is subtracted
};

typedef struct {
    int32_t from; // rows of x from which on core takes it; 0: there is none
    int32_t rows; // of x in a tile
    // codes [n_x, depth], n_x in 1..rows, x_stride bytes apart -> a tile of
    // hb_int8_pair_bytes(depth, rows), block by block.
    void (*widen_x)(const int8_t *codes, int64_t x_stride, int n_x, int64_t depth, void *tile);
    // One block of n_rows <= HB_INT8_PAIR_W rows, depth <= HB_INT8_PAIR_STEPS, to a panel of
    // hb_int8_pair_bytes(depth, HB_INT8_PAIR_W).
    void (*widen_w)(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth, void *panel);
    // c[t * c_stride + r] = (add: +=) sum_k w[r, k] codes[t, k] for r < n_rows, t < n_x, the n_x of
    // widen_x, over one block: `tile` begins with it. The tile of the next call, which begins at
    // `next`, is asked for.
    void (*multiply)(const void *panel, int64_t n_rows, int64_t depth, const void *tile,
                     const void *next, int n_x, bool add, int32_t *c, int64_t c_stride);
} hb_int8_pairs;

typedef struct {
    int32_t dot_int8_rows;  // rows of x that one call of dot_int8 takes at most
    int32_t dot_f32_rows;   // and of dot_f32
    int32_t prepared_bytes; // of one element of prepared x: 1 or 2

    // codes [depth] -> prepared: depth rounded up to 64 elements, then 64 bytes for corrections.
    void (*prepare_int8)(const int8_t *codes, int64_t depth, void *prepared);
    // c[t * c_stride + r] = sum_k w[r, k] codes[t, k] for r < n_rows, t < n_x (1..dot_int8_rows).
    // Row t of prepared x begins hb_int8_prepared_bytes() after row t - 1.
    void (*dot_int8)(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const void *prepared, int n_x, int32_t *c, int64_t c_stride);
    // tile_int8_rows rows of x are interleaved to a tile. All of this is 0 where there is no
    // tile_int8; core takes it from tile_int8_from rows of x on.
    int32_t tile_int8_rows, tile_int8_from;
    // codes [depth] -> row `row` of a tile of hb_int8_tile_bytes(). The other rows are not touched:
    // several threads may prepare rows of one tile.
    void (*prepare_tile)(const int8_t *codes, int64_t depth, int row, void *tile);
    // As dot_int8, n_x in 1..tile_int8_rows; the tile's rows from n_x on are not read.
    void (*tile_int8)(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const void *tile, int n_x, int32_t *c, int64_t c_stride);
    hb_int8_pairs pairs;
    // out[i] = ((float)c[i] * x_factor + extra[i]) * w_factor[i], i < n, each operation rounded;
    // extra NULL: nothing added.
    void (*rescale)(const int32_t *c, float x_factor, const float *extra, const float *w_factor,
                    int64_t n, float *out);
    // y[t * y_stride + r] = sum_k w[r, k] x[t * x_stride + k] for t < n_x (1..dot_f32_rows). Each y
    // has the same bits whatever n_rows; it may depend on n_x.
    void (*dot_f32)(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                    const float *x, int64_t x_stride, int n_x, float *y, int64_t y_stride);
    // panel[k * tile_cols + r] = w[r, k], k < depth, r < n_rows; 0 for n_rows <= r < tile_cols.
    // tile_cols is 16, 32 or 64; panel 64-byte aligned.
    void (*decode_rows)(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                        int tile_cols, float *panel);
    // panel[r * tile_cols + c] = w[r, c] * factor[r], rounded, c < n_cols; 0 for n_cols <= c <
    // tile_cols.
    void (*decode_cols)(const int8_t *w, int64_t w_stride, const float *factor, int64_t n_rows,
                        int64_t n_cols, int tile_cols, float *panel);
} hb_kernels_linear8;

// Bytes from one row of prepared x to the next.
static inline int64_t hb_int8_prepared_bytes(int64_t depth, int32_t element_bytes)
{
    return (depth + 63) / 64 * 64 * element_bytes + 64;
}

static inline int64_t hb_int8_tile_bytes(int64_t depth, int32_t rows)
{
    return (depth + 63) / 64 * 64 * rows;
}

// Bytes of `rows` rows widened for pairs; also how far the next block lies behind them, where depth
// is a multiple of HB_INT8_PAIR_STEPS.
static inline int64_t hb_int8_pair_bytes(int64_t depth, int64_t rows)
{
    const int64_t groups = (depth + HB_INT8_PAIR_GROUP - 1) / HB_INT8_PAIR_GROUP;
    const int64_t blocks = depth == 0 ? 1 : (depth + HB_INT8_PAIR_STEPS - 1) / HB_INT8_PAIR_STEPS;
    return rows * (groups * HB_INT8_PAIR_GROUP * 2 + blocks * HB_INT8_PAIR_ROW_BYTES);
}

// Each fills the members that its ISA does better. Called from that folder's table.c.
void hb_linear8_table_ref(hb_kernels_linear8 *kernels);
void hb_linear8_table_avx2(hb_kernels_linear8 *kernels);
void hb_int8_pairs_table_avx2(hb_int8_pairs *pairs);
void hb_int8_pairs_table_avx512(hb_int8_pairs *pairs);
void hb_linear8_table_avxvnni(hb_kernels_linear8 *kernels);
void hb_linear8_table_avx512(hb_kernels_linear8 *kernels);
void hb_linear8_table_avx512vnni(hb_kernels_linear8 *kernels);
void hb_linear8_table_amx(hb_kernels_linear8 *kernels);
void hb_linear8_table_neon(hb_kernels_linear8 *kernels);

#endif
