// Sums of int8 products on tile registers (AMX-INT8), for many rows of x.
//
// tdpbssd multiplies signed bytes with signed bytes into int32 and saturates nowhere: exact for
// every code. The first factor are rows of W where they lie; the second wants four steps of a row
// of x beside one another, 16 rows behind one another, which is the layout of a tile of x:
//
//   tile[depth / 64][2 halves][16][16 rows of x][4 steps], zeros behind the depth
//
//   tmm4  W, rows 0..15    tmm6  x, rows 0..15     tmm0 = 4 . 6   tmm1 = 4 . 7
//   tmm5  W, rows 16..31   tmm7  x, rows 16..31    tmm2 = 5 . 6   tmm3 = 5 . 7
//
// The sums come out with the rows of x as columns, and are transposed on their way to c. Tests run
// this on an emulation of the tiles; it has not been measured on a processor that has them.
#include "core/kernels_linear8.h"
#include "cpu/amx/tiles.h"
#include "cpu/linear4_avx512.h"

// FROM: from this many rows of x on the two halves of a tile are in use; the sets below read W once
// per four rows of x. Where they meet has not been measured.
enum { TILE_X = 32, STEPS = 64, HALF_BYTES = 1024, FROM = 32 };

static void prepare_tile(const int8_t *codes, int64_t depth, int row, void *tile)
{
    int8_t *out = (int8_t *)tile + row / TILE_HEIGHT * HALF_BYTES + row % TILE_HEIGHT * 4;
    for (int64_t k = 0; k < depth; k += STEPS) {
        int8_t bytes[STEPS] = {0};
        memcpy(bytes, codes + k, (size_t)(depth - k < STEPS ? depth - k : STEPS));
        for (int i = 0; i < STEPS / 4; i++) memcpy(out + k * TILE_X + i * 64, bytes + 4 * i, 4);
    }
}

// Shapes for n_rows (1..32) rows of W and n_x (1..32) of x.
static void configure(int n_rows, int n_x)
{
    const int rows = n_rows < TILE_HEIGHT ? n_rows : TILE_HEIGHT;
    const int columns = n_x < TILE_HEIGHT ? n_x : TILE_HEIGHT;
    const int more_rows = n_rows - rows, more_columns = n_x - columns;
    tile_config config = {.palette = 1};
    shape_tile(&config, 0, rows, 4 * columns);
    shape_tile(&config, 4, rows, TILE_ROW_BYTES);
    shape_tile(&config, 6, TILE_HEIGHT, 4 * columns);
    if (more_rows > 0) {
        shape_tile(&config, 2, more_rows, 4 * columns);
        shape_tile(&config, 5, more_rows, TILE_ROW_BYTES);
    }
    if (more_columns > 0) {
        shape_tile(&config, 1, rows, 4 * more_columns);
        shape_tile(&config, 7, TILE_HEIGHT, 4 * more_columns);
    }
    if (more_rows > 0 && more_columns > 0) shape_tile(&config, 3, more_rows, 4 * more_columns);
    TILE_CONFIGURE(&config);
}

// 64 steps. more_rows, more_columns: whether there are more than 16 of W and of x.
INLINE void add_block(const int8_t *w, int64_t w_stride, const int8_t *x, const bool more_rows,
                      const bool more_columns)
{
    TILE_LOAD(6, x, 64);
    TILE_LOAD(4, w, w_stride);
    TILE_DOT_INT8(0, 4, 6);
    if (more_columns) {
        TILE_LOAD(7, x + HALF_BYTES, 64);
        TILE_DOT_INT8(1, 4, 7);
    }
    if (!more_rows) return;
    TILE_LOAD(5, w + TILE_HEIGHT * w_stride, w_stride);
    TILE_DOT_INT8(2, 5, 6);
    if (more_columns) TILE_DOT_INT8(3, 5, 7);
}

typedef int32_t tile_sums[TILE_HEIGHT][16]; // [row of W][row of x]

// `rest`: what the rows of W have behind the last full block of steps, filled up with zeros.
INLINE void add_rows(const int8_t *w, int64_t w_stride, int64_t depth, const int8_t *rest,
                     const int8_t *x, tile_sums sums[4], const bool more_rows,
                     const bool more_columns)
{
    TILE_ZERO(0);
    if (more_columns) TILE_ZERO(1);
    if (more_rows) TILE_ZERO(2);
    if (more_rows && more_columns) TILE_ZERO(3);
    int64_t k = 0;
    for (; k + STEPS <= depth; k += STEPS)
        add_block(w + k, w_stride, x + k * TILE_X, more_rows, more_columns);
    if (k < depth) add_block(rest, STEPS, x + k * TILE_X, more_rows, more_columns);
    TILE_STORE(0, sums[0], 64);
    if (more_columns) TILE_STORE(1, sums[1], 64);
    if (more_rows) TILE_STORE(2, sums[2], 64);
    if (more_rows && more_columns) TILE_STORE(3, sums[3], 64);
}

// c[t * c_stride + r] = sums[r][t] for r < n_rows, t < n_x, up to 16 each.
static void store_transposed(tile_sums sums, int n_rows, int n_x, int32_t *c, int64_t c_stride)
{
    __m512i v[16];
    for (int r = 0; r < 16; r++)
        v[r] = _mm512_maskz_loadu_epi32(r < n_rows ? first_lanes(n_x) : 0, sums[r]);
    transpose(v);
    for (int t = 0; t < n_x; t++)
        _mm512_mask_storeu_epi32(c + t * c_stride, first_lanes(n_rows), v[t]);
}

// Up to 32 rows of W.
static void multiply_rows(const int8_t *w, int64_t w_stride, int n_rows, int64_t depth,
                          const int8_t *x, int n_x, int32_t *c, int64_t c_stride)
{
    _Alignas(64) tile_sums sums[4];
    _Alignas(64) int8_t rest[2 * TILE_HEIGHT * STEPS];
    const int64_t full = depth / STEPS * STEPS;
    for (int r = 0; r < n_rows && full < depth; r++) {
        memset(rest + r * STEPS, 0, STEPS);
        memcpy(rest + r * STEPS, w + r * w_stride + full, (size_t)(depth - full));
    }
    if (n_rows > TILE_HEIGHT && n_x > TILE_HEIGHT)
        add_rows(w, w_stride, depth, rest, x, sums, true, true);
    else if (n_rows > TILE_HEIGHT)
        add_rows(w, w_stride, depth, rest, x, sums, true, false);
    else if (n_x > TILE_HEIGHT)
        add_rows(w, w_stride, depth, rest, x, sums, false, true);
    else
        add_rows(w, w_stride, depth, rest, x, sums, false, false);
    for (int r = 0; r < n_rows; r += TILE_HEIGHT)
        for (int t = 0; t < n_x; t += TILE_HEIGHT)
            store_transposed(sums[r / TILE_HEIGHT * 2 + t / TILE_HEIGHT],
                             n_rows - r < TILE_HEIGHT ? n_rows - r : TILE_HEIGHT,
                             n_x - t < TILE_HEIGHT ? n_x - t : TILE_HEIGHT, c + t * c_stride + r,
                             c_stride);
}

static void tile_int8(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const void *tile, int n_x, int32_t *c, int64_t c_stride)
{
    int configured = 0; // for so many rows of W
    for (int64_t r = 0; r < n_rows; r += 2 * TILE_HEIGHT) {
        const int n = n_rows - r < 2 * TILE_HEIGHT ? (int)(n_rows - r) : 2 * TILE_HEIGHT;
        if (n != configured) configure(n, n_x);
        configured = n;
        multiply_rows(w + r * w_stride, w_stride, n, depth, tile, n_x, c + r, c_stride);
    }
    if (configured != 0) TILE_RELEASE();
}

void hb_linear8_table_amx(hb_kernels_linear8 *kernels)
{
    kernels->tile_int8_rows = TILE_X;
    kernels->tile_int8_from = FROM;
    kernels->prepare_tile = prepare_tile;
    kernels->tile_int8 = tile_int8;
}
