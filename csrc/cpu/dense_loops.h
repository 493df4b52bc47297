// The loop of the products with plain weights, which each vector ISA compiles with vectors of its
// own. Before it includes this, its dense.c defines
//
//   operand, vector     what a load of W or x becomes, and float32 sums
//   STEP                elements that PARTS operands hold
//   MAX_X               rows of x at once
//   CHAINED_X           rows of x up to which each sum is kept in PARTS chains, for the latency of
//                       an addition; more fill the registers and the time themselves
//   load_step(row, k, present, io, out)
//                       elements k .. k + present - 1 of a row (STEP: a constant) to out[PARTS], in
//                       any order that is the same for W and x; zeros behind them, which are not
//                       read
//   no_sum(), add_products(sum, w, x), add_sums(a, b), total_of(sum)
//   fetch(address)      prefetches a line into the L2 cache
//
// One or two rows of x take one row of W after the other: a single stream in the order of addresses
// is what the processor's own prefetchers follow best, and two at once came at half the speed. They
// stop at each page of 4 KiB, so lines are prefetched by hand as well, into L2: an L1 cache can
// wait for too few lines at a time (24 on Zen 4: 12 GB/s).
//
// More rows of x would be loaded more often than W. So two rows of W share them, and columns are
// taken in parts for which all of x stays in the L1 cache, with a group of rows of W before the
// next part; sums wait in between as vectors. Prefetching still goes in the order of addresses,
// through the next group.
//
// At the end of W, and for numbers of rows of x that have no loop of their own, a row is taken
// twice and its result dropped.
#ifndef HB_CPU_DENSE_LOOPS_H
#define HB_CPU_DENSE_LOOPS_H

#include "cpu/dense_entries.h"

enum {
    W_ROWS = 2,
    GROUP_ROWS = 16,        // of W that meet a part of x one after the other, at most
    GROUP_BYTES = 64 << 10, // and about so many
    X_BYTES = 16 << 10,     // of a part of x: half an L1 cache
    AHEAD_ONE = 4096,       // bytes from a load to what is prefetched beside it, one row of W
    AHEAD_TWO = 16 << 10    // and two
};

// Elements [k, k + present) of w_rows rows of W and n_x rows of x.
DENSE_INLINE void multiply_step(const unsigned char *const *w, const unsigned char *const *x,
                                int64_t k, int64_t present, hb_dtype io, const int w_rows,
                                const int n_x, const int chains, vector (*sum)[MAX_X][PARTS])
{
    operand weight[W_ROWS][PARTS];
#pragma GCC unroll 2
    for (int r = 0; r < w_rows; r++) load_step(w[r], k, present, io, weight[r]);
#pragma GCC unroll 8
    for (int t = 0; t < n_x; t++) {
        operand value[PARTS];
        load_step(x[t], k, present, io, value);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 2
            for (int r = 0; r < w_rows; r++)
                sum[r][t][p % chains] = add_products(sum[r][t][p % chains], weight[r][p], value[p]);
    }
}

// Columns [begin, end) of w_rows rows of W and n_x rows of x, both constants, added to carry[row]
// unless begin is 0. What begins at `ahead` is prefetched; it may lie outside of W.
DENSE_INLINE void dot_part(const unsigned char *const *w, const unsigned char *ahead, int64_t begin,
                           int64_t end, const unsigned char *const *x, hb_dtype io,
                           const int w_rows, const int n_x, vector *const *carry)
{
    const int64_t item = io == HB_F32 ? 4 : 2;
    const int chains = n_x <= CHAINED_X ? PARTS : 1;
    vector sum[W_ROWS][MAX_X][PARTS];
#pragma GCC unroll 2
    for (int r = 0; r < w_rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int p = 0; p < chains; p++)
                sum[r][t][p] = begin > 0 && p == 0 ? carry[r][t] : no_sum();
    int64_t k = begin;
    for (; k + STEP <= end; k += STEP) {
#pragma GCC unroll 8
        for (int64_t line = 0; line < w_rows * STEP * item; line += 64)
            fetch(ahead + w_rows * (k - begin) * item + line);
        multiply_step(w, x, k, STEP, io, w_rows, n_x, chains, sum);
    }
    if (k < end) multiply_step(w, x, k, end - k, io, w_rows, n_x, chains, sum);
#pragma GCC unroll 2
    for (int r = 0; r < w_rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < n_x; t++) {
#pragma GCC unroll 4
            for (int p = 1; p < chains; p++) sum[r][t][0] = add_sums(sum[r][t][0], sum[r][t][p]);
            carry[r][t] = sum[r][t][0];
        }
}

// Columns that are taken at once: all, or about equal parts of x that fit in X_BYTES.
DENSE_INLINE int64_t columns_at_once(int64_t depth, int64_t row_bytes, const int n_x)
{
    const int64_t parts = (row_bytes * n_x + X_BYTES - 1) / X_BYTES;
    return parts <= 1 ? depth : (depth / parts + STEP) / STEP * STEP;
}

// n_x rows of x, of which the last ones may be copies: `stored` are asked for.
DENSE_INLINE void dot_rows(const void *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                           const void *x, int64_t x_stride, hb_dtype io, const int n_x, int stored,
                           float *y, int64_t y_stride)
{
    const int64_t item = io == HB_F32 ? 4 : 2, w_bytes = w_stride * item;
    const int w_rows = n_x <= 2 ? 1 : W_ROWS;
    const int64_t columns = w_rows == 1 ? depth : columns_at_once(depth, depth * item, n_x);
    int64_t group = GROUP_BYTES / (depth * item + 1) / 2 * 2;
    group = group < 2 ? 2 : group > GROUP_ROWS ? GROUP_ROWS : group;
    const int64_t distance = w_rows == 1        ? AHEAD_ONE
                             : columns == depth ? AHEAD_TWO
                                                : group * depth * item;
    const unsigned char *rows_of_x[MAX_X];
    vector sums[GROUP_ROWS][MAX_X];
#pragma GCC unroll 8
    for (int t = 0; t < n_x; t++)
        rows_of_x[t] = (const unsigned char *)x + (t < stored ? t : stored - 1) * x_stride * item;
    for (int64_t first = 0; first < n_rows; first += group) {
        const unsigned char *base = (const unsigned char *)w + first * w_bytes;
        const unsigned char *ahead = base + distance;
        const int64_t n = n_rows - first < group ? n_rows - first : group;
        int64_t begin = 0;
        do { // once where depth is 0
            const int64_t end = begin + columns < depth ? begin + columns : depth;
            for (int64_t r = 0; r < n; r += w_rows) {
                const int64_t second = r + 1 < n ? r + 1 : r;
                const unsigned char *rows[W_ROWS] = {base + r * w_bytes, base + second * w_bytes};
                vector *const carry[W_ROWS] = {sums[r], sums[second]};
                dot_part(rows, ahead, begin, end, rows_of_x, io, w_rows, n_x, carry);
                ahead += w_rows * (end - begin) * item;
            }
            begin = end;
        } while (begin < depth);
        for (int t = 0; t < stored; t++)
            for (int64_t r = 0; r < n; r++) y[t * y_stride + first + r] = total_of(sums[r][t]);
    }
}

#define DENSE_ROWS(n)                                                                              \
    dot_rows(w, w_stride, n_rows, depth, x, x_stride, io, (n) < MAX_X ? (n) : MAX_X, n_x, y,       \
             y_stride)

DENSE_INLINE void dot(hb_dtype io, const void *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const void *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    if (n_x == 1)
        DENSE_ROWS(1);
    else if (n_x == 2)
        DENSE_ROWS(2);
    else if (n_x <= 4)
        DENSE_ROWS(4);
    else
        DENSE_ROWS(8);
}

#endif
