// The loops of dot over rows and columns, for float32 and for pairs of bfloat16. Included behind
//
//   dot_element, dot_codebook                  an element of permuted x; the codebook in a register
//   multiply_words(words, codebook, x, x_stride, rows, n_x, add, sum)
//                                              sum[row][t] (+)= the weights of a vector of codes of
//                                              each row times the same 128 elements of x
//   DOT_X_BYTES                                of x that are used for several rows of W
//   DOT_KEEPS_ONE                              whether weights for one row of x pass through L2
//
// Two loads of codes of a row, 256 columns, are regrouped by 64-bit pieces so that a lane of both
// results belongs to one block (of 64 columns; larger ones cause no trouble, blocks of 32 fit too):
//
//   first load    a a a a a a a a b b b b b b b b       a, b: blocks of 64, lanes of 8 columns
//   second load   c c c c c c c c d d d d d d d d
//   both results  a a c c a a c c b b d d b b d d
//
// So 16 products of a lane are summed before they are scaled, not 8. Columns behind the last 256
// come in the order of a single load. Where all rows of x do not fit in DOT_X_BYTES, columns are
// taken in parts for which they do, and within a part a group of rows of W.
#ifndef HB_CPU_LINEAR4_DOT_AVX512_H
#define HB_CPU_LINEAR4_DOT_AVX512_H

#include "cpu/linear4_ahead.h"
#include "cpu/linear4_avx512.h"

// Scales of the 256 columns from `column` in the order of lanes of dot's pairs of loads: the
// 128-bit part p has dwords 4p.. of the first 128 columns in its lower half, of the second in its
// upper.
INLINE __m512 pair_scales(const float *absmax, int64_t column, int64_t blocksize, int shift)
{
    const float *scales = absmax + (column >> shift);
    if (blocksize >= 256) return _mm512_set1_ps(scales[0]);
    if (blocksize == 128)
        return _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1),
            _mm512_castps128_ps512(_mm_setr_ps(scales[0], scales[1], 0.0f, 0.0f)));
    if (blocksize == 64)
        return _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 2, 2, 0, 0, 2, 2, 1, 1, 3, 3, 1, 1, 3, 3),
            _mm512_castps128_ps512(_mm_loadu_ps(scales)));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7),
                                 _mm512_castps256_ps512(_mm256_loadu_ps(scales)));
}

// The sums of the lanes of four vectors, each in the same order.
INLINE __m128 sums_of_lanes(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 sum = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

enum {
    DOT_GROUP = 16, // rows of W that use a part of x, where not all do
};

// Columns that dot takes at once, of a depth: a multiple of 256.
INLINE int64_t dot_columns(int64_t depth, int n_x)
{
    const int64_t most = DOT_X_BYTES / (n_x * (int)sizeof(dot_element)) / 256 * 256;
    // Parts of about the same size.
    const int64_t parts = hb_ceil_div(depth, most);
    return parts <= 1 ? depth : hb_round_up(hb_ceil_div(depth, parts), 256);
}

// y[t * y_stride + r] (+)= the sum of the lanes of total[r * n_x + t]; rows * n_x <= 8.
INLINE void store_dot(const __m512 *total, const int rows, const int n_x, bool add, float *y,
                      int64_t y_stride)
{
    const int n = rows * n_x;
    _Alignas(16) float sums[8];
    for (int i = 0; i < n; i += 4) {
        __m128 four = sums_of_lanes(total[i], total[i + 1 < n ? i + 1 : i],
                                    total[i + 2 < n ? i + 2 : i], total[i + 3 < n ? i + 3 : i]);
        _mm_store_ps(sums + i, four);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < n_x; t++) {
            float *at = y + t * y_stride + r;
            *at = add ? *at + sums[r * n_x + t] : sums[r * n_x + t];
        }
}

INLINE void add_scaled(const __m512 *scale, const __m512 *sum, const int rows, const int n_x,
                       __m512 *total)
{
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++)
            total[r * n_x + t] = _mm512_fmadd_ps(scale[r], sum[r * n_x + t], total[r * n_x + t]);
}

// Columns [begin, end) of `rows` rows of W from row `first` times n_x rows of x, both small
// constants; added to y unless begin is 0. What is at `ahead` and `scales_ahead` is asked for as in
// linear4_ahead.h.
INLINE void dot_some(const hb_matrix4 *w, int64_t first, const uint8_t *ahead,
                     const float *scales_ahead, bool keep, int64_t begin, int64_t end,
                     int64_t depth, int64_t blocksize, dot_codebook codebook, const dot_element *x,
                     const int rows, const int n_x, float *y, int64_t y_stride)
{
    const int shift = __builtin_ctzll((unsigned long long)blocksize);
    const int64_t x_stride = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    const uint8_t *packed[4];
    const float *absmax[4];
    __m512 total[8], sum[8], scale[4];
    __m512i low[4], high[4];
    for (int r = 0; r < rows; r++) {
        packed[r] = w->packed + (first + r) * w->row_bytes;
        absmax[r] = w->absmax + (first + r) * w->absmax_stride;
        for (int t = 0; t < n_x; t++) total[r * n_x + t] = _mm512_setzero_ps();
    }
    int64_t k = begin;
    for (; k + 256 <= end; k += 256) {
        _mm_prefetch((const char *)(scales_ahead + ((k - begin) >> shift) * rows), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m512i v = _mm512_loadu_si512(packed[r] + k / 2);
            __m512i v_next = _mm512_loadu_si512(packed[r] + k / 2 + 64);
            low[r] = _mm512_unpacklo_epi64(v, v_next);
            high[r] = _mm512_unpackhi_epi64(v, v_next);
            scale[r] = pair_scales(absmax[r], k, blocksize, shift);
            const char *line = (const char *)ahead + (k - begin) / 2 * rows + 128 * r;
            ask_ahead(line, 2, keep);
        }
        multiply_words(low, codebook, x + k, x_stride, rows, n_x, false, sum);
        multiply_words(high, codebook, x + k + 128, x_stride, rows, n_x, true, sum);
        add_scaled(scale, sum, rows, n_x, total);
    }
    for (; k < end; k += 128) {
        __mmask16 present = first_lanes((depth - k) / 8);
        for (int r = 0; r < rows; r++) {
            low[r] = _mm512_maskz_loadu_epi32(present, packed[r] + k / 2);
            scale[r] = group_scales(absmax[r], k, depth, blocksize, shift);
        }
        multiply_words(low, codebook, x + k, x_stride, rows, n_x, false, sum);
        add_scaled(scale, sum, rows, n_x, total);
    }
    store_dot(total, rows, n_x, begin > 0, y + first, y_stride);
}

INLINE void dot_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, int64_t blocksize,
                     dot_codebook codebook, const dot_element *x, const int rows, const int n_x,
                     float *y, int64_t y_stride)
{
    const int64_t columns = dot_columns(depth, n_x);
    const bool part = columns < depth;
    const bool keep = part || n_x > 1 || DOT_KEEPS_ONE;
    const int64_t distance = bytes_ahead(rows, w->row_bytes, keep);
    const int64_t group = part ? DOT_GROUP : n_rows;
    for (int64_t g = 0; g < n_rows; g += group) {
        const int64_t row_end = hb_least(g + group, n_rows);
        for (int64_t k = 0; k < depth; k += columns) {
            const int64_t end = hb_least(k + columns, depth);
            const uint8_t *ahead = part ? w->packed + (g + group) * w->row_bytes + k / 2 * group
                                        : w->packed + distance;
            const float *scales =
                part ? w->absmax + (g + group) * w->absmax_stride + k / blocksize * group
                     : w->absmax + distance * 2 / blocksize;
            int64_t r = g;
            for (; r + rows <= row_end; r += rows)
                dot_some(w, r, ahead + (r - g) * (end - k) / 2,
                         scales + (r - g) * ((end - k) / blocksize), keep, k, end, depth, blocksize,
                         codebook, x, rows, n_x, y, y_stride);
            for (; rows > 1 && r < row_end; r++)
                dot_some(w, r, ahead + (r - g) * (end - k) / 2,
                         scales + (r - g) * ((end - k) / blocksize), keep, k, end, depth, blocksize,
                         codebook, x, 1, n_x, y, y_stride);
        }
    }
}

#endif
