// Sums of int8 products, two by one multiplication of int16: for many rows of x.
//
//   a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1
//
// 32 products take two additions of 16 int16, vpmaddwd, and an addition to the sums: four
// operations of which one is a multiplication, where widened products take two and two, and where
// bytes by vpmaddubsw take its vpsignb, which like multiplications runs on few ports (and without
// vpsignb saturate). |a + b| <= 256: a pair of products of such sums is at most 2^17, sums wrap
// around: exact for every code, -128 too.
//
//   row of a block   -(sums of a0 a1 by lanes), 8 int32 [HB_INT8_PAIR_ROW_BYTES]
//   group            a0 = the first 16 of 32 codes, a1 = the others, as int16
//   tile of x        the beginnings of 4 rows, then group after group, 4 rows each
//   panel of W       pairs of rows, each as a tile of two rows; an odd last one has zeros beside it
//
// The sums begin with what is to be subtracted. Registers: 8 sums, 4 for two rows of W, 4 for a row
// of x and its sums; a row of x is one piece of assembly, as gcc 12 moves sums to the stack and
// back otherwise, and keeps loads as operands where it was measured to be faster (8.7 cycles for 8
// x 32 products on Zen 4, where 8 are the least). Accuracy: exact (kernels_linear8.h).
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    TILE_X = HB_INT8_PAIR_X,
    TILE_W = 2,
    GROUP = HB_INT8_PAIR_GROUP,
    FROM = 3, // below dot_int8 has W in registers
};

// Codes k to k + 32 of a row, widened, with zeros from depth on.
INLINE void load_group(const int8_t *codes, int64_t n, __m256i *first, __m256i *second)
{
    int8_t buffer[GROUP];
    if (n < GROUP) {
        memset(buffer, 0, sizeof buffer);
        memcpy(buffer, codes, (size_t)n);
        codes = buffer;
    }
    *first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)codes));
    *second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(codes + 16)));
}

// One row of one block of `rows` rows; `block` is where the block begins.
INLINE void widen_row(const int8_t *codes, int64_t depth, const int64_t rows, int64_t row,
                      uint8_t *block)
{
    uint8_t *out = block + rows * HB_INT8_PAIR_ROW_BYTES + row * GROUP * 2;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += GROUP, out += rows * GROUP * 2) {
        __m256i first, second;
        load_group(codes + k, depth - k, &first, &second);
        _mm256_store_si256((void *)out, first);
        _mm256_store_si256((void *)(out + 32), second);
        sum = _mm256_sub_epi32(sum, _mm256_madd_epi16(first, second));
    }
    _mm256_store_si256((void *)(block + row * HB_INT8_PAIR_ROW_BYTES), sum);
}

static void widen_x(const int8_t *codes, int64_t depth, int row, void *tile)
{
    uint8_t *block = tile;
    int64_t k = 0;
    do {
        const int64_t n = depth - k < HB_INT8_PAIR_STEPS ? depth - k : HB_INT8_PAIR_STEPS;
        widen_row(codes + k, n, TILE_X, row, block);
        block += hb_int8_pair_bytes(n, TILE_X);
        k += n;
    } while (k < depth);
}

static void widen_w(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth, void *panel)
{
    uint8_t *block = panel;
    const int64_t bytes = hb_int8_pair_bytes(depth, TILE_W);
    for (int64_t r = 0; r < n_rows; r += TILE_W, block += bytes) {
        if (r + 1 == n_rows) memset(block, 0, (size_t)bytes);
        for (int64_t i = 0; i < TILE_W && r + i < n_rows; i++)
            widen_row(w + (r + i) * w_stride, depth, TILE_W, i, block);
    }
}

// A row of x of one group by two rows of W: first[], second[].
INLINE void add_pairs(__m256i sum[TILE_W], const __m256i *x, const __m256i first[TILE_W],
                      const __m256i second[TILE_W])
{
#if defined(HB_SIMDE)
    for (int r = 0; r < TILE_W; r++)
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(_mm256_add_epi16(x[0], second[r]),
                                                            _mm256_add_epi16(x[1], first[r])));
#else
    __m256i p, q, more_p, more_q;
    __asm__("vmovdqa %[x0], %[p]\n\t"
            "vpaddw %[x1], %[f1], %[q]\n\t"
            "vpaddw %[s1], %[p], %[more_p]\n\t"
            "vpmaddwd %[more_p], %[q], %[q]\n\t"
            "vpaddd %[q], %[sum1], %[sum1]\n\t"
            "vpaddw %[x1], %[f0], %[more_q]\n\t"
            "vpaddw %[s0], %[p], %[p]\n\t"
            "vpmaddwd %[p], %[more_q], %[p]\n\t"
            "vpaddd %[p], %[sum0], %[sum0]"
            : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [p] "=&x"(p), [q] "=&x"(q),
              [more_p] "=&x"(more_p), [more_q] "=&x"(more_q)
            : [x0] "m"(x[0]), [x1] "m"(x[1]), [f0] "x"(first[0]), [f1] "x"(first[1]),
              [s0] "x"(second[0]), [s1] "x"(second[1]));
#endif
}

// Halves of 128 bits: lanes of u in even places, of v in odd ones, two of each added up already.
INLINE __m256i fold(__m256i u, __m256i v)
{
    return _mm256_add_epi32(_mm256_unpacklo_epi32(u, v), _mm256_unpackhi_epi32(u, v));
}

// c[r] = (add: +=) v[r], r < n_w; with `high` v[2 + r].
INLINE void store_pair(__m128i v, const bool high, int64_t n_w, bool add, int32_t *c)
{
    if (high) v = _mm_unpackhi_epi64(v, v);
    if (n_w == TILE_W) {
        if (add) v = _mm_add_epi32(v, _mm_loadl_epi64((const void *)c));
        _mm_storel_epi64((void *)c, v);
    } else {
        *c = (int32_t)((uint32_t)_mm_cvtsi128_si32(v) + (add ? (uint32_t)*c : 0));
    }
}

// n_x rows of x, a constant at every call, by two rows of W, of which n_w count.
INLINE void multiply_tile(const uint8_t *w, int64_t depth, const uint8_t *x, const int n_x,
                          int64_t n_w, bool add, int32_t *c, int64_t c_stride)
{
    const __m256i *xs = (const void *)x, *ws = (const void *)w;
    __m256i sum[TILE_X][TILE_W];
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 2
        for (int r = 0; r < TILE_W; r++) sum[t][r] = _mm256_add_epi32(xs[t], ws[r]);
    xs += TILE_X, ws += TILE_W;
    for (int64_t k = 0; k < depth; k += GROUP, xs += 2 * TILE_X, ws += 2 * TILE_W) {
        const __m256i first[TILE_W] = {ws[0], ws[2]}, second[TILE_W] = {ws[1], ws[3]};
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) add_pairs(sum[t], xs + 2 * t, first, second);
    }
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t += 2) { // two rows of x at a time; an odd last one twice
        const int u = t + 1 < n_x ? t + 1 : t;
        const __m256i a = fold(sum[t][0], sum[t][1]), b = fold(sum[u][0], sum[u][1]);
        const __m256i s =
            _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
        const __m128i v = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        store_pair(v, false, n_w, add, c + t * c_stride);
        if (u != t) store_pair(v, true, n_w, add, c + u * c_stride);
    }
}

// Lines [begin, end) at p: two tiles and what passes by of W fit into L1.
static void fetch(const uint8_t *p, int64_t begin, int64_t end)
{
    for (int64_t line = begin; line < end; line++)
        _mm_prefetch((const char *)p + line * 64, _MM_HINT_T0);
}

INLINE void multiply_rows(const uint8_t *panel, int64_t n_rows, int64_t depth, const void *tile,
                          const void *next, const int n_x, bool add, int32_t *c, int64_t c_stride)
{
    const int64_t bytes = hb_int8_pair_bytes(depth, TILE_W);
    const int64_t lines = hb_int8_pair_bytes(depth, TILE_X) / 64;
    for (int64_t r = 0; r < n_rows; r += TILE_W, panel += bytes) {
        const int64_t n_w = n_rows - r < TILE_W ? n_rows - r : TILE_W;
        fetch(next, lines * r / n_rows, lines * (r + n_w) / n_rows);
        multiply_tile(panel, depth, tile, n_x, n_w, add, c + r, c_stride);
    }
}

static void multiply(const void *panel, int64_t n_rows, int64_t depth, const void *tile,
                     const void *next, int n_x, bool add, int32_t *c, int64_t c_stride)
{
    switch (n_x) {
    case 1: multiply_rows(panel, n_rows, depth, tile, next, 1, add, c, c_stride); break;
    case 2: multiply_rows(panel, n_rows, depth, tile, next, 2, add, c, c_stride); break;
    case 3: multiply_rows(panel, n_rows, depth, tile, next, 3, add, c, c_stride); break;
    default: multiply_rows(panel, n_rows, depth, tile, next, 4, add, c, c_stride); break;
    }
}

void hb_int8_pairs_table_avx2(hb_int8_pairs *pairs)
{
    pairs->from = FROM;
    pairs->widen_x = widen_x;
    pairs->widen_w = widen_w;
    pairs->multiply = multiply;
}
