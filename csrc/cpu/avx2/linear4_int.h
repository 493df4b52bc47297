// Products with 4-bit weights in integers on 32-byte vectors, compiled by three folders; few rows
// of x are multiplied by linear4_int_dot.h, many (int8 only) by panels:
//
// The dwords of 8 rows by 8 columns are transposed before they are decoded, so that a lane is a row
// of W with 8 columns, which stay in an order of their own that x is brought into:
//
//   AVX2    pairs of int16, columns (0, 4) (2, 6) (1, 5) (3, 7) of 8: panel [32 pairs][16 rows][2]
//           for 64 columns. vpmaddwd and an addition are no more work for 16 products than
//           maddubs with its signs and sums.
//   VNNI    quads of w + 128, columns (0, 2, 4, 6) (1, 3, 5, 7): panel [16 quads][16 rows][4].
//   then 16 scales. Packed x, for 64 columns: [6 rows][64] in that order, 6 scales, and with VNNI
//   6 times -128 times the sum of the row's 64.
#ifndef HB_CPU_AVX2_LINEAR4_INT_H
#define HB_CPU_AVX2_LINEAR4_INT_H

#include "cpu/avx2/linear4_int_dot.h"
#include "cpu/linear4_entries.h"

enum {
    TILE_ROWS = 6,
    TILE_COLS = 16,
    PANEL_STEPS = 256,
    X_EXTRA = VNNI ? 8 : 4,
    X_BYTES = TILE_ROWS * (INT_CHUNK * ELEMENT_I8 + X_EXTRA), // for 64 columns
    PANEL_BYTES = TILE_COLS * (INT_CHUNK * ELEMENT_I8 + 4),
};

// ---- panel, int8 --------------------------------------------------------------------------------

INLINE void pack_io(const void *x, hb_dtype io, int64_t x_stride, int n_x, int64_t steps,
                    uint8_t *packed)
{
    // Within 8 columns: see above.
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15));
    const __m256i quads = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    for (int64_t s = 0; s < steps; s += INT_CHUNK, packed += X_BYTES) {
        float *scales = (float *)(packed + TILE_ROWS * INT_CHUNK * ELEMENT_I8);
        int32_t *begins = (int32_t *)(scales + TILE_ROWS);
        for (int t = 0; t < TILE_ROWS; t++) {
            __m256i codes[4], *out = (__m256i *)(packed + t * INT_CHUNK * ELEMENT_I8);
            const int64_t row = t * x_stride, end = t < n_x ? row + steps : 0;
            scales[t] = quantize_chunk(x, io, row + s, end, HB_INT8_LIMIT, 0x1p-7f, codes);
            if (!VNNI) {
                for (int i = 0; i < 4; i++)
                    _mm256_storeu_si256(out + i, _mm256_shuffle_epi8(codes[i], pairs));
                continue;
            }
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 2; i++) {
                __m256i bytes = _mm256_packs_epi16(codes[2 * i], codes[2 * i + 1]);
                bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
                sum = _mm256_add_epi32(sum, beginning(bytes, _mm256_setzero_si256()));
                _mm256_storeu_si256(out + i, _mm256_shuffle_epi8(bytes, quads));
            }
            __m128i four =
                _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
            four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
            begins[t] = _mm_cvtsi128_si32(four);
        }
    }
}

INLINE void pack_x(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   void *packed)
{
    switch (dtype) {
    case HB_F32: pack_io(x, HB_F32, x_stride, n_x, steps, packed); break;
    case HB_BF16: pack_io(x, HB_BF16, x_stride, n_x, steps, packed); break;
    default: pack_io(x, HB_F16, x_stride, n_x, steps, packed); break;
    }
}

// 8 x 8 dwords: v[i] = row i before, column i after.
INLINE void transpose(__m256i *v)
{
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        v[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
}

// 64 columns of 8 rows from `first` into 8 lanes of the panel.
INLINE void decode_8_rows(const hb_matrix4 *w, int64_t first, int64_t n_rows, int64_t column,
                          const book *b, uint8_t *panel)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    const int lane_bytes = 8 * 4;
    __m256i v[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
        const uint8_t *from =
            w->packed + (first + (r < n_rows ? r : 0)) * w->row_bytes + column / 2;
        v[r] = _mm256_loadu_si256((const void *)from);
        if (column % 128 == 0) _mm_prefetch((const char *)from + PANEL_STEPS / 2, _MM_HINT_T0);
    }
    transpose(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            __m256i codes = _mm256_and_si256(n == 0 ? _mm256_srli_epi16(v[i], 4) : v[i], nibble);
            __m256i value = _mm256_shuffle_epi8(b->low, codes);
            if (VNNI) {
                _mm256_store_si256((void *)(panel + (2 * i + n) * 2 * lane_bytes), value);
                continue;
            }
            __m256i first_pair = _mm256_srai_epi16(_mm256_slli_epi16(value, 8), 8);
            __m256i *out = (void *)(panel + (4 * i + 2 * n) * 2 * lane_bytes);
            _mm256_store_si256(out, first_pair);
            _mm256_store_si256(out + 2, _mm256_srai_epi16(value, 8));
        }
}

INLINE void decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, uint8_t *panel)
{
    const book b = make_book(w->rounded, false);
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    for (int64_t k = 0; k < depth; k += INT_CHUNK, panel += PANEL_BYTES) {
        float *scales = (float *)(panel + TILE_COLS * INT_CHUNK * ELEMENT_I8);
        for (int64_t r = 0; r < TILE_COLS; r++)
            scales[r] = r < n_rows ? w->absmax[r * w->absmax_stride + (k >> shift)] : 0.0f;
        for (int64_t r = 0; r < TILE_COLS; r += 8) {
            if (r < n_rows)
                decode_8_rows(w, r, n_rows - r, k, &b, panel + r * 4);
            else
                for (int i = 0; i < INT_CHUNK * ELEMENT_I8 / 4; i++)
                    _mm256_store_si256((void *)(panel + i * 64 + 32), _mm256_setzero_si256());
        }
    }
}

// sum[c] += in each dword the products of w[c], half of a panel's columns, and the dword at x.
//
// Assembly, because 12 sums leave four registers and gcc 12 needs more for the intrinsics: it moved
// sums to the stack and back in every step (AVX2: 0.26 of a cycle a weight instead of 0.35, VNNI:
// 0.12 instead of 0.14). The second half of the weights as a memory operand saves one more.
INLINE void add_products(__m256i *sum, const __m256i *w, const uint8_t *x)
{
#if defined(HB_SIMDE)
    int32_t several;
    memcpy(&several, x, 4);
    for (int c = 0; c < 2; c++)
        sum[c] =
            VNNI ? HB_DPBUSD(sum[c], w[c], _mm256_set1_epi32(several))
                 : _mm256_add_epi32(sum[c], _mm256_madd_epi16(w[c], _mm256_set1_epi32(several)));
#else
    __m256i low = sum[0], high = sum[1], several;
#if VNNI
    __asm__("vpbroadcastd %[x], %[several]\n\t"             //
            HB_DPBUSD_NAME " %[several], %[w0], %[low]\n\t" //
            HB_DPBUSD_NAME " %[several], %[w1], %[high]"
            : [low] "+x"(low), [high] "+x"(high), [several] "=&x"(several)
            : [x] "m"(*(const uint8_t(*)[4])x), [w0] "x"(w[0]), [w1] "x"(w[1]));
#else
    __m256i two;
    __asm__("vpbroadcastd %[x], %[several]\n\t"
            "vpmaddwd %[w0], %[several], %[two]\n\t"
            "vpaddd %[two], %[low], %[low]\n\t"
            "vpmaddwd %[w1], %[several], %[several]\n\t"
            "vpaddd %[several], %[high], %[high]"
            : [low] "+x"(low), [high] "+x"(high), [several] "=&x"(several), [two] "=&x"(two)
            : [x] "m"(*(const uint8_t(*)[4])x), [w0] "x"(w[0]), [w1] "m"(w[1]));
#endif
    sum[0] = low, sum[1] = high;
#endif
}

// n_x rows of x times the panel; n_x is a constant at each call.
INLINE void tile(const uint8_t *packed, const uint8_t *panel, int64_t steps, bool accumulate,
                 float *sums, const int n_x)
{
    for (int64_t s = 0; s < steps; s += INT_CHUNK, packed += X_BYTES, panel += PANEL_BYTES) {
        const float *x_scale = (const float *)(packed + TILE_ROWS * INT_CHUNK * ELEMENT_I8);
        const float *w_scale = (const float *)(panel + TILE_COLS * INT_CHUNK * ELEMENT_I8);
        const int32_t *begins = (const int32_t *)(x_scale + TILE_ROWS);
        __m256i sum[TILE_ROWS][2];
#pragma GCC unroll 6
        for (int t = 0; t < n_x; t++)
            sum[t][0] = sum[t][1] = VNNI ? _mm256_set1_epi32(begins[t]) : _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int i = 0; i < INT_CHUNK * ELEMENT_I8 / 4; i++) {
#pragma GCC unroll 6
            for (int t = 0; t < n_x; t++)
                add_products(sum[t], (const void *)(panel + 64 * i),
                             packed + t * INT_CHUNK * ELEMENT_I8 + 4 * i);
        }
#if !defined(HB_SIMDE)
        // gcc 12 looks ahead to the conversions below and keeps the sums of the loop in memory for
        // them; here it has to have them in registers.
#pragma GCC unroll 6
        for (int t = 0; t < n_x; t++) __asm__("" : "+x"(sum[t][0]), "+x"(sum[t][1]));
#endif
        const bool adds = accumulate || s > 0;
#pragma GCC unroll 6
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                float *target = sums + t * TILE_COLS + 8 * c;
                const __m256 total = adds ? _mm256_load_ps(target) : _mm256_setzero_ps();
                const __m256 scale = _mm256_mul_ps(_mm256_load_ps(w_scale + 8 * c),
                                                   _mm256_broadcast_ss(x_scale + t));
                _mm256_store_ps(target,
                                _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][c]), scale, total));
            }
    }
}

// ---- entries ------------------------------------------------------------------------------------

// The functions of a folder and its hb_linear4_int_table_<isa>; for how many rows of x dot beats
// the panels.
#define HB_INT4_ENTRIES(isa, until_i16, until_i8)                                                  \
    HB_LINEAR4_DOT_ENTRIES(i16, isa, true)                                                         \
    HB_LINEAR4_DOT_ENTRIES(i8, isa, false)                                                         \
    HB_LINEAR4_TILE(i8, isa)                                                                       \
    static void hb_linear4_pack_x_i8_##isa(const void *x, hb_dtype dtype, int64_t x_stride,        \
                                           int n_x, int64_t steps, void *packed)                   \
    {                                                                                              \
        pack_x(x, dtype, x_stride, n_x, steps, packed);                                            \
    }                                                                                              \
    static void hb_linear4_decode_rows_i8_##isa(const hb_matrix4 *w, int64_t n_rows,               \
                                                int64_t depth, void *panel)                        \
    {                                                                                              \
        decode_rows(w, n_rows, depth, panel);                                                      \
    }                                                                                              \
    void hb_linear4_int_table_##isa(hb_kernels_linear4 *kernels)                                   \
    {                                                                                              \
        kernels->i16 = (hb_linear4_set){.dot_rows = DOT_ROWS,                                      \
                                        .dot_until = until_i16,                                    \
                                        .tile_rows = 1,                                            \
                                        .tile_cols = 1,                                            \
                                        .pair = 1,                                                 \
                                        .x_block = 1,                                              \
                                        .element_bytes = ELEMENT_I16,                              \
                                        .dot_extra = EXTRA_I16,                                    \
                                        .permute_x = hb_linear4_permute_x_i16_##isa,               \
                                        .dot = hb_linear4_dot_i16_##isa};                          \
        kernels->i8 = (hb_linear4_set){.dot_rows = DOT_ROWS,                                       \
                                       .dot_until = until_i8,                                      \
                                       .tile_rows = TILE_ROWS,                                     \
                                       .tile_cols = TILE_COLS,                                     \
                                       .panel_steps = PANEL_STEPS,                                 \
                                       .pair = 1,                                                  \
                                       .x_block = INT_CHUNK,                                       \
                                       .element_bytes = ELEMENT_I8,                                \
                                       .dot_extra = EXTRA_I8,                                      \
                                       .x_extra = X_EXTRA,                                         \
                                       .panel_extra = 4,                                           \
                                       .permute_x = hb_linear4_permute_x_i8_##isa,                 \
                                       .dot = hb_linear4_dot_i8_##isa,                             \
                                       .pack_x = hb_linear4_pack_x_i8_##isa,                       \
                                       .decode_rows = hb_linear4_decode_rows_i8_##isa,             \
                                       .tile = hb_linear4_tile_i8_##isa};                          \
    }

#endif
