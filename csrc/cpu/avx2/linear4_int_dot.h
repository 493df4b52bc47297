// Few rows of x times 4-bit weights in integers, on 32-byte vectors; linear4_int.h has the rest,
// kernels_linear4.h the definition.
//
// Three folders compile it, with other instructions for the sums of bytes: HB_DPBUSD(sum, u8, s8)
// (named HB_DPBUSD_NAME in assembly) and HB_DPWSSD(sum, s16, s16) where the processor has VNNI,
// AVX2's vpmaddubsw and vpmaddwd where they are not defined.
//
// dot: a load of 32 bytes is a chunk of 64 columns: high nibbles (even columns) and low ones, as
// bytes of codes, look up 32 integers each.
//
//   int8    pshufb gives the weights; an int32 lane has the columns of its four bytes, 8i..8i+7.
//           AVX2: maddubs wants one side unsigned: |x| times sign(w, x), at most 2 * 127 * 127 =
//           32258 in its int16 pairs, so nothing saturates; maddwd with ones adds two pairs.
//           Permuted x, a chunk: even columns, odd columns, their magnitudes: 32 bytes each.
//           VNNI: w + 128 is unsigned; a lane begins with -128 times the sum of its x.
//           Permuted x, a chunk: even columns, odd columns; behind all chunks these beginnings.
//   int16   Two tables of bytes, interleaved: 16 weights a vector, multiplied in pairs. A lane of
//           the four products of a chunk has 4i..4i+3 and 16 more (+32 for lanes 4..7): 8 products
//           of at most 16383^2, which fit. Permuted x: [nibble][vector][16].
//   Scales of all chunks come last.
#ifndef HB_CPU_AVX2_LINEAR4_INT_DOT_H
#define HB_CPU_AVX2_LINEAR4_INT_DOT_H

#include "cpu/avx2/io.h"
#include "cpu/linear4_ahead.h"

#define INLINE static inline __attribute__((always_inline))

#ifdef HB_DPBUSD
#define VNNI 1
#else
#define VNNI                     0
#define HB_DPBUSD(sum, u8, s8)   ((void)(u8), (void)(s8), (sum))
#define HB_DPWSSD(sum, s16, t16) _mm256_add_epi32(sum, _mm256_madd_epi16(s16, t16))
#endif

enum {
    INT_CHUNK = 64,
    DOT_ROWS = 4,
    ELEMENT_I16 = 2,
    ELEMENT_I8 = VNNI ? 1 : 2,
    EXTRA_I16 = 4,
    EXTRA_I8 = VNNI ? 36 : 4,
#ifdef __AVX512VL__
    ROWS_OF_TWO = 4, // of W, for two rows of x: 32 registers
#else
    ROWS_OF_TWO = 2,
#endif
};

// Elements [at, at + 64) of x, zeros from `end` on, as int16 codes in plain order: 16 a vector.
// Returns the scale that is stored (`unit` times the step), NaN where one of them is not finite.
INLINE float quantize_chunk(const void *x, hb_dtype io, int64_t at, int64_t end, int limit,
                            float unit, __m256i codes[4])
{
    __m256 value[8];
    __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const int64_t k = at + 8 * i;
        value[i] = k < end ? load_upto_f32x8(x, k, end, io) : _mm256_setzero_ps();
        largest = _mm256_max_epi32(largest, _mm256_castps_si256(magnitude_f32x8(value[i])));
    }
    const float amax = largest_of_magnitudes(largest);
    if (!(amax <= 0x1.fffffep127f)) {
        for (int i = 0; i < 4; i++) codes[i] = _mm256_setzero_si256();
        return hb_f32_from_bits(HB_NAN_BITS);
    }
    const float least = 0x1p-112f, wished = amax / (float)limit;
    const float step = wished > least ? wished : least;
    const __m256 inverse = _mm256_set1_ps(1.0f / step);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(value[2 * i], inverse));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(value[2 * i + 1], inverse));
        codes[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    }
    return step * unit;
}

// int8 columns of even and of odd number, 32 each.
INLINE void split_chunk(const __m256i codes[4], __m256i *even, __m256i *odd)
{
    __m256i e[4], o[4];
    for (int i = 0; i < 4; i++) { // dwords: two columns each
        e[i] = _mm256_srai_epi32(_mm256_slli_epi32(codes[i], 16), 16);
        o[i] = _mm256_srai_epi32(codes[i], 16);
    }
    // Packing keeps halves apart: what is left is to put their dwords in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    *even = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(e[0], e[1]), _mm256_packs_epi32(e[2], e[3])), order);
    *odd = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(o[0], o[1]), _mm256_packs_epi32(o[2], o[3])), order);
}

// ---- x ------------------------------------------------------------------------------------------

// A row of permuted x: codes, beginnings of lanes (VNNI int8), scales.
INLINE int64_t padded_of(int64_t depth)
{
    return hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
}

INLINE int64_t x_row_bytes(int64_t depth, const bool wide)
{
    const int64_t padded = padded_of(depth);
    int64_t bytes = padded * (wide ? ELEMENT_I16 : ELEMENT_I8) +
                    padded / INT_CHUNK * (wide ? EXTRA_I16 : EXTRA_I8);
    return (bytes + 63) / 64 * 64;
}

INLINE const uint8_t *begins_of(const uint8_t *permuted, int64_t depth)
{
    return permuted + padded_of(depth) * ELEMENT_I8;
}

INLINE const float *scales_of(const uint8_t *permuted, int64_t depth, const bool wide)
{
    const int64_t padded = padded_of(depth);
    if (wide) return (const float *)(permuted + padded * ELEMENT_I16);
    return (const float *)(permuted + padded * ELEMENT_I8 + (VNNI ? padded / 2 : 0));
}

// -128 times the sums of four bytes, for each of them.
INLINE __m256i beginning(__m256i even, __m256i odd)
{
    const __m256i all = _mm256_set1_epi8(-128), zero = _mm256_setzero_si256();
    __m256i sum = HB_DPBUSD(HB_DPBUSD(zero, all, even), all, odd); // 128 as an unsigned byte
    return _mm256_sub_epi32(zero, sum);
}

INLINE void permute_i8(const __m256i codes[4], __m256i *out, __m256i *begins)
{
    __m256i even, odd;
    split_chunk(codes, &even, &odd);
    _mm256_store_si256(out, even);
    _mm256_store_si256(out + 1, odd);
    if (VNNI) {
        _mm256_store_si256(begins, beginning(even, odd));
    } else {
        _mm256_store_si256(out + 2, _mm256_abs_epi8(even));
        _mm256_store_si256(out + 3, _mm256_abs_epi8(odd));
    }
}

INLINE void permute_i16(const __m256i codes[4], __m256i *out)
{
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) { // columns 16v..16v+15 of both halves
        __m256i low = codes[v], high = codes[2 + v];
        __m256i even = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(low, 16), 16),
                                          _mm256_srai_epi32(_mm256_slli_epi32(high, 16), 16));
        __m256i odd = _mm256_packs_epi32(_mm256_srai_epi32(low, 16), _mm256_srai_epi32(high, 16));
        _mm256_store_si256(out + v, _mm256_permute4x64_epi64(even, 0xd8));
        _mm256_store_si256(out + 2 + v, _mm256_permute4x64_epi64(odd, 0xd8));
    }
}

INLINE void permute_io(const void *x, hb_dtype io, int64_t depth, const bool wide,
                       uint8_t *permuted)
{
    float *scales = (float *)(uintptr_t)scales_of(permuted, depth, wide);
    uint8_t *begins = (uint8_t *)(uintptr_t)begins_of(permuted, depth);
    const int64_t padded = padded_of(depth);
    for (int64_t k = 0; k < padded; k += INT_CHUNK) {
        __m256i codes[4];
        scales[k / INT_CHUNK] =
            wide ? quantize_chunk(x, io, k, depth, HB_INT16_LIMIT, 0x1p-14f, codes)
                 : quantize_chunk(x, io, k, depth, HB_INT8_LIMIT, 0x1p-7f, codes);
        if (wide)
            permute_i16(codes, (__m256i *)(void *)(permuted + k * ELEMENT_I16));
        else
            permute_i8(codes, (__m256i *)(void *)(permuted + k * ELEMENT_I8),
                       (__m256i *)(void *)(begins + k / 2));
    }
}

INLINE void permute_x(const void *x, hb_dtype dtype, int64_t depth, const bool wide, void *permuted)
{
    switch (dtype) {
    case HB_F32: permute_io(x, HB_F32, depth, wide, permuted); break;
    case HB_BF16: permute_io(x, HB_BF16, depth, wide, permuted); break;
    default: permute_io(x, HB_F16, depth, wide, permuted); break;
    }
}

// ---- dot ----------------------------------------------------------------------------------------

// Tables of bytes, in both halves: low (or only) and high bytes of the integers.
typedef struct {
    __m256i low, high;
} book;

INLINE book make_book(const hb_codebook_int *rounded, const bool wide)
{
    __m256i all = _mm256_loadu_si256((const void *)rounded->code);
    const __m256i byte = _mm256_set1_epi16(255);
    if (VNNI && !wide) all = _mm256_add_epi16(all, _mm256_set1_epi16(128));
    // Packing keeps halves apart: values 0..7 | 8..15, twice, put in order.
    __m256i low = _mm256_packus_epi16(_mm256_and_si256(all, byte), _mm256_and_si256(all, byte));
    __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(all, 8), _mm256_srli_epi16(all, 8));
    return (book){_mm256_permute4x64_epi64(low, 0x88), _mm256_permute4x64_epi64(high, 0x88)};
}

// Weights of 64 columns: int8 in w[0] (even columns) and w[1]; int16 in w[2 n + v].
INLINE void look_up(const book *b, __m256i bytes, const bool wide, __m256i *w)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i codes[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble),
                              _mm256_and_si256(bytes, nibble)};
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        __m256i low = _mm256_shuffle_epi8(b->low, codes[n]);
        if (wide) {
            __m256i high = _mm256_shuffle_epi8(b->high, codes[n]);
            w[2 * n] = _mm256_unpacklo_epi8(low, high);
            w[2 * n + 1] = _mm256_unpackhi_epi8(low, high);
        } else {
            w[n] = low;
        }
    }
}

// Sums of 64 products in 8 lanes.
INLINE __m256i products(const __m256i *w, const __m256i *x, const __m256i *begin, const bool wide)
{
    if (wide) {
        __m256i sum = _mm256_madd_epi16(w[0], x[0]);
        return HB_DPWSSD(HB_DPWSSD(HB_DPWSSD(sum, w[1], x[1]), w[2], x[2]), w[3], x[3]);
    }
    if (VNNI) return HB_DPBUSD(HB_DPBUSD(*begin, w[0], x[0]), w[1], x[1]);
    const __m256i one = _mm256_set1_epi16(1);
    __m256i even = _mm256_maddubs_epi16(x[2], _mm256_sign_epi8(w[0], x[0]));
    __m256i odd = _mm256_maddubs_epi16(x[3], _mm256_sign_epi8(w[1], x[1]));
    return _mm256_add_epi32(_mm256_madd_epi16(even, one), _mm256_madd_epi16(odd, one));
}

// The scales of columns [k, k + 64), or of the 32 that are left, in the lanes they belong to.
INLINE __m256 chunk_scale(const float *absmax, int64_t k, int shift, bool half)
{
    __m256 low = _mm256_broadcast_ss(absmax + (k >> shift));
    if (half) return _mm256_blend_ps(low, _mm256_setzero_ps(), 0xf0);
    if (shift == 5)
        return _mm256_blend_ps(low, _mm256_broadcast_ss(absmax + (k >> shift) + 1), 0xf0);
    return low;
}

INLINE float sum_of_lanes(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The 64 columns from `k` (32 when `half`) of `rows` rows of W, their codes at `packed`, against
// n_x rows of x; added to total[r * n_x + t].
INLINE void dot_chunk(const hb_matrix4 *w, const uint8_t *packed, const float *absmax, int64_t k,
                      const int shift, const bool half, const book *b, const uint8_t *x,
                      int64_t depth, const int rows, const int n_x, const bool wide, __m256 *total)
{
    const int64_t x_bytes = x_row_bytes(depth, wide);
    const uint8_t *codes = x + k * (wide ? ELEMENT_I16 : ELEMENT_I8);
    const uint8_t *begins = begins_of(x, depth) + k / 2;
    const float *x_scales = scales_of(x, depth, wide) + k / INT_CHUNK;
    // All rows by strides from one pointer: a pointer for each would not fit in registers.
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const void *from = packed + r * w->row_bytes;
        __m256i weights[4];
        look_up(b, half ? _mm256_zextsi128_si256(_mm_loadu_si128(from)) : _mm256_loadu_si256(from),
                wide, weights);
        const __m256 scale = chunk_scale(absmax + r * w->absmax_stride, k, shift, half);
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            const __m256i *begin = (const void *)(begins + t * x_bytes);
            __m256 sum = _mm256_cvtepi32_ps(
                products(weights, (const void *)(codes + t * x_bytes), begin, wide));
            __m256 both = _mm256_mul_ps(
                scale, _mm256_broadcast_ss((const void *)((const char *)x_scales + t * x_bytes)));
            total[r * n_x + t] = _mm256_fmadd_ps(sum, both, total[r * n_x + t]);
        }
    }
}

// `rows` (1, 2 or 4) rows of W from row `first` against n_x rows of x, all small constants. Codes
// and scales of the rows that come next are asked for in the order of addresses (linear4_ahead.h).
INLINE void dot_some(const hb_matrix4 *w, int64_t first, int64_t depth, const int shift,
                     const book *b, const uint8_t *x, const int rows, const int n_x,
                     const bool wide, float *y, int64_t y_stride)
{
    const uint8_t *packed = w->packed + first * w->row_bytes;
    const float *absmax = w->absmax + first * w->absmax_stride;
    const bool keep = n_x > 1;
    const int64_t distance = bytes_ahead(rows, w->row_bytes, keep);
    const char *ahead = (const char *)packed + distance;
    const float *scales_ahead = absmax + (distance * 2 >> shift);
    __m256 total[2][DOT_ROWS * 2];
#pragma GCC unroll 8
    for (int i = 0; i < rows * n_x; i++) total[0][i] = total[1][i] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 2 * INT_CHUNK <= depth; k += 2 * INT_CHUNK, packed += INT_CHUNK) {
        _mm_prefetch((const char *)(scales_ahead + (k >> shift) * rows), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) ask_ahead(ahead + 64 * r, 1, keep);
        ahead += 64 * rows;
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
            dot_chunk(w, packed + c * INT_CHUNK / 2, absmax, k + c * INT_CHUNK, shift, false, b, x,
                      depth, rows, n_x, wide, total[c]);
    }
    for (int c = 0; k < depth; c++, k += INT_CHUNK, packed += INT_CHUNK / 2) {
        if (depth - k < INT_CHUNK)
            dot_chunk(w, packed, absmax, k, shift, true, b, x, depth, rows, n_x, wide, total[c]);
        else
            dot_chunk(w, packed, absmax, k, shift, false, b, x, depth, rows, n_x, wide, total[c]);
    }
    const float unscale = w->rounded->step / (wide ? 0x1p-14f : 0x1p-7f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            int i = r * n_x + t;
            y[t * y_stride + first + r] =
                sum_of_lanes(_mm256_add_ps(total[0][i], total[1][i])) * unscale;
        }
}

INLINE void dot_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const int shift,
                     const book *b, const uint8_t *x, const int rows, const int n_x,
                     const bool wide, float *y, int64_t y_stride)
{
    int64_t r = 0;
    for (; r + rows <= n_rows; r += rows)
        dot_some(w, r, depth, shift, b, x, rows, n_x, wide, y, y_stride);
    for (; rows > 1 && r < n_rows; r++)
        dot_some(w, r, depth, shift, b, x, 1, n_x, wide, y, y_stride);
}

INLINE void dot_shift(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const int shift,
                      const book *b, const uint8_t *x, int n_x, const bool wide, float *y,
                      int64_t y_stride)
{
    // Rows of W share the loads of x; 8 sums are two for each pair of rows, in 16 registers.
    switch (n_x) {
    case 1: dot_rows(w, n_rows, depth, shift, b, x, 4, 1, wide, y, y_stride); break;
    case 2: dot_rows(w, n_rows, depth, shift, b, x, ROWS_OF_TWO, 2, wide, y, y_stride); break;
    case 3: dot_rows(w, n_rows, depth, shift, b, x, 2, 3, wide, y, y_stride); break;
    default: dot_rows(w, n_rows, depth, shift, b, x, 2, 4, wide, y, y_stride); break;
    }
}

INLINE void dot(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const uint8_t *x, int n_x,
                const bool wide, float *y, int64_t y_stride)
{
    const book b = make_book(w->rounded, wide);
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    if (shift == 5)
        dot_shift(w, n_rows, depth, 5, &b, x, n_x, wide, y, y_stride);
    else
        dot_shift(w, n_rows, depth, shift < 6 ? 6 : shift, &b, x, n_x, wide, y, y_stride);
}

#endif
