// One product with a 4-bit weight: what linear_4bit.c plans and linear4_*.c carries out.
//
// y = x W^T and dx = dy W are one product: sums[m, o] = sum_s x[m, s] * weight(o, s), with outputs
// o the rows of W and steps s its columns (forward), or the reverse (backward). Rows of x are taken
// in passes; within a pass the outputs are split over the pool and every lane has its own panel,
// sums and scales in one allocation made per call. The sum over s is never split and its order is
// fixed by the panel size: results do not depend on the number of threads.
//
// dx of a few rows ("add") is split by columns of W alone: a chunk takes all rows of some columns.
//
// Where W has too few outputs to give every lane panels of its own, all panels are decoded once,
// by all lanes, beside the packing of x, and the multiplications share them ("shared" below).
//
// A block of W that straddles rows still has one scale on every run of gcd(depth, blocksize)
// columns: with at least 32 of them W is read as if quantized with that block size, its scales
// copied out per range of rows (as nested scales are). Otherwise (depth no multiple of 32) elements
// are decoded one by one into the same panels.
#ifndef HB_CORE_LINEAR4_H
#define HB_CORE_LINEAR4_H

#include "core/matrix.h"
#include "core/ops.h"

enum {
    HB_LINEAR4_SHARED_STEPS = 32,   // rows of W that a chunk decodes for backward panels; even
    HB_LINEAR4_DOT_CHUNK_ROWS = 64, // rows of W per chunk of the dot regime
    HB_LINEAR4_DOT_SCALE_ROWS = 16, // of which so many have their scales expanded at a time
    HB_LINEAR4_ADD_COLS = 1024,     // most columns of W per chunk of the add regime...
    HB_LINEAR4_ADD_UNIT = 128,      // ...and what they are a multiple of: a cache line of codes
    HB_LINEAR4_MIN_BLOCKSIZE = 32,  // what kernels take
    HB_LINEAR4_INT_STEPS = 64,      // what the integer sets' panels take, and their unit of steps
};

typedef struct {
    hb_context *context;
    const hb_linear4_set *set;
    const hb_tensor4 *w;
    bool backward, bf16;
    const hb_codebook_int *rounded; // integer sets
    int64_t blocksize; // that kernels see: power of two >= 32 dividing depth; 0: element by element
    bool expand;       // scales are copied out (nested, or blocks straddle rows)
    hb_matrix x, y;
    int64_t steps, outputs;
    const float *bias; // [outputs] or NULL
    bool y_regular;    // rows of y are y_stride elements apart
    int64_t y_stride;

    hb_chunk_fn bring_x, multiply; // what the regime does with a pass: see below
    bool serial;                   // on the caller's thread alone
    bool share;                    // panels are decoded once, for all lanes
    int64_t pass_rows;             // rows of x in a pass, but for the last
    int64_t m_begin, m_count;      // rows of x in this one
    int64_t unit;                  // rows of x that are packed together: 1 (dot) or a tile
    int64_t tiles_per_chunk;       // panel regime: tiles of x that one chunk multiplies
    int64_t m_chunks;
    int64_t group, n_groups; // outputs in one, and groups; chunks are n_groups * m_chunks

    unsigned char *packed;   // x of this pass, permuted or in tiles
    int64_t packed_stride;   // bytes from one row (dot) or tile (panel) to the next
    unsigned char *gathered; // x of this pass, contiguous rows, when x has strides
    unsigned char *shared;   // panels of all outputs, [outputs / tile_cols][steps], or NULL
    int64_t shared_stride;   // bytes from one of them to the next
    float *all_scales;       // backward, expanded, not shared: [rows of W][depth / blocksize]
    unsigned char *lanes;
    int n_lanes;
    int64_t lane_bytes, sums_at, scales_at; // in a lane: panel (add: totals), sums, scales
    int64_t lane_sums, lane_scales;         // floats of them

    _Alignas(64) float codebook[16];
} hb_product4;

// Bytes of `steps` steps of a tile of x, and of a panel: also the offset of the step behind them.
static inline int64_t hb_linear4_tile_bytes(const hb_linear4_set *set, int64_t steps)
{
    if (set->x_extra == 0)
        return hb_round_up(steps, set->x_block) * set->tile_rows * set->element_bytes;
    return hb_ceil_div(steps, HB_LINEAR4_INT_STEPS) * set->tile_rows *
           (HB_LINEAR4_INT_STEPS * set->element_bytes + set->x_extra);
}

static inline int64_t hb_linear4_panel_bytes(const hb_linear4_set *set, int64_t steps)
{
    if (set->panel_extra == 0)
        return hb_linear4_padded_steps(set, steps) * set->tile_cols * set->element_bytes;
    return hb_ceil_div(steps, HB_LINEAR4_INT_STEPS) * set->tile_cols *
           (HB_LINEAR4_INT_STEPS * set->element_bytes + set->panel_extra);
}

// ---- weights (linear4_weight.c) ---------------------------------------------------------------

// Scales of all columns of n_rows rows, [n_rows, depth / blocksize].
void hb_product4_expand_scales(const hb_product4 *p, int64_t row, int64_t n_rows, float *scales);
// Rows [row, ..) and columns [column, ..) of W; expanded scales (or NULL) begin at that row and at
// column 0.
hb_matrix4 hb_product4_block(const hb_product4 *p, int64_t row, int64_t column,
                             const float *scales);
// The panel of outputs [out, out + n_out) and steps [step, step + n_steps). Forward: `scales` holds
// the expanded scales of these rows, all columns. Backward: those of rows from `scales_row` on, all
// columns. Where elements are decoded one by one it is scratch.
void hb_product4_decode_panel(const hb_product4 *p, int64_t out, int64_t n_out, int64_t step,
                              int64_t n_steps, float *scales, int64_t scales_row,
                              unsigned char *panel);

// ---- chunks of parallel loops, `arg` the product (linear4_dot.c, _add.c, _panel.c) --------------

void hb_product4_permute_rows(void *arg, int64_t begin, int64_t end, int lane); // rows of x
void hb_product4_dot_chunks(void *arg, int64_t begin, int64_t end, int lane); // DOT_CHUNK_ROWS of W

void hb_product4_add_chunks(void *arg, int64_t begin, int64_t end, int lane); // columns of W

void hb_product4_pack_tiles(void *arg, int64_t begin, int64_t end, int lane); // tiles of x
// Chunks: first those of the shared panels (they take longest), then the tiles of x.
int64_t hb_product4_shared_chunks(const hb_product4 *p); // so many in the present pass
void hb_product4_prepare_shared(void *arg, int64_t begin, int64_t end, int lane);
// Chunks of SHARED_STEPS rows of W.
void hb_product4_expand_all_scales(void *arg, int64_t begin, int64_t end, int lane);
// A chunk is a group of outputs times tiles_per_chunk tiles of x.
void hb_product4_panel_chunks(void *arg, int64_t begin, int64_t end, int lane);

// Outputs [begin, begin + n), n <= 64, of row m of y, from sums in natural order.
void hb_product4_store(const hb_product4 *p, int64_t m, int64_t begin, int64_t n,
                       const float *sums);

#endif
