// Products with 4-bit weights, AVX2 + FMA.
//
// Decoding: the codebook's float32 values are kept as four tables of 16 bytes, one per byte of a
// value. pshufb looks up 32 codes in each; interleaving the four results twice gives 32 float32 in
// four vectors, in the order in which unpacking leaves them (bytes of codes, v = vector, i = lane):
//
//   float32 values   v: byte 4v + i            of the low | high 16 bytes
//   bfloat16 values  2p + s: byte 8p + 2i + s  of the low | high 16 bytes (two tables; one
//                                              interleaving, then a shift and a mask)
//
// A load of 32 bytes is a chunk of 64 columns; high nibbles (even columns) come first, then low
// ones. dot keeps that order and permutes x once per call instead:
//
//   permuted[8 (4n + v) + i]           = x[column of byte(v, i) of the low half,  nibble n]
//   permuted[8 (4n + v) + 4 + i]       = the same + 32                  in every chunk of 64
//
// The sum of a chunk's 8 products per lane is scaled once; even and odd chunks have totals of their
// own (16 partial sums per y, as the bound in kernels_linear4.h counts them). decode_rows first
// interleaves the bytes of 4 rows, so that a lane is a row of W; decode_cols takes 8 bytes of each
// of 4 rows and leaves even columns first. The bfloat16 set is the same arithmetic on rounded
// values.
#include "core/kernels_linear4.h"
#include "cpu/avx2/io.h"
#include "cpu/linear4_entries.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    DOT_ROWS = 4,
    DOT_UNTIL = 8,
    ADD_UNTIL = 4,
    ADD_GROUP_ROWS = 4,
    DOT_UNTIL_BF16 = 12, // rounding makes decoding to panels dearer
    TILE_ROWS = 6,
    TILE_COLS = 16,
    PANEL_STEPS = 256,
    LANES = 8,
    CHUNK = 64,
};

// ---- conversions ------------------------------------------------------------------------------

INLINE __m256 rounded_to_bf16(__m256 value)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits_f32x8(value), 16));
}

// The same for values that are numbers or the NaN of sane_scale: adding cannot carry out of it.
INLINE __m256 rounded_weight(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u)));
}

// A NaN becomes the one with the smallest payload, which every product with it then has.
INLINE __m256 sane_scale(__m256 scale)
{
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(scale, nan, _mm256_cmp_ps(scale, scale, _CMP_UNORD_Q));
}

// ---- codebook ---------------------------------------------------------------------------------

// plane[b]: byte b of the 16 values, in both 128-bit lanes.
typedef struct {
    __m256i plane[4];
} book;

INLINE book make_book(const float *codebook, bool bf16)
{
    const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i v[4];
    for (int i = 0; i < 4; i += 2) {
        __m256 values = _mm256_load_ps(codebook + 4 * i);
        __m256i bits = _mm256_castps_si256(bf16 ? rounded_to_bf16(values) : values);
        v[i] = _mm_shuffle_epi8(_mm256_castsi256_si128(bits), by_byte);
        v[i + 1] = _mm_shuffle_epi8(_mm256_extracti128_si256(bits, 1), by_byte);
    }
    __m128i low01 = _mm_unpacklo_epi32(v[0], v[1]), high01 = _mm_unpackhi_epi32(v[0], v[1]);
    __m128i low23 = _mm_unpacklo_epi32(v[2], v[3]), high23 = _mm_unpackhi_epi32(v[2], v[3]);
    return (book){{
        _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low01, low23)),
        _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low01, low23)),
        _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high01, high23)),
        _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high01, high23)),
    }};
}

// The codes in high (0) or low (1) nibbles, as bytes.
INLINE __m256i nibbles(__m256i bytes, const int which)
{
    if (which == 0) bytes = _mm256_srli_epi16(bytes, 4);
    return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

// Values of 32 codes, exact float32; order as described above.
INLINE void look_up_f32(const book *b, __m256i codes, __m256 *value)
{
    __m256i byte0 = _mm256_shuffle_epi8(b->plane[0], codes);
    __m256i byte1 = _mm256_shuffle_epi8(b->plane[1], codes);
    __m256i byte2 = _mm256_shuffle_epi8(b->plane[2], codes);
    __m256i byte3 = _mm256_shuffle_epi8(b->plane[3], codes);
    __m256i half0 = _mm256_unpacklo_epi8(byte0, byte1), half0b = _mm256_unpackhi_epi8(byte0, byte1);
    __m256i half1 = _mm256_unpacklo_epi8(byte2, byte3), half1b = _mm256_unpackhi_epi8(byte2, byte3);
    value[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(half0, half1));
    value[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(half0, half1));
    value[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(half0b, half1b));
    value[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(half0b, half1b));
}

// Values of 32 codes where all values are bfloat16 numbers.
INLINE void look_up_bf16(const book *b, __m256i codes, __m256 *value)
{
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    __m256i byte2 = _mm256_shuffle_epi8(b->plane[2], codes);
    __m256i byte3 = _mm256_shuffle_epi8(b->plane[3], codes);
    __m256i first = _mm256_unpacklo_epi8(byte2, byte3);
    __m256i second = _mm256_unpackhi_epi8(byte2, byte3);
    value[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
    value[1] = _mm256_castsi256_ps(_mm256_and_si256(first, high));
    value[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
    value[3] = _mm256_castsi256_ps(_mm256_and_si256(second, high));
}

// ---- dot --------------------------------------------------------------------------------------

// x[0..3] and x[32..35] in one vector's halves.
INLINE __m256 halves(const float *x)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(x)), _mm_load_ps(x + 32), 1);
}

INLINE void permute_chunk(const float *x, bool bf16, float *permuted)
{
    for (int p = 0; p < 2; p++) { // 16 columns of each half: nibble n, vectors 2p and 2p + 1
        __m256 a = halves(x + 16 * p), b = halves(x + 16 * p + 4);
        __m256 c = halves(x + 16 * p + 8), d = halves(x + 16 * p + 12);
        __m256 even0, even1, odd0, odd1;
        if (bf16) { // columns 4i + {0, 1, 2, 3}: transpose
            __m256 ab = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
            __m256 cd = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
            even0 = _mm256_shuffle_ps(ab, cd, 0x44);
            odd0 = _mm256_shuffle_ps(ab, cd, 0xee);
            even1 = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
            odd1 = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
        } else { // columns 2i + {0, 1}
            even0 = _mm256_shuffle_ps(a, b, 0x88);
            odd0 = _mm256_shuffle_ps(a, b, 0xdd);
            even1 = _mm256_shuffle_ps(c, d, 0x88);
            odd1 = _mm256_shuffle_ps(c, d, 0xdd);
        }
        _mm256_store_ps(permuted + 16 * p, even0);
        _mm256_store_ps(permuted + 16 * p + 8, even1);
        _mm256_store_ps(permuted + 32 + 16 * p, odd0);
        _mm256_store_ps(permuted + 32 + 16 * p + 8, odd1);
    }
}

INLINE void permute_io(const void *x, hb_dtype io, int64_t depth, bool bf16, float *permuted)
{
    const int64_t padded = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    for (int64_t k = 0; k < padded; k += CHUNK) {
        _Alignas(32) float chunk[CHUNK];
        for (int i = 0; i < CHUNK; i += LANES) {
            __m256 value = _mm256_setzero_ps();
            if (k + i < depth) value = load_upto_f32x8(x, k + i, depth, io);
            _mm256_store_ps(chunk + i, bf16 ? rounded_to_bf16(value) : value);
        }
        permute_chunk(chunk, bf16, permuted + k);
    }
}

INLINE void permute_x(const void *x, hb_dtype dtype, int64_t depth, bool bf16, float *permuted)
{
    switch (dtype) {
    case HB_F32: permute_io(x, HB_F32, depth, bf16, permuted); break;
    case HB_BF16: permute_io(x, HB_BF16, depth, bf16, permuted); break;
    default: permute_io(x, HB_F16, depth, bf16, permuted); break;
    }
}

// 64 columns of `rows` rows of W against n_x rows of x, scaled and added to total[r * n_x + t].
INLINE void dot_chunk(const book *b, const __m256i *bytes, const __m256 *scale, const float *x,
                      int64_t x_stride, const int rows, const int n_x, const bool bf16,
                      __m256 *total)
{
    __m256 sum[DOT_ROWS * 2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        __m256 value[2][4];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            if (bf16)
                look_up_bf16(b, nibbles(bytes[r], n), value[r]);
            else
                look_up_f32(b, nibbles(bytes[r], n), value[r]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++) {
                __m256 x_f32x8 = _mm256_load_ps(x + t * x_stride + (4 * n + v) * LANES);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) {
                    __m256 *s = &sum[r * n_x + t];
                    *s = n + v == 0 ? _mm256_mul_ps(value[r][v], x_f32x8)
                                    : _mm256_fmadd_ps(value[r][v], x_f32x8, *s);
                }
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows * n_x; i++)
        total[i] = _mm256_fmadd_ps(sum[i], scale[i / n_x], total[i]);
}

// The scales of columns [k, k + 64), or of the 32 that are left, in the lanes they belong to.
INLINE __m256 chunk_scale(const float *absmax, int64_t k, int shift, bool half)
{
    __m128 low = _mm_set1_ps(absmax[k >> shift]), high = low;
    if (half)
        high = _mm_setzero_ps();
    else if (shift == 5)
        high = _mm_set1_ps(absmax[(k >> shift) + 1]);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

INLINE float sum_of_lanes(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// `rows` rows of W from row `first` against n_x rows of x, both small constants.
INLINE void dot_some(const hb_matrix4 *w, int64_t first, int64_t depth, const int shift,
                     const book *b, const float *x, const int rows, const int n_x, const bool bf16,
                     float *y, int64_t y_stride)
{
    const int64_t x_stride = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    const uint8_t *packed[2];
    const float *absmax[2];
    __m256 total[2][DOT_ROWS * 2], scale[2];
    __m256i bytes[2];
    for (int r = 0; r < rows; r++) {
        packed[r] = w->packed + (first + r) * w->row_bytes;
        absmax[r] = w->absmax + (first + r) * w->absmax_stride;
    }
    for (int i = 0; i < rows * n_x; i++) total[0][i] = total[1][i] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 2 * CHUNK <= depth; k += 2 * CHUNK)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            const int64_t at = k + c * CHUNK;
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                bytes[r] = _mm256_loadu_si256((const void *)(packed[r] + at / 2));
                scale[r] = chunk_scale(absmax[r], at, shift, false);
                if (c == 0) // the rows that come next
                    _mm_prefetch((const char *)packed[r] + at / 2 + rows * w->row_bytes,
                                 _MM_HINT_T0);
            }
            dot_chunk(b, bytes, scale, x + at, x_stride, rows, n_x, bf16, total[c]);
        }
    for (int c = 0; k < depth; k += CHUNK, c++) {
        const bool half = depth - k < CHUNK;
        for (int r = 0; r < rows; r++) {
            const void *at = packed[r] + k / 2;
            bytes[r] = half
                           ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(at), 0)
                           : _mm256_loadu_si256(at);
            scale[r] = chunk_scale(absmax[r], k, shift, half);
        }
        dot_chunk(b, bytes, scale, x + k, x_stride, rows, n_x, bf16, total[c]);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < n_x; t++) {
            int i = r * n_x + t;
            y[t * y_stride + first + r] = sum_of_lanes(_mm256_add_ps(total[0][i], total[1][i]));
        }
}

INLINE void dot_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const int shift,
                     const book *b, const float *x, const int rows, const int n_x, const bool bf16,
                     float *y, int64_t y_stride)
{
    int64_t r = 0;
    for (; r + rows <= n_rows; r += rows)
        dot_some(w, r, depth, shift, b, x, rows, n_x, bf16, y, y_stride);
    for (; rows > 1 && r < n_rows; r++)
        dot_some(w, r, depth, shift, b, x, 1, n_x, bf16, y, y_stride);
}

INLINE void dot_shift(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const int shift,
                      const book *b, const float *x, int n_x, const bool bf16, float *y,
                      int64_t y_stride)
{
    // Two rows of W share the loads of x where those, from the L2 cache, would be the limit.
    switch (n_x) {
    case 1: dot_rows(w, n_rows, depth, shift, b, x, 1, 1, bf16, y, y_stride); break;
    case 2: dot_rows(w, n_rows, depth, shift, b, x, 2, 2, bf16, y, y_stride); break;
    case 3: dot_rows(w, n_rows, depth, shift, b, x, 2, 3, bf16, y, y_stride); break;
    default: dot_rows(w, n_rows, depth, shift, b, x, 2, 4, bf16, y, y_stride); break;
    }
}

INLINE void dot(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const float *x, int n_x,
                const bool bf16, float *y, int64_t y_stride)
{
    const book b = make_book(w->codebook, bf16);
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    if (shift == 5)
        dot_shift(w, n_rows, depth, 5, &b, x, n_x, bf16, y, y_stride);
    else
        dot_shift(w, n_rows, depth, shift < 6 ? 6 : shift, &b, x, n_x, bf16, y, y_stride);
}

#include "cpu/avx2/linear4_add.h"

// ---- panel ------------------------------------------------------------------------------------

INLINE void pack_io(const void *x, hb_dtype io, int64_t x_stride, int n_x, int64_t steps, bool bf16,
                    float *packed)
{
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK)
        for (int t = 0; t < TILE_ROWS; t++)
            for (int i = 0; i < HB_LINEAR4_X_BLOCK; i += LANES) {
                __m256 value = _mm256_setzero_ps();
                if (t < n_x && s + i < steps)
                    value = load_upto_f32x8(x, t * x_stride + s + i, t * x_stride + steps, io);
                if (bf16) value = rounded_to_bf16(value);
                _mm256_store_ps(packed + s * TILE_ROWS + t * HB_LINEAR4_X_BLOCK + i, value);
            }
}

INLINE void pack_x(const void *x, hb_dtype dtype, int64_t x_stride, int n_x, int64_t steps,
                   bool bf16, float *packed)
{
    switch (dtype) {
    case HB_F32: pack_io(x, HB_F32, x_stride, n_x, steps, bf16, packed); break;
    case HB_BF16: pack_io(x, HB_BF16, x_stride, n_x, steps, bf16, packed); break;
    default: pack_io(x, HB_F16, x_stride, n_x, steps, bf16, packed); break;
    }
}

// [row i, 16 bytes | row i + 4, 16 bytes], i < 4 -> dword q of out[m], in each half: byte 4m + q of
// the half's four rows.
INLINE void interleave_rows(const __m256i *v, __m256i *out)
{
    __m256i low01 = _mm256_unpacklo_epi8(v[0], v[1]), high01 = _mm256_unpackhi_epi8(v[0], v[1]);
    __m256i low23 = _mm256_unpacklo_epi8(v[2], v[3]), high23 = _mm256_unpackhi_epi8(v[2], v[3]);
    out[0] = _mm256_unpacklo_epi16(low01, low23);
    out[1] = _mm256_unpackhi_epi16(low01, low23);
    out[2] = _mm256_unpacklo_epi16(high01, high23);
    out[3] = _mm256_unpackhi_epi16(high01, high23);
}

// 8 rows of W (n_rows of them present) into 8 columns of the panel.
INLINE void decode_8_rows(const hb_matrix4 *w, int64_t first, int64_t n_rows, int64_t depth,
                          const book *b, const bool bf16, float *panel)
{
    const uint8_t *packed[8];
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    const float *absmax[8];
    for (int r = 0; r < 8; r++) {
        const int64_t row = first + (r < n_rows ? r : 0);
        packed[r] = w->packed + row * w->row_bytes;
        absmax[r] = w->absmax + row * w->absmax_stride;
    }
    __m256 scale = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k += 32) {
        if ((k & (w->blocksize - 1)) == 0) {
            const int64_t i = k >> shift;
            scale = _mm256_setr_ps(absmax[0][i], absmax[1][i], absmax[2][i], absmax[3][i],
                                   absmax[4][i], absmax[5][i], absmax[6][i], absmax[7][i]);
            if (bf16) scale = sane_scale(scale);
        }
        __m256i v[4], codes[4];
        for (int r = 0; r < 4; r++) {
            __m128i low = _mm_loadu_si128((const void *)(packed[r] + k / 2));
            __m128i high = _mm_loadu_si128((const void *)(packed[r + 4] + k / 2));
            v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
        if (k % 128 == 0) // the same rows of the next panel
            for (int r = 0; r < 8; r++)
                _mm_prefetch((const char *)packed[r] + k / 2 + PANEL_STEPS / 2, _MM_HINT_T0);
        interleave_rows(v, codes);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++)
#pragma GCC unroll 2
            for (int n = 0; n < 2; n++) {
                __m256 value[4];
                look_up_f32(b, nibbles(codes[m], n), value);
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++) {
                    __m256 weight = _mm256_mul_ps(value[q], scale);
                    if (bf16) weight = rounded_weight(weight);
                    _mm256_store_ps(panel + (k + 2 * (4 * m + q) + n) * TILE_COLS, weight);
                }
            }
    }
}

INLINE void decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const bool bf16,
                        float *panel)
{
    const book b = make_book(w->codebook, false);
    for (int64_t r = 0; r < TILE_COLS; r += 8) {
        if (r < n_rows)
            decode_8_rows(w, r, n_rows - r, depth, &b, bf16, panel + r);
        else
            for (int64_t k = 0; k < depth; k++)
                _mm256_store_ps(panel + k * TILE_COLS + r, _mm256_setzero_ps());
    }
}

// 16 columns of 4 rows, given their 8 bytes each; `present` rows are stored.
INLINE void decode_4_rows(const uint8_t *const *packed, const float *const *absmax, int64_t present,
                          const book *b, const bool bf16, float *panel)
{
    __m128i pair[2];
    for (int i = 0; i < 2; i++)
        pair[i] = _mm_unpacklo_epi64(_mm_loadl_epi64((const void *)packed[2 * i]),
                                     _mm_loadl_epi64((const void *)packed[2 * i + 1]));
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(pair[0]), pair[1], 1);
    // Dword q of each half: the half's 4 bytes of row q.
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    for (int n = 0; n < 2; n++) {
        __m256 value[4];
        look_up_f32(b, nibbles(bytes, n), value);
        for (int q = 0; q < 4 && q < present; q++) {
            __m256 factor = _mm256_broadcast_ss(absmax[q]);
            __m256 weight = _mm256_mul_ps(value[q], bf16 ? sane_scale(factor) : factor);
            if (bf16) weight = rounded_weight(weight);
            _mm256_store_ps(panel + q * TILE_COLS + n * LANES, weight);
        }
    }
}

INLINE void decode_cols(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, const bool bf16,
                        float *panel)
{
    const book b = make_book(w->codebook, false);
    if (n_cols < TILE_COLS) { // 0: there is nothing to read
        memset(panel, 0, (size_t)(n_rows * TILE_COLS) * sizeof *panel);
        return;
    }
    const uint8_t *packed[4];
    const float *absmax[4];
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        for (int64_t q = 0; q < 4; q++) {
            packed[q] = w->packed + (r + q) * w->row_bytes;
            absmax[q] = w->absmax + (r + q) * w->absmax_stride;
            // Not farther ahead: where rows are a power of two apart their lines share two sets of
            // the L1 cache.
            _mm_prefetch((const char *)packed[q] + 4 * w->row_bytes, _MM_HINT_T0);
        }
        decode_4_rows(packed, absmax, 4, &b, bf16, panel + r * TILE_COLS);
    }
    if (r < n_rows) {
        for (int64_t q = 0; q < 4; q++) {
            const int64_t row = r + q < n_rows ? r + q : r;
            packed[q] = w->packed + row * w->row_bytes;
            absmax[q] = w->absmax + row * w->absmax_stride;
        }
        decode_4_rows(packed, absmax, n_rows - r, &b, bf16, panel + r * TILE_COLS);
    }
}

// n_x rows of x times the panel; n_x is a constant at each call.
INLINE void tile(const float *packed, const float *panel, int64_t steps, bool accumulate,
                 float *sums, const int n_x)
{
    __m256 sum[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK) {
        int64_t block = steps - s < HB_LINEAR4_X_BLOCK ? steps - s : HB_LINEAR4_X_BLOCK;
        const float *x = packed + s * TILE_ROWS;
#pragma GCC unroll 4
        for (int64_t i = 0; i < block; i++) {
            __m256 low = _mm256_load_ps(panel), high = _mm256_load_ps(panel + LANES);
            panel += TILE_COLS;
#pragma GCC unroll 6
            for (int t = 0; t < n_x; t++) {
                __m256 value = _mm256_broadcast_ss(x + t * HB_LINEAR4_X_BLOCK);
                sum[t][0] = _mm256_fmadd_ps(value, low, sum[t][0]);
                sum[t][1] = _mm256_fmadd_ps(value, high, sum[t][1]);
            }
            x++;
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            float *target = sums + t * TILE_COLS + c * LANES;
            if (accumulate) sum[t][c] = _mm256_add_ps(_mm256_load_ps(target), sum[t][c]);
            _mm256_store_ps(target, sum[t][c]);
        }
}

// ---- entries -----------------------------------------------------------------------------------

HB_LINEAR4_ENTRIES(f32, avx2, false)
HB_LINEAR4_ENTRIES(bf16, avx2, true)
HB_LINEAR4_ADD_ENTRY(f32, avx2, false)
HB_LINEAR4_ADD_ENTRY(bf16, avx2, true)
HB_LINEAR4_TILE(f32, avx2)

INLINE void finish(const float *sums, const float *bias, int64_t n, hb_dtype io, void *y)
{
    for (int64_t i = 0; i < n; i += LANES) {
        __m256 value = load_upto_f32x8(sums, i, n, HB_F32);
        if (bias != NULL) value = _mm256_add_ps(value, load_upto_f32x8(bias, i, n, HB_F32));
        store_upto_f32x8(y, i, n, value, false, io);
    }
}

static void hb_linear4_finish_avx2(const float *sums, const float *bias, int64_t n, hb_dtype dtype,
                                   void *y)
{
    switch (dtype) {
    case HB_F32: finish(sums, bias, n, HB_F32, y); break;
    case HB_BF16: finish(sums, bias, n, HB_BF16, y); break;
    default: finish(sums, bias, n, HB_F16, y); break;
    }
}

void hb_linear4_table_avx2(hb_kernels_linear4 *kernels)
{
    kernels->f32 = HB_LINEAR4_SET(f32, avx2);
    kernels->bf16 = HB_LINEAR4_SET(bf16, avx2);
    kernels->bf16.dot_until = DOT_UNTIL_BF16;
    for (int c = 0; c < CHUNK; c++) { // lane i of vector v, nibble n
        const int i = c % LANES, v = c / LANES % 4, n = c / (4 * LANES);
        kernels->bf16.add_order[c] = kernels->f32.add_order[c] =
            (uint8_t)(2 * (4 * v + i % 4) + n + i / 4 * 32);
    }
    kernels->bf16.add_until = kernels->f32.add_until = ADD_UNTIL;
    kernels->f32.add_rows = hb_linear4_add_rows_f32_avx2;
    kernels->bf16.add_rows = hb_linear4_add_rows_bf16_avx2;
    // Even columns first.
    for (int c = 0; c < TILE_COLS; c++)
        kernels->bf16.column_order[c] = kernels->f32.column_order[c] =
            (uint8_t)(2 * (c % 8) + c / 8);
    kernels->finish = hb_linear4_finish_avx2;
}
