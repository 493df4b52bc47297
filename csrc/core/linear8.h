// One product with a row-wise int8 W: what linear_8bit.c checks and linear8_*.c carries out.
//
//   w[r, k] = codes[r, k] * scale[r] / 127
//   dynamic: y[m, r] = (sum_k cx[m, k] codes[r, k] * sx[m]/127 + sum_o x[m, o] codes[r, o]) *
//   scale[r]/127
//            + bias[r], with cx, sx the row-wise int8 form of x without its outlier columns o
//   exact:   y[m, r] = (sum_k x[m, k] codes[r, k]) * scale[r]/127 + bias[r]
//
// Source: LLM.int8(), arXiv:2208.07339, §3. Everything behind the integer sum is float32, rounded
// once to y's dtype. All products walk a grid of chunks: a block of outputs (of W's rows, backward
// of its columns) by a range of rows of x. The sum over the inner index is never split, so results
// do not depend on the number of threads. Scratch is one allocation per call: x in the kernels'
// layout, then a part per lane.
#ifndef HB_CORE_LINEAR8_H
#define HB_CORE_LINEAR8_H

#include "core/matrix.h"
#include "core/ops.h"

enum {
    HB_PRODUCT8_BLOCK = HB_LINEAR4_MAX_TILE_COLS, // outputs per block; every tile_cols divides it
    HB_PRODUCT8_STACK_BYTES = 16 << 10,           // scratch up to this size is not allocated
};

typedef struct {
    hb_context *context;
    hb_matrix x, y;
    const int8_t *codes;
    const float *scale;
    int64_t rows, depth; // of W
    bool backward;
    float threshold;   // NaN: no outliers
    const float *bias; // [rows] or NULL

    int32_t *c; // integer product: [x rows, rows] instead of y
    const int8_t *a;

    // The grid.
    int64_t x_rows, outputs, x_per_chunk, x_chunks;
    int64_t x_begin, pass_rows; // rows of x in this pass (panels)

    // Scratch.
    unsigned char *prepared; // rows of x (dot), or tiles (panels, int8 where `tiles`)
    int64_t prepared_stride;
    bool tiles, pairs; // int8: tile_int8 or the kernels of pairs multiply, not dot_int8
    int64_t int8_rows; // rows of x that one call of theirs takes
    int64_t sums_rows; // rows of x whose integer sums a lane keeps
    int64_t group; // rows of x that share a unit of the grid: what tiles of outliers never straddle
    float *x_factor; // [x_rows]: scale / 127
    uint8_t *marks;  // [depth], outlier columns; one more per lane behind it
    int64_t *columns, n_columns;
    unsigned char *outliers; // x of those columns in tiles
    int64_t outliers_stride;
    unsigned char *lanes;
    int n_lanes;
    int64_t lane_bytes, row_at, codes_at, panel_at, sums_at, extra_at;
} hb_product8;

// The products; each plans its grid, has its scratch and runs. All sizes but depth positive.
// Both sides int8: y, or the integers c alone.
hb_status hb_product8_int8(hb_product8 *p, const char *function, hb_error *error);
// x in float32: few rows, forward, or any.
enum { HB_PRODUCT8_DOT_UNTIL = 8 }; // rows of x up to which dot beats panels
hb_status hb_product8_dot(hb_product8 *p, const char *function, hb_error *error);
hb_status hb_product8_panels(hb_product8 *p, const char *function, hb_error *error);

// ---- shared by them (linear_8bit.c) -----------------------------------------------------------

int hb_product8_lanes(const hb_product8 *p); // 1 where the product is small
void hb_product8_run_chunks(hb_product8 *p, bool serial, int64_t n_chunks, hb_chunk_fn fn);
// Chunks of `unit`-multiples of rows of x, so that there are at least four per lane where possible.
void hb_product8_plan_grid(hb_product8 *p, int64_t unit, int64_t most_rows);
// Outputs [begin, begin + n) of row m of y from their sums, rescaled.
void hb_product8_store(const hb_product8 *p, int64_t m, int64_t begin, int64_t n,
                       const float *sums);

#endif
