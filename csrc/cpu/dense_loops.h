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
//   fetch(address)      prefetches a line
//
// Two rows of W go together: they share the loads of x, and are two streams for the memory. Each is
// prefetched AHEAD of its use, at its end the row after the next. That is what a stream needs that
// the processor's own prefetchers end at each page of 4 KiB. At the last odd row of W, and for
// numbers of rows of x that have no loop of their own, a row is taken twice and its result dropped.
#ifndef HB_CPU_DENSE_LOOPS_H
#define HB_CPU_DENSE_LOOPS_H

#include "core/kernels_dense.h"

enum { W_ROWS = 2, AHEAD = 2048 }; // bytes

// Elements [k, k + present) of W_ROWS rows of W and n_x rows of x.
DENSE_INLINE void multiply_step(const unsigned char *const *w, const unsigned char *const *x,
                                int64_t k, int64_t present, hb_dtype io, const int n_x,
                                const int chains, vector (*sum)[MAX_X][PARTS])
{
    operand weight[W_ROWS][PARTS];
#pragma GCC unroll 2
    for (int r = 0; r < W_ROWS; r++) load_step(w[r], k, present, io, weight[r]);
#pragma GCC unroll 8
    for (int t = 0; t < n_x; t++) {
        operand value[PARTS];
        load_step(x[t], k, present, io, value);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 2
            for (int r = 0; r < W_ROWS; r++)
                sum[r][t][p % chains] = add_products(sum[r][t][p % chains], weight[r][p], value[p]);
    }
}

// Rows r and r + 1 of W (the second may be the first again); n_x is a constant.
DENSE_INLINE void dot_two(const unsigned char *const *w, int64_t w_bytes, int64_t depth,
                          const unsigned char *const *x, hb_dtype io, const int n_x,
                          float (*total)[W_ROWS])
{
    const int64_t item = io == HB_F32 ? 4 : 2;
    const int chains = n_x <= CHAINED_X ? PARTS : 1;
    const int64_t own_end = depth - AHEAD / item; // behind it the row after the next is prefetched
    vector sum[W_ROWS][MAX_X][PARTS];
#pragma GCC unroll 2
    for (int r = 0; r < W_ROWS; r++)
#pragma GCC unroll 8
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int p = 0; p < chains; p++) sum[r][t][p] = no_sum();
    int64_t k = 0;
    for (int own = 1; own >= 0; own--) {
        const int64_t end = own ? own_end : depth;
        const int64_t ahead = own ? AHEAD : AHEAD + W_ROWS * w_bytes - depth * item;
        for (; k + STEP <= end; k += STEP) {
#pragma GCC unroll 2
            for (int r = 0; r < W_ROWS; r++)
#pragma GCC unroll 2
                for (int64_t line = 0; line < STEP * item; line += 64)
                    fetch(w[r] + k * item + ahead + line);
            multiply_step(w, x, k, STEP, io, n_x, chains, sum);
        }
    }
    if (k < depth) multiply_step(w, x, k, depth - k, io, n_x, chains, sum);
#pragma GCC unroll 2
    for (int r = 0; r < W_ROWS; r++)
#pragma GCC unroll 8
        for (int t = 0; t < n_x; t++) {
#pragma GCC unroll 4
            for (int p = 1; p < chains; p++) sum[r][t][0] = add_sums(sum[r][t][0], sum[r][t][p]);
            total[t][r] = total_of(sum[r][t][0]);
        }
}

// n_x rows of x, of which the last ones may be copies: `stored` are asked for.
DENSE_INLINE void dot_rows(const void *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                           const void *x, int64_t x_stride, hb_dtype io, const int n_x, int stored,
                           float *y, int64_t y_stride)
{
    const int64_t item = io == HB_F32 ? 4 : 2;
    const unsigned char *rows_of_x[MAX_X];
#pragma GCC unroll 8
    for (int t = 0; t < n_x; t++)
        rows_of_x[t] = (const unsigned char *)x + (t < stored ? t : stored - 1) * x_stride * item;
    for (int64_t r = 0; r < n_rows; r += W_ROWS) {
        const unsigned char *first = (const unsigned char *)w + r * w_stride * item;
        const int n = r + 1 < n_rows ? 2 : 1;
        const unsigned char *rows[W_ROWS] = {first, n == 2 ? first + w_stride * item : first};
        float total[MAX_X][W_ROWS];
        dot_two(rows, w_stride * item, depth, rows_of_x, io, n_x, total);
        for (int t = 0; t < stored; t++)
            for (int i = 0; i < n; i++) y[t * y_stride + r + i] = total[t][i];
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
    else if (n_x == 3)
        DENSE_ROWS(3);
    else if (n_x == 4 || MAX_X == 4)
        DENSE_ROWS(4);
    else if (n_x <= 6)
        DENSE_ROWS(6);
    else
        DENSE_ROWS(8);
}

#define DENSE_DOT(name, io, isa)                                                                   \
    static void hb_dense_dot_##name##_##isa(const void *w, int64_t w_stride, int64_t n_rows,       \
                                            int64_t depth, const void *x, int64_t x_stride,        \
                                            int n_x, float *y, int64_t y_stride)                   \
    {                                                                                              \
        dot(io, w, w_stride, n_rows, depth, x, x_stride, n_x, y, y_stride);                        \
    }

#endif
