// Products with 4-bit weights, AVX-512 with vdpbf16ps (and VBMI): the bfloat16 set.
//
// As avx512/linear4.c, with pairs of bfloat16 in each 32-bit lane and half the instructions.
//
// dot: vpermw takes its index from the low 5 bits of 16-bit lanes; with the codebook stored twice,
// four shifts of a 64-byte load give 128 weights: shift 4j of word i selects column 4i + (j ^ 1).
// decode_rows: as float32, but 64-bit lanes are transposed: their halves are columns 8 apart, a
// pair of vdpbf16ps, and eight rows rounded together with eight others are 16 pairs in order.
// decode_cols: two rows' words side by side in a lane; their two scaled codebooks, rounded
// together, are the two halves of one table, and bit 4 of the index tells the rows apart.
//
// vdpbf16ps flushes subnormals and adds the pair's two products in an order of its own.
#include "cpu/linear4_avx512.h"
#include "cpu/linear4_entries.h"

enum { DOT_ROWS = 4, DOT_UNTIL = 32, TILE_ROWS = 6, TILE_COLS = 64, PANEL_STEPS = 256 };
enum { PAIRED = HB_LINEAR4_PAIRED_STEPS };

INLINE __m512 add_pair_products(__m512 sum, __m512i a, __m512i b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// Words 0..15 from `low`, 16..31 from `high`, rounded to nearest even.
INLINE __m512i bf16_words(__m512 high, __m512 low)
{
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Word i of the result is word 2i (odd: 2i + 1) of low and high behind one another.
INLINE __m512i every_other_word(__m512i low, __m512i high, bool odd)
{
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // Word pair (4l, 4l + 2), or both plus one.
    __m512i index =
        _mm512_add_epi16(_mm512_or_si512(_mm512_slli_epi32(lanes, 2), _mm512_slli_epi32(lanes, 18)),
                         _mm512_set1_epi32(odd ? 0x00030001 : 0x00020000));
    return _mm512_permutex2var_epi16(low, index, high);
}

// The 128 elements of x from k on in the order of a load of weights, four vectors.
INLINE void permute_group(const void *x, hb_dtype dtype, int64_t k, int64_t depth, __m512i *out)
{
    __m512i v[4], half[4];
    for (int i = 0; i < 4; i++) v[i] = load_x_bf16(x, k + i * 32, dtype, depth);
    for (int odd = 0; odd < 2; odd++) {
        half[2 * odd] = every_other_word(v[0], v[1], odd);
        half[2 * odd + 1] = every_other_word(v[2], v[3], odd);
    }
    for (int j = 0; j < 4; j++) {
        int column = j ^ 1, first = column & 1 ? 2 : 0;
        out[j] = every_other_word(half[first], half[first + 1], column >> 1);
    }
}

static void hb_linear4_permute_x_bf16_avx512bf16(const void *x, hb_dtype dtype, int64_t depth,
                                                 void *permuted)
{
    uint16_t *out = permuted;
    int64_t k = 0;
    for (; k + 256 <= depth; k += 256) {
        __m512i v[4], w[4];
        permute_group(x, dtype, k, depth, v);
        permute_group(x, dtype, k + 128, depth, w);
        for (int j = 0; j < 4; j++) {
            _mm512_store_si512(out + k + j * 32, _mm512_unpacklo_epi64(v[j], w[j]));
            _mm512_store_si512(out + k + 128 + j * 32, _mm512_unpackhi_epi64(v[j], w[j]));
        }
    }
    for (; k < depth; k += 128) {
        __m512i v[4];
        permute_group(x, dtype, k, depth, v);
        for (int j = 0; j < 4; j++) _mm512_store_si512(out + k + j * 32, v[j]);
    }
}

// ---- dot --------------------------------------------------------------------------------------

typedef __m512i dot_codebook;
typedef uint16_t dot_element;
enum { DOT_X_BYTES = 16 << 10, DOT_KEEPS_ONE = false }; // half an L1 cache

INLINE void multiply_words(const __m512i *words, __m512i codebook, const uint16_t *x,
                           int64_t x_stride, const int rows, const int n_x, bool add, __m512 *sum)
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i weight[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            weight[r] =
                _mm512_permutexvar_epi16(_mm512_srli_epi16(words[r], (unsigned)(4 * j)), codebook);
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            __m512i value = _mm512_load_si512(x + t * x_stride + j * 32);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m512 before = j == 0 && !add ? _mm512_setzero_ps() : sum[r * n_x + t];
                sum[r * n_x + t] = add_pair_products(before, weight[r], value);
            }
        }
    }
}

#include "cpu/linear4_dot_avx512.h"

INLINE void dot_blocks(const hb_matrix4 *w, int64_t n_rows, int64_t depth, int64_t blocksize,
                       __m512i codebook, const uint16_t *x, int n_x, float *y, int64_t y_stride)
{
    switch (n_x) {
    case 1: dot_rows(w, n_rows, depth, blocksize, codebook, x, 2, 1, y, y_stride); break;
    case 2: dot_rows(w, n_rows, depth, blocksize, codebook, x, 4, 2, y, y_stride); break;
    case 3: dot_rows(w, n_rows, depth, blocksize, codebook, x, 2, 3, y, y_stride); break;
    default: dot_rows(w, n_rows, depth, blocksize, codebook, x, 2, 4, y, y_stride); break;
    }
}

static void hb_linear4_dot_bf16_avx512bf16(const hb_matrix4 *w, int64_t n_rows, int64_t depth,
                                           const void *permuted, int n_x, float *y,
                                           int64_t y_stride)
{
    __m512 values = _mm512_load_ps(w->codebook);
    __m512i codebook = bf16_words(values, values);
    if (w->blocksize == 64)
        dot_blocks(w, n_rows, depth, 64, codebook, permuted, n_x, y, y_stride);
    else if (w->blocksize == 32)
        dot_blocks(w, n_rows, depth, 32, codebook, permuted, n_x, y, y_stride);
    else
        dot_blocks(w, n_rows, depth, w->blocksize < 128 ? 128 : w->blocksize, codebook, permuted,
                   n_x, y, y_stride);
}

// ---- panel ------------------------------------------------------------------------------------

// Two blocks of HB_LINEAR4_X_BLOCK steps of a row at a time.
static void hb_linear4_pack_x_bf16_avx512bf16(const void *x, hb_dtype dtype, int64_t x_stride,
                                              int n_x, int64_t steps, void *packed)
{
    enum { BLOCK = HB_LINEAR4_X_BLOCK };
    const size_t item = hb_dtype_bytes(dtype);
    uint16_t *out = packed;
    for (int64_t s = 0; s < steps; s += 2 * BLOCK)
        for (int t = 0; t < TILE_ROWS; t++) {
            __m512i words = _mm512_setzero_si512();
            if (t < n_x)
                words = paired_words(
                    load_x_bf16((const char *)x + (size_t)(t * x_stride) * item, s, dtype, steps));
            uint16_t *target = out + s * TILE_ROWS + t * BLOCK;
            _mm256_store_si256((__m256i *)target, _mm512_castsi512_si256(words));
            if (s + BLOCK < steps)
                _mm256_store_si256((__m256i *)(target + TILE_ROWS * BLOCK),
                                   _mm512_extracti64x4_epi64(words, 1));
        }
}

// Row `r` of the 16, the last one where there are fewer.
INLINE int64_t present_row(int64_t r, int64_t n_rows)
{
    return r < n_rows ? r : n_rows - 1;
}

// Columns 0..depth - 1 (at most 128) of rows first..first + 7: words[i] has columns 16i..16i+7 of
// row l in dword 2l, the 8 next ones in dword 2l + 1. The next line of each row is prefetched.
INLINE void load_8_rows(const hb_matrix4 *w, int64_t first, int64_t n_rows, int64_t depth,
                        __m512i *words)
{
    const __mmask16 present = first_lanes(depth / 8);
    __m512i v[8], a[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
        const uint8_t *row = w->packed + present_row(first + r, n_rows) * w->row_bytes;
        v[r] = _mm512_maskz_loadu_epi32(present, row);
        _mm_prefetch((const char *)row + 64, _MM_HINT_T0);
    }
    // a[2i + odd], 128-bit part p: rows 2i, 2i + 1 of word 2p + odd.
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++)
        transpose_parts(a[odd], a[2 + odd], a[4 + odd], a[6 + odd], words + odd, 2);
}

// Scales of block `block` of rows first..first + 7, each in both dwords of its row, and those of
// the block behind it, if there are `two`, else zeros.
INLINE void load_8_scales(const hb_matrix4 *w, int64_t first, int64_t n_rows, int64_t block,
                          bool two, __m512 *scale)
{
    __m128d part[4];
    for (int i = 0; i < 4; i++) {
        const float *even = w->absmax + present_row(first + 2 * i, n_rows) * w->absmax_stride;
        const float *odd = w->absmax + present_row(first + 2 * i + 1, n_rows) * w->absmax_stride;
        if (two)
            part[i] =
                _mm_castsi128_pd(_mm_unpacklo_epi64(_mm_loadl_epi64((const void *)(even + block)),
                                                    _mm_loadl_epi64((const void *)(odd + block))));
        else
            part[i] =
                _mm_castps_pd(_mm_movelh_ps(_mm_load_ss(even + block), _mm_load_ss(odd + block)));
    }
    __m512d all = _mm512_insertf64x2(
        _mm512_insertf64x2(_mm512_insertf64x2(_mm512_castpd128_pd512(part[0]), part[1], 1), part[2],
                           2),
        part[3], 3);
    __m512 pairs = _mm512_castpd_ps(all);
    scale[0] = _mm512_shuffle_ps(pairs, pairs, 0xa0);
    scale[1] = _mm512_shuffle_ps(pairs, pairs, 0xf5);
}

// 128 columns (fewer at the end: 32 i) of up to 16 rows into 16 columns of the panel. Dword 2l of a
// vector of eight rows is a column of row l, dword 2l + 1 the one that it makes a pair with, so
// that the roundings of both vectors together are 16 pairs.
INLINE void decode_16_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, __m512 codebook,
                           uint16_t *panel)
{
    const int64_t words_per_block = w->blocksize / 16;
    const bool two_blocks = w->blocksize == 64 && depth == HB_LINEAR4_X_GROUP;
    __m512i low[8], high[8];
    __m512 low_scale[2], high_scale[2];
    load_8_rows(w, 0, n_rows, depth, low);
    load_8_rows(w, 8, n_rows, depth, high);
    load_8_scales(w, 0, n_rows, 0, two_blocks, low_scale);
    load_8_scales(w, 8, n_rows, 0, two_blocks, high_scale);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        if (i * 16 >= depth) break;
        if (i > 0 && i % 2 == 0 && i % words_per_block == 0) {
            if (two_blocks) {
                low_scale[0] = low_scale[1];
                high_scale[0] = high_scale[1];
            } else {
                load_8_scales(w, 0, n_rows, i / words_per_block, false, low_scale);
                load_8_scales(w, 8, n_rows, i / words_per_block, false, high_scale);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            __m512i low_index = _mm512_srli_epi32(low[i], (unsigned)(4 * j));
            __m512i high_index = _mm512_srli_epi32(high[i], (unsigned)(4 * j));
            __m512 a = _mm512_mul_ps(_mm512_permutexvar_ps(low_index, codebook), low_scale[0]);
            __m512 b = _mm512_mul_ps(_mm512_permutexvar_ps(high_index, codebook), high_scale[0]);
            _mm512_store_si512(panel + (i * 8 + (j ^ 1)) * 2 * TILE_COLS, bf16_words(b, a));
        }
    }
}

static void hb_linear4_decode_rows_bf16_avx512bf16(const hb_matrix4 *w, int64_t n_rows,
                                                   int64_t depth, void *panel)
{
    __m512 codebook = _mm512_load_ps(w->codebook);
    for (int64_t k = 0; k < depth; k += HB_LINEAR4_X_GROUP) {
        int64_t columns = depth - k < HB_LINEAR4_X_GROUP ? depth - k : HB_LINEAR4_X_GROUP;
        for (int64_t r = 0; r < n_rows; r += 16) {
            hb_matrix4 part = part_of(w, r, k);
            decode_16_rows(&part, n_rows - r, columns, codebook,
                           (uint16_t *)panel + k * TILE_COLS + 2 * r);
        }
    }
}

// 64 columns (32: zeros in the upper lanes) of two rows: dword i = word i of both. `second` may be
// NULL.
INLINE __m512i load_two_rows(const uint8_t *row, const uint8_t *second, __mmask16 present)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, row));
    if (second == NULL) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Row 0 of `w` and, if `pair`, the one 8 below it, into 64 lanes of the panel.
INLINE void decode_two_rows(const hb_matrix4 *w, bool pair, bool two_blocks, __mmask16 present,
                            __m512 codebook, uint16_t *panel)
{
    const __m512i low_nibbles = _mm512_set1_epi16(15);
    // Column 16 v + i of the panel is nibble i % 4 (the even one of a byte is the high one) of word
    // 4 v + i / 4.
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8);
    const __m512i second_row = _mm512_set1_epi32(0x00100000);
    const __m512i second_block = _mm512_set1_epi32(0x00300020);
    const int64_t apart = PAIRED / 2;
    const float *second = w->absmax + apart * w->absmax_stride;
    __m512i words =
        load_two_rows(w->packed, pair ? w->packed + apart * w->row_bytes : NULL, present);
    __m512i table[2];
    for (int b = 0; b < 2; b++) {
        int at = two_blocks ? b : 0;
        __m512 low = _mm512_mul_ps(codebook, _mm512_set1_ps(w->absmax[at]));
        __m512 high = _mm512_setzero_ps();
        if (pair) high = _mm512_mul_ps(codebook, _mm512_set1_ps(second[at]));
        table[b] = bf16_words(high, low);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m512i own =
            _mm512_permutexvar_epi32(_mm512_add_epi32(quarter, _mm512_set1_epi32(4 * v)), words);
        // Bits of the second row that come into the first row's half are masked out.
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(own, shift), low_nibbles,
                                                  v < 2 ? second_row : second_block,
                                                  0xea); // (a & b) | c
        _mm512_store_si512(panel + v * 32, _mm512_permutex2var_epi16(table[0], index, table[1]));
    }
}

static void hb_linear4_decode_cols_bf16_avx512bf16(const hb_matrix4 *w, int64_t n_rows,
                                                   int64_t n_cols, void *panel)
{
    const __m512 codebook = _mm512_load_ps(w->codebook);
    const __mmask16 present = first_lanes(n_cols / 4);
    const bool two_blocks = w->blocksize == 32 && n_cols > 32;
    uint16_t *out = panel;
    int64_t begin = 0;
    for (; begin + PAIRED <= n_rows; begin += PAIRED)
        for (int64_t r = begin; r < begin + PAIRED / 2; r++, out += 2 * TILE_COLS) {
            hb_matrix4 rows = part_of(w, r, 0);
            _mm_prefetch((const char *)rows.packed + PAIRED * w->row_bytes, _MM_HINT_T0);
            _mm_prefetch((const char *)rows.packed + 3 * PAIRED / 2 * w->row_bytes, _MM_HINT_T0);
            decode_two_rows(&rows, true, two_blocks, present, codebook, out);
        }
    if (begin == n_rows) return;
    for (int64_t r = begin; r < begin + PAIRED / 2; r++, out += 2 * TILE_COLS) {
        hb_matrix4 rows = part_of(w, r, 0);
        if (r < n_rows)
            decode_two_rows(&rows, r + PAIRED / 2 < n_rows, two_blocks, present, codebook, out);
        else
            memset(out, 0, 2 * TILE_COLS * sizeof *out);
    }
}

// n_x rows of x times the panel; n_x is a constant at each call.
INLINE void tile(const uint16_t *packed, const uint16_t *panel, int64_t steps, bool accumulate,
                 float *sums, const int n_x)
{
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sum[t][c] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK) {
        const uint16_t *x = packed + s * TILE_ROWS;
#pragma GCC unroll 2
        for (int i = 0; i < HB_LINEAR4_X_BLOCK / 2; i++) {
            __m512i weight[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) weight[c] = _mm512_load_si512(panel + c * 32);
            panel += 2 * TILE_COLS;
#pragma GCC unroll 6
            for (int t = 0; t < n_x; t++) {
                int32_t two;
                memcpy(&two, x + t * LANES, sizeof two);
                __m512i value = _mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    sum[t][c] = add_pair_products(sum[t][c], value, weight[c]);
            }
            x += 2;
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            float *target = sums + t * TILE_COLS + c * LANES;
            if (accumulate) sum[t][c] = _mm512_add_ps(_mm512_load_ps(target), sum[t][c]);
            _mm512_store_ps(target, sum[t][c]);
        }
}

HB_LINEAR4_TILE(bf16, avx512bf16)

void hb_linear4_table_avx512bf16(hb_kernels_linear4 *kernels)
{
    hb_linear4_set set = {
        .dot_rows = DOT_ROWS,
        .dot_until = DOT_UNTIL,
        .tile_rows = TILE_ROWS,
        .tile_cols = TILE_COLS,
        .panel_steps = PANEL_STEPS,
        .pair = 2,
        .element_bytes = sizeof(uint16_t),
        .x_block = HB_LINEAR4_X_BLOCK,
        .columns_in_order = true,
        .permute_x = hb_linear4_permute_x_bf16_avx512bf16,
        .dot = hb_linear4_dot_bf16_avx512bf16,
        .pack_x = hb_linear4_pack_x_bf16_avx512bf16,
        .decode_rows = hb_linear4_decode_rows_bf16_avx512bf16,
        .decode_cols = hb_linear4_decode_cols_bf16_avx512bf16,
        .tile = hb_linear4_tile_bf16_avx512bf16,
    };
    for (int c = 0; c < TILE_COLS; c++) set.column_order[c] = (uint8_t)c;
    kernels->bf16 = set;
}
