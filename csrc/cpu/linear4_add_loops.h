// dx of a few rows: the loops over rows and columns of W that all x86 levels share. Included once
// by a file that defines ADD_UNTIL, ADD_GROUP_ROWS, TILE_ROWS and, over 64 columns at a time,
// add_chunk with its add_book.
#ifndef HB_CPU_LINEAR4_ADD_LOOPS_H
#define HB_CPU_LINEAR4_ADD_LOOPS_H

enum { ADD_CHUNK = 64 };

// `rows` rows of W from `first` on; those that come next are prefetched.
INLINE void add_some(const hb_matrix4 *w, int64_t first, int64_t n_cols, const add_book *b,
                     const float *packed_dy, const int rows, const int n_x, const bool bf16,
                     float *sums, int64_t sums_stride)
{
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    const float *dy = packed_dy + first / HB_LINEAR4_X_BLOCK * HB_LINEAR4_X_BLOCK * TILE_ROWS +
                      first % HB_LINEAR4_X_BLOCK;
    const uint8_t *packed[ADD_GROUP_ROWS];
    const float *absmax[ADD_GROUP_ROWS];
    for (int r = 0; r < rows; r++) {
        packed[r] = w->packed + (first + r) * w->row_bytes;
        absmax[r] = w->absmax + (first + r) * w->absmax_stride;
        for (int64_t i = 0; i <= (n_cols - 1) >> shift; i += 16)
            _mm_prefetch((const char *)(absmax[r] + rows * w->absmax_stride + i), _MM_HINT_T0);
    }
    int64_t k = 0;
    for (; k + ADD_CHUNK <= n_cols; k += ADD_CHUNK) {
        if (k % (2 * ADD_CHUNK) == 0)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                _mm_prefetch((const char *)packed[r] + k / 2 + rows * w->row_bytes, _MM_HINT_T0);
        if (shift == 5)
            add_chunk(b, packed, absmax, k, 5, false, true, dy, rows, n_x, bf16, sums, sums_stride);
        else
            add_chunk(b, packed, absmax, k, shift, false, false, dy, rows, n_x, bf16, sums,
                      sums_stride);
    }
    if (k < n_cols)
        add_chunk(b, packed, absmax, k, shift, true, false, dy, rows, n_x, bf16, sums, sums_stride);
}

INLINE void add_rows(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, const float *packed_dy,
                     const int n_x, const bool bf16, float *sums, int64_t sums_stride)
{
    const add_book b = make_add_book(w->codebook);
    int64_t r = 0;
    for (; r + ADD_GROUP_ROWS <= n_rows; r += ADD_GROUP_ROWS)
        add_some(w, r, n_cols, &b, packed_dy, ADD_GROUP_ROWS, n_x, bf16, sums, sums_stride);
    for (; r < n_rows; r++) add_some(w, r, n_cols, &b, packed_dy, 1, n_x, bf16, sums, sums_stride);
}

#endif
