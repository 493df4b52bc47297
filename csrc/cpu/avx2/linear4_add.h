// dx of a few rows, AVX2 + FMA: rows of W added to sums of its columns. Part of avx2/linear4.c,
// whose lookup and scales it uses.
#ifndef HB_CPU_AVX2_LINEAR4_ADD_H
#define HB_CPU_AVX2_LINEAR4_ADD_H

// The 64 columns from `column` (32 when `half`) of `rows` rows, times n_x rows of dy, onto sums in
// the order of permuted x. The upper lanes of a half have weights 0.
INLINE void add_chunk(const book *b, const uint8_t *const *packed, const float *const *absmax,
                      int64_t column, int shift, const bool half, const bool two_blocks,
                      const float *dy, const int rows, const int n_x, const bool bf16, float *sums,
                      int64_t sums_stride)
{
    float *target = sums + column;
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++, target += 4 * LANES) {
        __m256 sum[ADD_UNTIL][4];
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sum[t][v] = _mm256_load_ps(target + t * sums_stride + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const void *at = packed[r] + column / 2;
            __m256i bytes =
                half ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(at), 0)
                     : _mm256_loadu_si256(at);
            __m256 scale = two_blocks || half ? chunk_scale(absmax[r], column, shift, half)
                                              : _mm256_broadcast_ss(absmax[r] + (column >> shift));
            if (bf16) scale = sane_scale(scale);
            __m256 value[4];
            look_up_f32(b, nibbles(bytes, n), value);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                value[v] = _mm256_mul_ps(value[v], scale);
                if (bf16) value[v] = rounded_weight(value[v]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++) {
                __m256 factor = _mm256_broadcast_ss(dy + t * HB_LINEAR4_X_BLOCK + r);
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++)
                    sum[t][v] = _mm256_fmadd_ps(value[v], factor, sum[t][v]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                _mm256_store_ps(target + t * sums_stride + v * LANES, sum[t][v]);
    }
}

INLINE void add_some(const hb_matrix4 *w, int64_t first, int64_t n_cols, const book *b,
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
        for (int64_t i = 0; i <= (n_cols - 1) >> shift; i += 16) // the rows that come next
            _mm_prefetch((const char *)(absmax[r] + rows * w->absmax_stride + i), _MM_HINT_T0);
    }
    int64_t k = 0;
    for (; k + CHUNK <= n_cols; k += CHUNK) {
        if (k % (2 * CHUNK) == 0)
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
    const book b = make_book(w->codebook, false);
    int64_t r = 0;
    for (; r + ADD_GROUP_ROWS <= n_rows; r += ADD_GROUP_ROWS)
        add_some(w, r, n_cols, &b, packed_dy, ADD_GROUP_ROWS, n_x, bf16, sums, sums_stride);
    for (; r < n_rows; r++) add_some(w, r, n_cols, &b, packed_dy, 1, n_x, bf16, sums, sums_stride);
}

#endif
