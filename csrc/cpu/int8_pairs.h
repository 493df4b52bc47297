// Sums of int8 products, two by one multiplication of int16: for many rows of x, on x86 without
// multiplications of bytes that are exact.
//
//   a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1
//
// Four codes k, k + 1, k + 2, k + 3 of a row are a quad: first (k, k + 2), second (k + 1, k + 3),
// as int16 side by side in 32 bits. Lanes are rows of W, so that sums never have to be added across
// a vector; first and second of x are broadcast:
//
//   row of a block   -(sum of a0 a1), one int32                          [HB_INT8_PAIR_ROW_BYTES]
//   tile of x        the beginnings of TILE_X rows; then 32 codes of each: 8 first, 8 second
//   strip of W       LANES * VECTORS rows: the beginnings of all; then quad after quad, vector
//                    after vector: LANES first, LANES second
//
// One quad of one row of x and a vector of W is 4 LANES products in two additions of int16,
// vpmaddwd, and an addition to the sums: four operations for so many bytes, of which one is a
// multiplication, where widened products take two and two, and where bytes by vpmaddubsw take its
// vpsignb, which like multiplications runs on few ports (and without vpsignb saturate). |a + b| <=
// 256: a pair of products of such sums is at most 2^17, sums wrap around: exact for every code,
// -128 too. The sums begin with what is to be subtracted.
//
// The file that includes this defines `vector`, LANES (of 32 bits), VECTORS (of a strip), TILE_X
// (rows of x), and
//   load(p), store(p, v), add_i32(u, v), broadcast_i32(p)
//   add_quad(sum, first_of_x, second_of_x, first, second)   one row of x by VECTORS vectors of W
// Accuracy: exact (kernels_linear8.h).
#ifndef HB_CPU_INT8_PAIRS_H
#define HB_CPU_INT8_PAIRS_H

#include "cpu/codes8_x86.h"

enum {
    STRIP = LANES * VECTORS,
    GROUP = HB_INT8_PAIR_GROUP,
    QUAD_BYTES = STRIP * 8,
    LINES = TILE_X * STRIP / HB_INT8_PAIR_W,
};

// The first codes of quads and the second ones, widened.
INLINE void split_quads(__m256i codes, __m256i *first, __m256i *second)
{
    *first = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
    *second = _mm256_srai_epi16(codes, 8);
}

// One row of one block of x.
static inline void widen_x_block(const int8_t *codes, int64_t depth, int row, uint8_t *block)
{
    uint8_t *out = block + TILE_X * HB_INT8_PAIR_ROW_BYTES + row * GROUP * 2;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += GROUP, out += TILE_X * GROUP * 2) {
        __m256i first, second;
        split_quads(load_32_codes(codes + k, depth - k), &first, &second);
        _mm256_store_si256((void *)out, first);
        _mm256_store_si256((void *)(out + 32), second);
        sum = _mm256_sub_epi32(sum, _mm256_madd_epi16(first, second));
    }
    const int32_t total = sum_of_lanes(sum);
    memcpy(block + row * HB_INT8_PAIR_ROW_BYTES, &total, sizeof total);
}

static inline void widen_x(const int8_t *codes, int64_t x_stride, int n_x, int64_t depth,
                           void *tile)
{
    uint8_t *block = tile;
    int64_t k = 0;
    do {
        const int64_t n = depth - k < HB_INT8_PAIR_STEPS ? depth - k : HB_INT8_PAIR_STEPS;
        for (int t = 0; t < n_x; t++) widen_x_block(codes + t * x_stride + k, n, t, block);
        block += hb_int8_pair_bytes(n, TILE_X);
        k += n;
    } while (k < depth);
}

// Dword j of rows[i] becomes dword i of rows[j].
INLINE void transpose_quads(__m256i rows[8])
{
    __m256i two[8], four[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        two[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        two[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm256_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2x128_si256(four[j], four[j + 4], 0x20);
        rows[j + 4] = _mm256_permute2x128_si256(four[j], four[j + 4], 0x31);
    }
}

// Eight rows of W, `present` of them there, to eight lanes of a vector; out: where its first quad
// has them.
static inline void widen_8_rows(const int8_t *w, int64_t w_stride, int64_t present, int64_t depth,
                                int32_t *beginnings, uint8_t *out)
{
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += GROUP) {
        __m256i rows[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            rows[r] = r < present ? load_32_codes(w + r * w_stride + k, depth - k)
                                  : _mm256_setzero_si256();
        transpose_quads(rows);
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++, out += QUAD_BYTES) {
            __m256i first, second;
            split_quads(rows[q], &first, &second);
            _mm256_store_si256((void *)out, first);
            _mm256_store_si256((void *)(out + LANES * 4), second);
            sum = _mm256_sub_epi32(sum, _mm256_madd_epi16(first, second));
        }
    }
    _mm256_store_si256((void *)beginnings, sum);
}

static inline void widen_w(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                           void *panel)
{
    for (int64_t r = 0; r < n_rows; r += 8) {
        const int64_t strip = r / STRIP * STRIP, in_strip = r - strip;
        uint8_t *block = (uint8_t *)panel + strip / STRIP * hb_int8_pair_bytes(depth, STRIP);
        uint8_t *out = block + STRIP * HB_INT8_PAIR_ROW_BYTES + in_strip / LANES * LANES * 8 +
                       in_strip % LANES * 4;
        int32_t *beginnings = (int32_t *)block + in_strip;
        widen_8_rows(w + r * w_stride, w_stride, n_rows - r, depth, beginnings, out);
    }
}

// c[i] = (add: +=) v, n lanes of it.
INLINE void store_lanes(vector v, int64_t n, bool add, int32_t *c)
{
    if (n >= LANES) {
        store(c, add ? add_i32(load(c), v) : v);
        return;
    }
    int32_t lanes[LANES];
    store(lanes, v);
    for (int64_t i = 0; i < n; i++)
        c[i] = (int32_t)((uint32_t)lanes[i] + (add ? (uint32_t)c[i] : 0));
}

// sum[t][v]: n_x rows of x, a constant at every call, by a strip. Of the block of x at `next`,
// which comes after this one, each strip of a panel asks for LINES of TILE_X lines in each step:
// all at once, they would hold up the loads of W.
INLINE void sum_strip(const uint8_t *w, int64_t depth, const uint8_t *x, const int n_x,
                      const uint8_t *next, vector sum[TILE_X][VECTORS])
{
#pragma GCC unroll 8
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[t][v] =
                add_i32(broadcast_i32(x + t * HB_INT8_PAIR_ROW_BYTES), load(w + v * LANES * 4));
    x += TILE_X * HB_INT8_PAIR_ROW_BYTES, w += STRIP * HB_INT8_PAIR_ROW_BYTES;
    next += TILE_X * HB_INT8_PAIR_ROW_BYTES;
    for (int64_t k = 0; k < depth;
         k += GROUP, x += TILE_X * GROUP * 2, next += TILE_X * GROUP * 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LINES; i++) _mm_prefetch((const char *)next + i * 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int q = 0; q < GROUP / 4; q++, w += QUAD_BYTES) {
            vector first[VECTORS], second[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                first[v] = load(w + v * LANES * 8);
                second[v] = load(w + v * LANES * 8 + LANES * 4);
            }
#pragma GCC unroll 8
            for (int t = 0; t < n_x; t++) {
                const uint8_t *row = x + t * GROUP * 2 + q * 4;
                add_quad(sum[t], row, row + 32, first, second);
            }
        }
    }
}

INLINE void multiply_rows(const uint8_t *panel, int64_t n_rows, int64_t depth, const uint8_t *tile,
                          const uint8_t *next, const int n_x, int present, bool add, int32_t *c,
                          int64_t c_stride)
{
    const int64_t bytes = hb_int8_pair_bytes(depth, STRIP);
    for (int64_t r = 0; r < n_rows; r += STRIP, panel += bytes, next += LINES * 64) {
        const int64_t n_w = n_rows - r < STRIP ? n_rows - r : STRIP;
        vector sum[TILE_X][VECTORS];
        sum_strip(panel, depth, tile, n_x, next, sum);
#pragma GCC unroll 8
        for (int t = 0; t < n_x; t++) {
            if (t >= present) break;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                store_lanes(sum[t][v], n_w - v * LANES, add, c + r + t * c_stride + v * LANES);
        }
    }
}

static inline void multiply(const void *panel, int64_t n_rows, int64_t depth, const void *tile,
                            const void *next, int n_x, bool add, int32_t *c, int64_t c_stride)
{
    if (n_x > 4) { // where TILE_X is 8; the rows behind n_x are any
        multiply_rows(panel, n_rows, depth, tile, next, TILE_X, n_x, add, c, c_stride);
        return;
    }
    switch (n_x) {
    case 1: multiply_rows(panel, n_rows, depth, tile, next, 1, 1, add, c, c_stride); break;
    case 2: multiply_rows(panel, n_rows, depth, tile, next, 2, 2, add, c, c_stride); break;
    case 3: multiply_rows(panel, n_rows, depth, tile, next, 3, 3, add, c, c_stride); break;
    default: multiply_rows(panel, n_rows, depth, tile, next, 4, 4, add, c, c_stride); break;
    }
}

#endif
