// Products with 4-bit weights on tile registers (AMX-BF16): the bfloat16 set's panels.
//
// Panels are those of avx512bf16, whose pairs of steps (8 apart) beside one another are what
// tdpbf16ps wants of its second factor; the dot regime is avx512bf16's, too. Packed x has 32 steps
// of a row together, a row of the first factor.
//
//   tmm4  x, rows 0..15    tmm6  panel, 16 columns   tmm0 = 4 . 6   tmm1 = 4 . 7
//   tmm5  x, rows 16..31   tmm7  the next 16         tmm2 = 5 . 6   tmm3 = 5 . 7
//
// Accuracy: tdpbf16ps sums the even and the odd steps of 32 in float32 (16 fused multiply-adds
// each), adds the two, and that to the sum: at most depth/32 + 18 roundings behind a product, with
// subnormals flushed. Tests run this on an emulation of the tiles; it has not been measured on a
// processor that has them.
#include "cpu/amx/tiles.h"
#include "cpu/linear4_avx512.h"

enum { TILE_ROWS = 32, TILE_COLS = 64, STEPS = 32 }; // STEPS: of a tile's row

_Static_assert(TILE_ROWS <= HB_LINEAR4_MAX_TILE_ROWS, "rows");

static void hb_linear4_pack_x_bf16_amx(const void *x, hb_dtype dtype, int64_t x_stride, int n_x,
                                       int64_t steps, void *packed)
{
    const size_t item = hb_dtype_bytes(dtype);
    uint16_t *out = packed;
    for (int64_t s = 0; s < steps; s += STEPS)
        for (int t = 0; t < TILE_ROWS; t++) {
            __m512i words = _mm512_setzero_si512();
            if (t < n_x)
                words = paired_words(
                    load_x_bf16((const char *)x + (size_t)(t * x_stride) * item, s, dtype, steps));
            _mm512_store_si512(out + s * TILE_ROWS + t * STEPS, words);
        }
}

static void configure(int n_x)
{
    const int first = n_x < TILE_HEIGHT ? n_x : TILE_HEIGHT;
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 2; tile++) {
        shape_tile(&config, tile, first, TILE_ROW_BYTES);
        shape_tile(&config, 2 + tile, n_x - first, TILE_ROW_BYTES);
        shape_tile(&config, 6 + tile, TILE_HEIGHT, TILE_ROW_BYTES);
    }
    shape_tile(&config, 4, first, TILE_ROW_BYTES);
    shape_tile(&config, 5, n_x - first, TILE_ROW_BYTES);
    TILE_CONFIGURE(&config);
}

static void hb_linear4_begin_bf16_amx(void)
{
    configure(TILE_ROWS);
}

static void hb_linear4_end_bf16_amx(void)
{
    TILE_RELEASE();
}

// One block of STEPS steps, 32 columns from `panel`; `both`: there are more than 16 rows.
INLINE void add_block(const uint16_t *packed, const uint16_t *panel, const bool both)
{
    TILE_LOAD(6, panel, TILE_COLS * 4);
    TILE_LOAD(7, panel + 2 * TILE_HEIGHT, TILE_COLS * 4);
    TILE_LOAD(4, packed, TILE_ROW_BYTES);
    TILE_DOT_BF16(0, 4, 6);
    TILE_DOT_BF16(1, 4, 7);
    if (!both) return;
    TILE_LOAD(5, packed + TILE_HEIGHT * STEPS, TILE_ROW_BYTES);
    TILE_DOT_BF16(2, 5, 6);
    TILE_DOT_BF16(3, 5, 7);
}

// All steps of 32 columns. `rest`: what the panel has behind the last full block of steps, filled
// up with zeros.
INLINE void add_columns(const uint16_t *packed, const uint16_t *panel, const uint16_t *rest,
                        int64_t steps, bool accumulate, float *sums, const bool both)
{
    float *below = sums + TILE_HEIGHT * TILE_COLS;
    if (accumulate) {
        TILE_LOAD(0, sums, TILE_COLS * 4);
        TILE_LOAD(1, sums + TILE_HEIGHT, TILE_COLS * 4);
        if (both) TILE_LOAD(2, below, TILE_COLS * 4);
        if (both) TILE_LOAD(3, below + TILE_HEIGHT, TILE_COLS * 4);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (both) TILE_ZERO(2);
        if (both) TILE_ZERO(3);
    }
    int64_t s = 0;
    for (; s + STEPS <= steps; s += STEPS)
        add_block(packed + s * TILE_ROWS, panel + s * TILE_COLS, both);
    if (s < steps) add_block(packed + s * TILE_ROWS, rest, both);
    TILE_STORE(0, sums, TILE_COLS * 4);
    TILE_STORE(1, sums + TILE_HEIGHT, TILE_COLS * 4);
    if (both) TILE_STORE(2, below, TILE_COLS * 4);
    if (both) TILE_STORE(3, below + TILE_HEIGHT, TILE_COLS * 4);
}

static void hb_linear4_tile_bf16_amx(const void *packed, const void *panel, int64_t steps, int n_x,
                                     bool accumulate, float *sums)
{
    const uint16_t *weights = panel;
    _Alignas(64) uint16_t rest[STEPS * TILE_COLS];
    if (steps % STEPS != 0) { // what lies behind the panel is not ours, and might be NaN
        const int64_t full = steps / STEPS * STEPS;
        const int64_t present = hb_round_up(steps - full, HB_LINEAR4_PAIRED_STEPS);
        memset(rest, 0, sizeof rest);
        memcpy(rest, weights + full * TILE_COLS, (size_t)(present * TILE_COLS) * sizeof *rest);
    }
    if (n_x < TILE_ROWS) configure(n_x);
    for (int c = 0; c < TILE_COLS; c += 2 * TILE_HEIGHT) {
        if (n_x > TILE_HEIGHT)
            add_columns(packed, weights + 2 * c, rest + 2 * c, steps, accumulate, sums + c, true);
        else
            add_columns(packed, weights + 2 * c, rest + 2 * c, steps, accumulate, sums + c, false);
    }
    if (n_x < TILE_ROWS) configure(TILE_ROWS);
}

void hb_linear4_table_amx(hb_kernels_linear4 *kernels)
{
    hb_linear4_set *set = &kernels->bf16; // the rest: as avx512bf16 has left it
    set->tile_rows = TILE_ROWS;
    set->x_block = STEPS;
    set->pack_x = hb_linear4_pack_x_bf16_amx;
    set->tile = hb_linear4_tile_bf16_amx;
    set->begin = hb_linear4_begin_bf16_amx;
    set->end = hb_linear4_end_bf16_amx;
}
