// The same products as int8_pairs.h, a block of them by seven products of halves in place of eight:
// for so many rows of x that what widening and adding cost more is made good.
//
//   x = (A11 A12)   W^T = (B11 B12)   halves of x's rows, of the inner index, of W's rows
//       (A21 A22)         (B21 B22)
//
//   M1 = (A11 + A22) (B11 + B22)   M2 = (A21 + A22) B11   M3 = A11 (B12 - B22)
//   M4 = A22 (B21 - B11)           M5 = (A11 + A12) B22   M6 = (A21 - A11) (B11 + B12)
//   M7 = (A12 - A22) (B21 + B22)
//
//   C11 = M1 + M4 - M5 + M7   C12 = M3 + M5   C21 = M2 + M4   C22 = M1 - M2 + M3 + M6
//
// Source: V. Strassen, "Gaussian elimination is not optimal", Numer. Math. 13 (1969). Each M is a
// product of int8_pairs.h, whose elements are sums of two codes: at most 256, sums of those at most
// 512, a pair of products at most 2^19; all of it is exact modulo 2^32 as there.
//
//   tile of x     for each M: a block of TILE_X rows and half the inner indices, as there
//   panel of W    for each M: strips of the sums of HALF_W rows, as there
//
// The file that includes this defines what int8_pairs.h asks for, and sub_i32(u, v).
#ifndef HB_CPU_INT8_STRASSEN_H
#define HB_CPU_INT8_STRASSEN_H

#include "cpu/int8_pairs.h"

enum { PRODUCTS = 7, HALF_W = HB_INT8_PAIR_W / 2 };

// One of four quarters, or two of them added or (sign -1) subtracted: 2 * (first index - 1) +
// second index - 1.
typedef struct {
    int8_t one, other, sign;
} quarters;

static const quarters of_x[PRODUCTS] = {{0, 3, 1}, {2, 3, 1},  {0, 0, 0}, {3, 0, 0},
                                        {0, 1, 1}, {2, 0, -1}, {1, 3, -1}};
static const quarters of_w[PRODUCTS] = {{0, 3, 1}, {0, 0, 0}, {1, 3, -1}, {2, 0, -1},
                                        {3, 0, 0}, {0, 1, 1}, {2, 3, 1}};

INLINE __m256i combined(const __m256i quarter[4], const quarters q)
{
    if (q.sign > 0) return _mm256_add_epi16(quarter[q.one], quarter[q.other]);
    if (q.sign < 0) return _mm256_sub_epi16(quarter[q.one], quarter[q.other]);
    return quarter[q.one];
}

INLINE __m256i codes_or_zeros(const int8_t *codes, bool present, int64_t n)
{
    return present && n > 0 ? load_32_codes(codes, n) : _mm256_setzero_si256();
}

// Rows t and t + TILE_X of one block of x.
static inline void widen_x_halves(const int8_t *codes, int64_t x_stride, int n_x, int64_t depth,
                                  int t, uint8_t *block)
{
    const int64_t half = hb_int8_pair_half(depth);
    const int64_t bytes = hb_int8_pair_block_bytes(half, TILE_X);
    uint8_t *out = block + TILE_X * HB_INT8_PAIR_ROW_BYTES + t * GROUP * 2;
    __m256i sum[PRODUCTS];
    for (int p = 0; p < PRODUCTS; p++) sum[p] = _mm256_setzero_si256();
    for (int64_t k = 0; k < half; k += GROUP, out += TILE_X * GROUP * 2) {
        __m256i first[4], second[4];
        for (int i = 0; i < 4; i++) {
            const int row = t + i / 2 * TILE_X;
            const int64_t at = k + i % 2 * half;
            split_quads(codes_or_zeros(codes + row * x_stride + at, row < n_x, depth - at),
                        &first[i], &second[i]);
        }
#pragma GCC unroll 7
        for (int p = 0; p < PRODUCTS; p++) {
            const __m256i f = combined(first, of_x[p]), s = combined(second, of_x[p]);
            _mm256_storeu_si256((void *)(out + p * bytes), f);
            _mm256_storeu_si256((void *)(out + p * bytes + 32), s);
            sum[p] = _mm256_sub_epi32(sum[p], _mm256_madd_epi16(f, s));
        }
    }
    for (int p = 0; p < PRODUCTS; p++) {
        const int32_t total = sum_of_lanes(sum[p]);
        memcpy(block + p * bytes + t * HB_INT8_PAIR_ROW_BYTES, &total, sizeof total);
    }
}

static void widen_x_strassen(const int8_t *codes, int64_t x_stride, int n_x, int64_t depth,
                             void *tile)
{
    uint8_t *block = tile;
    int64_t k = 0;
    do {
        const int64_t n = depth - k < HB_INT8_PAIR_STEPS ? depth - k : HB_INT8_PAIR_STEPS;
        for (int t = 0; t < TILE_X; t++) widen_x_halves(codes + k, x_stride, n_x, n, t, block);
        block += PRODUCTS * hb_int8_pair_block_bytes(hb_int8_pair_half(n), TILE_X);
        k += n;
    } while (k < depth);
}

// Rows r..r + 7 of both halves of W, to eight lanes: beginnings and out are those of the first M.
static inline void widen_16_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t r,
                                 int64_t depth, uint8_t *beginnings, uint8_t *out)
{
    const int64_t half = hb_int8_pair_half(depth);
    const int64_t bytes = hb_int8_pair_block_bytes(half, HALF_W);
    __m256i sum[PRODUCTS];
    for (int p = 0; p < PRODUCTS; p++) sum[p] = _mm256_setzero_si256();
    for (int64_t k = 0; k < half; k += GROUP) {
        __m256i rows[4][8]; // B11, B12, B21, B22
        for (int i = 0; i < 4; i++) {
            const int64_t from = r + i % 2 * HALF_W, at = k + i / 2 * half;
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                rows[i][j] =
                    codes_or_zeros(w + (from + j) * w_stride + at, from + j < n_rows, depth - at);
            transpose_quads(rows[i]);
        }
        for (int q = 0; q < 8; q++, out += QUAD_BYTES) {
            __m256i first[4], second[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) split_quads(rows[i][q], &first[i], &second[i]);
#pragma GCC unroll 7
            for (int p = 0; p < PRODUCTS; p++) {
                const __m256i f = combined(first, of_w[p]), s = combined(second, of_w[p]);
                _mm256_storeu_si256((void *)(out + p * bytes), f);
                _mm256_storeu_si256((void *)(out + p * bytes + LANES * 4), s);
                sum[p] = _mm256_sub_epi32(sum[p], _mm256_madd_epi16(f, s));
            }
        }
    }
    for (int p = 0; p < PRODUCTS; p++)
        _mm256_storeu_si256((void *)(beginnings + p * bytes), sum[p]);
}

static void widen_w_strassen(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                             void *panel)
{
    const int64_t strip_bytes = hb_int8_pair_block_bytes(hb_int8_pair_half(depth), STRIP);
    for (int64_t r = 0; r < HALF_W; r += 8) {
        const int64_t in_strip = r % STRIP;
        uint8_t *strip = (uint8_t *)panel + r / STRIP * strip_bytes;
        uint8_t *out = strip + STRIP * HB_INT8_PAIR_ROW_BYTES + in_strip / LANES * LANES * 8 +
                       in_strip % LANES * 4;
        widen_16_rows(w, w_stride, n_rows, r, depth, strip + in_strip * 4, out);
    }
}

// What becomes of sums: c = v, c += v, c -= v.
enum { SET = 0, ADD = 1, SUBTRACT = 2, NOTHING = 3 };

INLINE void combine_sums(vector sum[TILE_X][VECTORS], int64_t n_x, int64_t n_w, const int how,
                         int32_t *c, int64_t c_stride)
{
#pragma GCC unroll 8
    for (int t = 0; t < TILE_X; t++) {
        if (t >= n_x) break;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            int32_t *at = c + t * c_stride + v * LANES;
            const vector value = how == SUBTRACT ? sub_i32(zero(), sum[t][v]) : sum[t][v];
            store_lanes(value, n_w - v * LANES, how != SET, at);
        }
    }
}

// Quarters of C that an M is added to, and how; `first` where nothing is there yet (C11 and C22 get
// M1 first, C21 M2, C12 M3).
typedef struct {
    int8_t quarter, first, how;
} target;

static const target targets[PRODUCTS][2] = {
    {{0, SET, ADD}, {3, SET, ADD}},           {{2, SET, ADD}, {3, SUBTRACT, SUBTRACT}},
    {{1, SET, ADD}, {3, ADD, ADD}},           {{0, ADD, ADD}, {2, ADD, ADD}},
    {{0, SUBTRACT, SUBTRACT}, {1, ADD, ADD}}, {{3, ADD, ADD}, {0, NOTHING, NOTHING}},
    {{0, ADD, ADD}, {0, NOTHING, NOTHING}},
};

static void multiply_strassen(const void *panel, int64_t n_rows, int64_t depth, const void *tile,
                              const void *next, int n_x, bool add, int32_t *c, int64_t c_stride)
{
    const int64_t half = hb_int8_pair_half(depth);
    const int64_t x_bytes = hb_int8_pair_block_bytes(half, TILE_X);
    const int64_t strip_bytes = hb_int8_pair_block_bytes(half, STRIP);
    enum { STRIPS = HALF_W / STRIP, LINES = TILE_X / STRIPS };
    const uint8_t *w = panel;
    for (int64_t i = 0; i < PRODUCTS * STRIPS; i++, w += strip_bytes) {
        const int64_t p = i / STRIPS, r = i % STRIPS * STRIP;
        const uint8_t *x = (const uint8_t *)tile + p * x_bytes;
        const uint8_t *then = p + 1 < PRODUCTS ? x + x_bytes : next;
        vector sum[TILE_X][VECTORS];
        sum_strip(w, half, x, TILE_X, then + i % STRIPS * LINES * 64, LINES, sum);
        for (int j = 0; j < 2; j++) {
            const target to = targets[p][j];
            const int64_t t = to.quarter / 2 * TILE_X, row = r + to.quarter % 2 * HALF_W;
            int32_t *at = c + t * c_stride + row;
            switch (add ? to.how : to.first) {
            case SET: combine_sums(sum, n_x - t, n_rows - row, SET, at, c_stride); break;
            case ADD: combine_sums(sum, n_x - t, n_rows - row, ADD, at, c_stride); break;
            case SUBTRACT: combine_sums(sum, n_x - t, n_rows - row, SUBTRACT, at, c_stride); break;
            default: break;
            }
        }
    }
}

#endif
