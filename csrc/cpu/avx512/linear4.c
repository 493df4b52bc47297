// Products with 4-bit weights, AVX-512 (F, BW, DQ, VL).
//
// Decoding: vpermps takes its index from the low 4 bits of each lane and ignores the rest. A load
// of 64 bytes is 16 lanes of 8 codes; shifted by 0, 4, .. 28 bits it is eight index vectors, so 128
// weights cost eight permutes of the codebook and seven shifts, no masks and no unpacking:
//
//   lane i = bytes 4i..4i+3; after a shift by 4j it selects column 8i + (j ^ 1)   (high nibble
//   first)
//
// dot keeps that order and permutes x once per call instead; permuted[16j + i] = x[8i + (j ^ 1)] in
// every group of 128. The sum of a group's 8 products is scaled once: blocks are 4, 8 or 16 lanes.
// decode_rows transposes 16 rows x 16 lanes of packed codes first, so that a lane is a row of W;
// decode_cols widens 16-bit words to lanes and leaves columns in the order 4i + (j ^ 1).
//
// The bfloat16 set is the same arithmetic on rounded values, for processors without vdpbf16ps.
#include "cpu/linear4_avx512.h"
#include "cpu/linear4_entries.h"

enum {
    DOT_ROWS = 4,
    DOT_UNTIL = 24,
    TILE_ROWS = 6,
    TILE_COLS = 64,
    PANEL_STEPS = 128,
    ADD_UNTIL = 4,
    ADD_GROUP_ROWS = 4
};

// ---- dot --------------------------------------------------------------------------------------

// v[2m], v[2m + 1] hold 32 elements in order; their even ones go to v[m], odd ones to v[n/2 + m].
INLINE void deinterleave(__m512 *v, int n)
{
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    __m512 out[8];
    for (int m = 0; m < n / 2; m++) {
        out[m] = _mm512_permutex2var_ps(v[2 * m], even, v[2 * m + 1]);
        out[n / 2 + m] = _mm512_permutex2var_ps(v[2 * m], odd, v[2 * m + 1]);
    }
    for (int m = 0; m < n; m++) v[m] = out[m];
}

// The 128 elements of x from k on in the order of a load of weights, eight vectors.
INLINE void permute_group(const void *x, hb_dtype dtype, int64_t k, int64_t depth, bool bf16,
                          __m512 *out)
{
    __m512 v[8];
    for (int i = 0; i < 8; i++) {
        v[i] = load_x(x, k + i * LANES, dtype, first_lanes(depth - k - i * LANES));
        if (bf16) v[i] = rounded_to_bf16(v[i]);
    }
    // Element 8i + c: bit 0 of c, then bit 1, then bit 2 is split off.
    deinterleave(v, 8);
    deinterleave(v, 4);
    deinterleave(v + 4, 4);
    for (int i = 0; i < 8; i += 2) deinterleave(v + i, 2);
    // v[4a + 2b + c] now holds column offset a + 2b + 4c.
    for (int j = 0; j < 8; j++) {
        int column = j ^ 1;
        out[j] = v[(column & 1) * 4 + (column & 2) + (column >> 2)];
    }
}

INLINE void permute_x(const void *x, hb_dtype dtype, int64_t depth, bool bf16, float *permuted)
{
    int64_t k = 0;
    for (; k + 256 <= depth; k += 256) {
        __m512 v[8], w[8];
        permute_group(x, dtype, k, depth, bf16, v);
        permute_group(x, dtype, k + 128, depth, bf16, w);
        for (int j = 0; j < 8; j++) {
            __m512d a = _mm512_castps_pd(v[j]), b = _mm512_castps_pd(w[j]);
            _mm512_store_pd(permuted + k + j * LANES, _mm512_unpacklo_pd(a, b));
            _mm512_store_pd(permuted + k + 128 + j * LANES, _mm512_unpackhi_pd(a, b));
        }
    }
    for (; k < depth; k += 128) {
        __m512 v[8];
        permute_group(x, dtype, k, depth, bf16, v);
        for (int j = 0; j < 8; j++) _mm512_store_ps(permuted + k + j * LANES, v[j]);
    }
}

typedef __m512 dot_codebook;
typedef float dot_element;
enum { DOT_X_BYTES = 1 << 30, DOT_KEEPS_ONE = true }; // parts of x gained nothing

INLINE void multiply_words(const __m512i *words, __m512 codebook, const float *x, int64_t x_stride,
                           const int rows, const int n_x, bool add, __m512 *sum)
{
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        __m512 weight[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            weight[r] =
                _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], (unsigned)(4 * j)), codebook);
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            __m512 value = _mm512_load_ps(x + t * x_stride + j * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r * n_x + t] = j == 0 && !add
                                       ? _mm512_mul_ps(weight[r], value)
                                       : _mm512_fmadd_ps(weight[r], value, sum[r * n_x + t]);
        }
    }
}

#include "cpu/linear4_dot_avx512.h"

INLINE void dot_blocks(const hb_matrix4 *w, int64_t n_rows, int64_t depth, int64_t blocksize,
                       __m512 codebook, const float *x, int n_x, float *y, int64_t y_stride)
{
    switch (n_x) {
    case 1: dot_rows(w, n_rows, depth, blocksize, codebook, x, 4, 1, y, y_stride); break;
    case 2: dot_rows(w, n_rows, depth, blocksize, codebook, x, 4, 2, y, y_stride); break;
    case 3: dot_rows(w, n_rows, depth, blocksize, codebook, x, 2, 3, y, y_stride); break;
    default: dot_rows(w, n_rows, depth, blocksize, codebook, x, 2, 4, y, y_stride); break;
    }
}

INLINE void dot(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const float *x, int n_x,
                bool bf16, float *y, int64_t y_stride)
{
    __m512 codebook = _mm512_load_ps(w->codebook);
    if (bf16) codebook = rounded_to_bf16(codebook);
    if (w->blocksize == 64)
        dot_blocks(w, n_rows, depth, 64, codebook, x, n_x, y, y_stride);
    else if (w->blocksize == 32)
        dot_blocks(w, n_rows, depth, 32, codebook, x, n_x, y, y_stride);
    else
        dot_blocks(w, n_rows, depth, w->blocksize < 128 ? 128 : w->blocksize, codebook, x, n_x, y,
                   y_stride);
}

// ---- panel ------------------------------------------------------------------------------------

INLINE void pack_x(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   bool bf16, float *packed)
{
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK) {
        __mmask16 present = first_lanes(steps - s);
        for (int t = 0; t < TILE_ROWS; t++) {
            __m512 value = _mm512_setzero_ps();
            if (t < n_x) value = load_x(x, t * x_stride + s, dtype, present);
            _mm512_store_ps(packed + s * TILE_ROWS + t * LANES,
                            bf16 ? rounded_to_bf16(value) : value);
        }
    }
}

// 128 columns (fewer at the end: 32 i) of up to 16 rows into 16 columns of the panel.
INLINE void decode_16_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, __m512 codebook,
                           bool bf16, float *panel)
{
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
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            __m512i index = _mm512_srli_epi32(words[i], (unsigned)(4 * j));
            __m512 weight = _mm512_mul_ps(_mm512_permutexvar_ps(index, codebook), scale);
            if (bf16) weight = rounded_to_bf16(weight);
            _mm512_store_ps(panel + (i * 8 + (j ^ 1)) * TILE_COLS, weight);
        }
    }
}

INLINE void decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, bool bf16, float *panel)
{
    __m512 codebook = _mm512_load_ps(w->codebook);
    for (int64_t r = 0; r < n_rows; r += 16) {
        hb_matrix4 part = part_of(w, r, 0);
        decode_16_rows(&part, n_rows - r, depth, codebook, bf16, panel + r);
    }
}

// A row has one block here, or two of 32: its codebook is scaled (and rounded) once, and what is
// looked up in it needs nothing more.
INLINE void decode_cols(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, bool bf16,
                        float *panel)
{
    __m512 codebook = _mm512_load_ps(w->codebook);
    __mmask16 present = first_lanes(n_cols / 4);
    const bool two_blocks = w->blocksize == 32 && n_cols > 32;
    for (int64_t r = 0; r < n_rows; r++) {
        const uint8_t *row = w->packed + r * w->row_bytes;
        const float *absmax = w->absmax + r * w->absmax_stride;
        __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, row));
        __m512 table = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[0])), second = table;
        if (two_blocks) second = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[1]));
        if (bf16) table = rounded_to_bf16(table);
        if (bf16 && two_blocks) second = rounded_to_bf16(second);
        if (r % 2 == 0) prefetch_rows(row, w->row_bytes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512i index = _mm512_srli_epi32(words, (unsigned)(4 * j));
            __m512 weight = _mm512_permutexvar_ps(index, table);
            if (two_blocks) weight = _mm512_mask_permutexvar_ps(weight, 0xff00, index, second);
            _mm512_store_ps(panel + r * TILE_COLS + j * LANES, weight);
        }
    }
}

// ---- add --------------------------------------------------------------------------------------

// The 64 columns from `column` (32 when `half`) of `rows` rows, times n_x rows of dy, onto sums, in
// the order of decode_cols and with its weights.
INLINE void add_chunk(const __m512 *codebook, const uint8_t *const *packed,
                      const float *const *absmax, int64_t column, int shift, const bool half,
                      const bool two_blocks, const float *dy, const int rows, const int n_x,
                      const bool bf16, float *sums, int64_t sums_stride)
{
    float *target = sums + column;
    __m512 sum[ADD_UNTIL][4];
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[t][j] = _mm512_load_ps(target + t * sums_stride + j * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const void *at = packed[r] + column / 2;
        __m256i bytes = half ? _mm256_zextsi128_si256(_mm_loadu_si128(at)) : _mm256_loadu_si256(at);
        __m512i words = _mm512_cvtepu16_epi32(bytes);
        const float *scale = absmax[r] + (column >> shift);
        __m512 table = _mm512_mul_ps(*codebook, _mm512_set1_ps(scale[0])), second = table;
        if (two_blocks) second = _mm512_mul_ps(*codebook, _mm512_set1_ps(scale[1]));
        if (bf16) table = rounded_to_bf16(table);
        if (bf16 && two_blocks) second = rounded_to_bf16(second);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512i index = _mm512_srli_epi32(words, (unsigned)(4 * j));
            __m512 weight = _mm512_permutexvar_ps(index, table);
            if (two_blocks) weight = _mm512_mask_permutexvar_ps(weight, 0xff00, index, second);
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++)
                sum[t][j] = _mm512_fmadd_ps(weight, _mm512_set1_ps(dy[t * HB_LINEAR4_X_BLOCK + r]),
                                            sum[t][j]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm512_store_ps(target + t * sums_stride + j * LANES, sum[t][j]);
}

typedef __m512 add_book;

INLINE add_book make_add_book(const float *codebook)
{
    return _mm512_load_ps(codebook);
}

#include "cpu/linear4_add_loops.h"

// ---- tile -------------------------------------------------------------------------------------

// n_x rows of x times the panel; n_x is a constant at each call.
INLINE void tile(const float *packed, const float *panel, int64_t steps, bool accumulate,
                 float *sums, const int n_x)
{
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sum[t][c] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK) {
        int64_t block = steps - s < HB_LINEAR4_X_BLOCK ? steps - s : HB_LINEAR4_X_BLOCK;
        const float *x = packed + s * TILE_ROWS;
#pragma GCC unroll 2
        for (int64_t i = 0; i < block; i++) {
            __m512 weight[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) weight[c] = _mm512_load_ps(panel + c * LANES);
            panel += TILE_COLS;
#pragma GCC unroll 6
            for (int t = 0; t < n_x; t++) {
                __m512 value = _mm512_set1_ps(x[t * LANES]);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    sum[t][c] = _mm512_fmadd_ps(value, weight[c], sum[t][c]);
            }
            x++;
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

// ---- entries -----------------------------------------------------------------------------------

HB_LINEAR4_ENTRIES(f32, avx512, false)
HB_LINEAR4_ENTRIES(bf16, avx512, true)
HB_LINEAR4_ADD_ENTRY(f32, avx512, false)
HB_LINEAR4_ADD_ENTRY(bf16, avx512, true)
HB_LINEAR4_TILE(f32, avx512)

// 16 of them, or the `present` ones; a full store is written as one, since masked stores are slow
// on some processors.
INLINE void finish_16(const float *sums, const float *bias, hb_dtype dtype, void *y, int64_t i,
                      const bool full, __mmask16 present)
{
    __m512 value = _mm512_maskz_loadu_ps(present, sums + i);
    if (bias != NULL) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(present, bias + i));
    if (dtype == HB_F32) {
        if (full)
            _mm512_storeu_ps((float *)y + i, value);
        else
            _mm512_mask_storeu_ps((float *)y + i, present, value);
        return;
    }
    __m256i half;
    if (dtype == HB_F16) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m512i bits = _mm512_castps_si512(rounded_to_bf16(value));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    }
    if (full)
        _mm256_storeu_si256((__m256i *)((uint16_t *)y + i), half);
    else
        _mm256_mask_storeu_epi16((uint16_t *)y + i, present, half);
}

static void hb_linear4_finish_avx512(const float *sums, const float *bias, int64_t n,
                                     hb_dtype dtype, void *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) finish_16(sums, bias, dtype, y, i, true, 0xffff);
    if (i < n) finish_16(sums, bias, dtype, y, i, false, first_lanes(n - i));
}

void hb_linear4_table_avx512(hb_kernels_linear4 *kernels)
{
    kernels->f32 = HB_LINEAR4_SET(f32, avx512);
    kernels->bf16 = HB_LINEAR4_SET(bf16, avx512);
    kernels->bf16.dot_until = 32; // its panels are rounded weight by weight, dot's weights are not
    for (int c = 0; c < TILE_COLS; c++)
        kernels->bf16.column_order[c] = kernels->f32.column_order[c] =
            (uint8_t)(4 * (c % LANES) + (c / LANES ^ 1));
    memcpy(kernels->f32.add_order, kernels->f32.column_order, sizeof kernels->f32.add_order);
    memcpy(kernels->bf16.add_order, kernels->f32.add_order, sizeof kernels->bf16.add_order);
    kernels->bf16.add_until = kernels->f32.add_until = ADD_UNTIL;
    kernels->f32.add_rows = hb_linear4_add_rows_f32_avx512;
    kernels->bf16.add_rows = hb_linear4_add_rows_bf16_avx512;
    kernels->finish = hb_linear4_finish_avx512;
}
