// What the AVX-512 products with 4-bit weights share; see avx512/linear4.c.
#ifndef HB_CPU_LINEAR4_AVX512_H
#define HB_CPU_LINEAR4_AVX512_H

#include "core/kernels_linear4.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };

// Round to nearest even to 8 significant bits; NaN stays NaN.
INLINE __m512 rounded_to_bf16(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u)));
}

// 16 elements of dtype as float32; the masked-out ones are zero and are not read.
INLINE __m512 load_x(const void *x, int64_t at, hb_dtype dtype, __mmask16 mask)
{
    if (dtype == HB_F32) return _mm512_maskz_loadu_ps(mask, (const float *)x + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + at);
    if (dtype == HB_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __mmask16 first_lanes(int64_t n)
{
    return n >= LANES ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1);
}

// 32 words of x as bfloat16, zero beyond `depth`.
INLINE __m512i load_x_bf16(const void *x, int64_t at, hb_dtype dtype, int64_t depth)
{
    if (dtype == HB_BF16) {
        int64_t n = depth - at;
        __mmask32 mask = n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1;
        return _mm512_maskz_loadu_epi16(mask, (const uint16_t *)x + at);
    }
    __m512 low = rounded_to_bf16(load_x(x, at, dtype, first_lanes(depth - at)));
    __m512 high = rounded_to_bf16(load_x(x, at + LANES, dtype, first_lanes(depth - at - LANES)));
    __m256i low_half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    __m256i high_half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low_half), high_half, 1);
}

// Words 8 apart beside one another, in each half of a vector.
INLINE __m512i paired_words(__m512i words)
{
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m512i index = _mm512_or_si512(
        lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(8)), 16));
    return _mm512_permutexvar_epi16(index, words);
}

// Scales of the 128 columns from `column`, each in the lanes of its block; 0 beyond `columns`.
INLINE __m512 group_scales(const float *absmax, int64_t column, int64_t columns, int64_t blocksize,
                           int shift)
{
    if (blocksize >= 128) return _mm512_set1_ps(absmax[column >> shift]);
    const float *scales = absmax + (column >> shift);
    if (columns - column < HB_LINEAR4_X_GROUP) {
        __mmask16 present = (__mmask16)((1u << ((columns - column) >> shift)) - 1);
        __m512i block = blocksize == 64
                            ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                            : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(block, _mm512_maskz_loadu_ps(present, scales));
    }
    if (blocksize == 64) {
        __m512 low = _mm512_set1_ps(scales[0]);
        return _mm512_mask_broadcastss_ps(low, 0xff00, _mm_load_ss(scales + 1));
    }
    __m512 all = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 all);
}

// 128-bit part p of a, b, c, d -> v[p * stride].
INLINE void transpose_parts(__m512i a, __m512i b, __m512i c, __m512i d, __m512i *v, int stride)
{
    __m512i even_ab = _mm512_shuffle_i32x4(a, b, 0x88), odd_ab = _mm512_shuffle_i32x4(a, b, 0xdd);
    __m512i even_cd = _mm512_shuffle_i32x4(c, d, 0x88), odd_cd = _mm512_shuffle_i32x4(c, d, 0xdd);
    v[0] = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
    v[stride] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
    v[2 * stride] = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
    v[3 * stride] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
}

// 16 x 16 transposition of 32-bit lanes.
INLINE void transpose(__m512i *v)
{
    __m512i a[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i ab_low = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        __m512i ab_high = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        __m512i cd_low = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        __m512i cd_high = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
        a[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        a[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        a[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    // a[4q + c], 128-bit part p: rows 4q..4q+3 of column 4p + c.
    for (int c = 0; c < 4; c++) transpose_parts(a[c], a[4 + c], a[8 + c], a[12 + c], v + c, 4);
}

// Columns 0..depth - 1 (at most 128) of 16 rows as dword lanes. Beyond n_rows (1..16) the last row
// is repeated. The next line of each row is prefetched.
INLINE void load_16_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, __m512i *words)
{
    const __mmask16 present = first_lanes(depth / 8);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        const uint8_t *row = w->packed + (r < n_rows ? r : n_rows - 1) * w->row_bytes;
        words[r] = _mm512_maskz_loadu_epi32(present, row);
        _mm_prefetch((const char *)row + 64, _MM_HINT_T0);
    }
}

// Scales of block `block` of the same rows, a lane each. (linear_4bit.c leaves out rows so long
// that offsets would not fit in 32 bits.)
INLINE __m512 load_16_scales(const hb_matrix4 *w, int64_t n_rows, int64_t block)
{
    __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    row = _mm512_min_epi32(row, _mm512_set1_epi32(n_rows < 16 ? (int)n_rows - 1 : 15));
    __m512i offset = _mm512_mullo_epi32(row, _mm512_set1_epi32((int)w->absmax_stride));
    return _mm512_i32gather_ps(offset, w->absmax + block, 4);
}

// w from row `row` and column `column` on; the latter a multiple of 128.
INLINE hb_matrix4 part_of(const hb_matrix4 *w, int64_t row, int64_t column)
{
    hb_matrix4 part = *w;
    part.packed += row * w->row_bytes + column / 2;
    part.absmax += row * w->absmax_stride + column / w->blocksize;
    return part;
}

// In decode_cols: a row that comes some steps later.
INLINE void prefetch_rows(const uint8_t *row, int64_t row_bytes)
{
    _mm_prefetch((const char *)row + 16 * row_bytes, _MM_HINT_T0);
    _mm_prefetch((const char *)row + 17 * row_bytes, _MM_HINT_T0);
}

#endif
