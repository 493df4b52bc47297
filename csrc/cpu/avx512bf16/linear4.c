// Products with 4-bit weights, AVX-512 with vdpbf16ps (and VBMI): the bfloat16 set.
//
// As avx512/linear4.c, with pairs of bfloat16 in each 32-bit lane and half the instructions.
//
// dot: vpermw takes its index from the low 5 bits of 16-bit lanes; with the codebook stored twice,
// four shifts of a 64-byte load give 128 weights: shift 4j of word i selects column 4i + (j ^ 1).
// decode_rows: as float32, two columns rounded together and interleaved by one vpermw.
// decode_cols: two rows' words side by side in a lane; their two scaled codebooks, rounded
// together, are the two halves of one table, and bit 4 of the index tells the rows apart.
//
// vdpbf16ps flushes subnormals and adds the pair's two products in an order of its own.
#include "cpu/linear4_avx512.h"
#include "cpu/linear4_entries.h"

enum { DOT_ROWS = 4, DOT_UNTIL = 32, TILE_ROWS = 6, TILE_COLS = 64, PANEL_STEPS = 256 };

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

static void hb_linear4_pack_x_bf16_avx512bf16(const void *x, hb_dtype dtype, int64_t x_stride,
                                              int n_x, int64_t steps, void *packed)
{
    uint16_t *out = packed;
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK)
        for (int t = 0; t < TILE_ROWS; t++) {
            __m256i words = _mm256_setzero_si256();
            if (t < n_x) {
                __mmask16 present = first_lanes(steps - s);
                if (dtype == HB_BF16) {
                    words =
                        _mm256_maskz_loadu_epi16(present, (const uint16_t *)x + t * x_stride + s);
                } else {
                    __m512 value = rounded_to_bf16(load_x(x, t * x_stride + s, dtype, present));
                    words =
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16));
                }
            }
            _mm256_store_si256((__m256i *)(out + s * TILE_ROWS + t * LANES), words);
        }
}

// 128 columns (fewer at the end: 32 i) of up to 16 rows into 16 columns of the panel.
INLINE void decode_16_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, __m512 codebook,
                           uint16_t *panel)
{
    // Dword l of the result: words l and 16 + l.
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i interleave = _mm512_or_si512(
        _mm512_add_epi32(lanes, _mm512_set1_epi32(0x00100000)), _mm512_slli_epi32(lanes, 16));
    const int64_t lanes_per_block = w->blocksize / 8;
    __m512i words[16];
    load_16_rows(w, n_rows, depth, words);
    __m512 scale = load_16_scales(w, n_rows, 0);
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i * 8 >= depth) break;
        if (i > 0 && i % 4 == 0 && i % lanes_per_block == 0)
            scale = load_16_scales(w, n_rows, i / lanes_per_block);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++) {
            __m512i odd_index = _mm512_srli_epi32(words[i], (unsigned)(8 * pair));
            __m512i even_index = _mm512_srli_epi32(words[i], (unsigned)(8 * pair + 4));
            __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(even_index, codebook), scale);
            __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(odd_index, codebook), scale);
            __m512i both = _mm512_permutexvar_epi16(interleave, bf16_words(odd, even));
            _mm512_store_si512(panel + (i * 4 + pair) * 2 * TILE_COLS, both);
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

static void hb_linear4_decode_cols_bf16_avx512bf16(const hb_matrix4 *w, int64_t n_rows,
                                                   int64_t n_cols, void *panel)
{
    const __m512 codebook = _mm512_load_ps(w->codebook);
    const __mmask16 present = first_lanes(n_cols / 4);
    const bool two_blocks = w->blocksize == 32 && n_cols > 32;
    const __m512i low_nibbles = _mm512_set1_epi16(15);
    // Column 16 v + i of the panel is nibble i % 4 (the even one of a byte is the high one) of word
    // 4 v + i / 4.
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8);
    const __m512i second_row = _mm512_set1_epi32(0x00100000);
    const __m512i second_block = _mm512_set1_epi32(0x00300020);
    for (int64_t r = 0; r < n_rows; r += 2) {
        const bool pair = r + 1 < n_rows;
        const uint8_t *row = w->packed + r * w->row_bytes;
        const float *absmax = w->absmax + r * w->absmax_stride;
        __m512i words = load_two_rows(row, pair ? row + w->row_bytes : NULL, present);
        prefetch_rows(row, w->row_bytes);
        __m512i table[2];
        for (int b = 0; b < 2; b++) {
            int at = two_blocks ? b : 0;
            __m512 low = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[at]));
            __m512 high =
                pair ? _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[w->absmax_stride + at]))
                     : _mm512_setzero_ps();
            table[b] = bf16_words(high, low);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            __m512i own = _mm512_permutexvar_epi32(
                _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * v)), words);
            // Bits of the second row that come into the first row's half are masked out.
            __m512i index = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(own, shift), low_nibbles,
                                                      v < 2 ? second_row : second_block,
                                                      0xea); // (a & b) | c
            _mm512_store_si512((uint16_t *)panel + r * TILE_COLS + v * 32,
                               _mm512_permutex2var_epi16(table[0], index, table[1]));
        }
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
        int64_t pairs =
            steps - s < HB_LINEAR4_X_BLOCK ? (steps - s + 1) / 2 : HB_LINEAR4_X_BLOCK / 2;
        const uint16_t *x = packed + s * TILE_ROWS;
#pragma GCC unroll 2
        for (int64_t i = 0; i < pairs; i++) {
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
