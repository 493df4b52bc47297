// Sums of int8 products by pairs: the kernels against their definition, for every kind of codes.
#include "check.h"

#include <stdlib.h>
#include <string.h>

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// Block by block, as core goes.
static void check_pairs(check *c, int64_t depth, int64_t n_rows, int n_x)
{
    const hb_int8_pairs *pairs = &c->kernels->linear8.pairs;
    const int64_t w_stride = depth + check_random_below(c, 3) * 7;
    const int64_t c_stride = n_rows + check_random_below(c, 3);
    const int64_t x_stride = depth + check_random_below(c, 3) * 5;
    check_label(c, "pairs, %d x, depth %d, %d rows, stride %d", n_x, (int)depth, (int)n_rows,
                (int)w_stride);
    const int64_t w_bytes = n_rows > 0 ? (n_rows - 1) * w_stride + depth : 0;
    const int64_t n_out = (n_x - 1) * c_stride + n_rows;
    int8_t *w = check_buffer(c, (size_t)w_bytes, CHECK_END);
    const int64_t x_bytes = (n_x - 1) * x_stride + depth;
    int8_t *x = check_buffer(c, (size_t)x_bytes, CHECK_END);
    const size_t tile_bytes = (size_t)hb_int8_pair_bytes(depth, pairs->rows);
    uint8_t *tile = check_buffer(c, tile_bytes, CHECK_BEGIN);
    int32_t *got = check_buffer(c, (size_t)n_out * sizeof *got, CHECK_END);
    int32_t *want = malloc((size_t)(n_out + 1) * sizeof *want);
    check_fill_codes(c, w, w_bytes);
    check_fill_codes(c, x, x_bytes);
    memcpy(want, got, (size_t)n_out * sizeof *want);
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < depth; i++) sum += w[r * w_stride + i] * x[t * x_stride + i];
            want[t * c_stride + r] = (int32_t)sum;
        }
    pairs->widen_x(x, x_stride, n_x, depth, tile);
    int64_t k = 0, at = 0;
    do {
        const int64_t n = min_i64(HB_INT8_PAIR_STEPS, depth - k);
        const int64_t bytes = hb_int8_pair_bytes(n, HB_INT8_PAIR_W);
        uint8_t *panel = check_buffer(c, (size_t)bytes, CHECK_BEGIN);
        pairs->widen_w(w + k, w_stride, n_rows, n, panel);
        pairs->multiply(panel, n_rows, n, tile + at, tile, n_x, k > 0, got, c_stride);
        at += hb_int8_pair_bytes(n, pairs->rows);
        k += n;
    } while (k < depth);
    CHECK(c, at == (int64_t)tile_bytes, "blocks of %d bytes, a tile has %d", (int)at,
          (int)tile_bytes);
    check_equal(c, got, want, (size_t)n_out * sizeof *got, "pairs");
    free(want);
    check_release(c);
}

static void bench_pairs(check *c)
{
    const hb_int8_pairs *pairs = &c->kernels->linear8.pairs;
    enum { STEPS = HB_INT8_PAIR_STEPS, W = HB_INT8_PAIR_W };
    const int x = pairs->rows;
    int8_t *codes = check_buffer(c, W * STEPS, CHECK_BEGIN);
    void *tile = check_buffer(c, (size_t)hb_int8_pair_bytes(STEPS, x), CHECK_BEGIN);
    void *panel = check_buffer(c, (size_t)hb_int8_pair_bytes(STEPS, W), CHECK_BEGIN);
    int32_t *sums = check_buffer(c, (size_t)(W * x) * sizeof *sums, CHECK_BEGIN);
    check_fill_codes(c, codes, W * STEPS);
    pairs->widen_x(codes, STEPS, x, STEPS, tile);
    CHECK_BENCH(c, b, "int8 pairs widen", W * STEPS * 3, 0)
    pairs->widen_w(codes, STEPS, W, STEPS, panel);
    CHECK_BENCH(c, b, "int8 pairs", 0, 2.0 * W * x * STEPS)
    pairs->multiply(panel, W, STEPS, tile, tile, x, false, sums, W);
}

CHECK_GROUP(int8_pairs)
{
    const hb_int8_pairs *pairs = &c->kernels->linear8.pairs;
    if (!CHECK_NEW(c, linear8.pairs.multiply)) return;
    if (c->bench) {
        bench_pairs(c);
        return;
    }
    const int64_t depths[] = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 192, 333};
    const int64_t rows[] = {0, 1, 2, 3, 4, 7, 16, 17, 63, 64};
    const int n_depths = sizeof depths / sizeof *depths, n_rows = sizeof rows / sizeof *rows;
    for (int d = 0; d < n_depths; d++)
        for (int r = 0; r < n_rows; r++)
            for (int n_x = 1; n_x <= pairs->rows; n_x++)
                if (!c->emulated || (d + r + n_x) % 3 == 0) check_pairs(c, depths[d], rows[r], n_x);
    for (int n_x = 1; n_x <= pairs->rows; n_x++) { // around the borders of blocks
        check_pairs(c, HB_INT8_PAIR_STEPS, 5, n_x);
        check_pairs(c, HB_INT8_PAIR_STEPS + 1, 4, n_x);
        check_pairs(c, 3 * HB_INT8_PAIR_STEPS - 33, n_x == 1 ? 64 : 35, n_x);
    }
}
