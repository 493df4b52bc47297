// Products with int8 weights on 16 float32 or 32 int16 lanes.
//
//   dot_int8  x as int16; w widened by vpmovsxbw, vpmaddwd into int32: 2 * 128 * 128 fits, exact
//   for every
//             code. TILE_X x TILE_W sums stay in registers over the whole depth.
//   dot_f32   w widened to int32 and converted, fused multiply-add; two chains of 16 lanes per sum.
//   panels    16 x 16 codes transposed as bytes, then widened.
//
// Weights are read once, in address order, with software prefetch one PREFETCH ahead: a row's
// neighbour in memory is the next row, so the stream has no ends. Accuracy: kernels_linear8.h
// (dot_f32: depth/32 + 8).
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_X = 4, TILE_W = 6, PREFETCH = 2048 };

static int64_t padded(int64_t depth)
{
    return (depth + 63) / 64 * 64;
}

static __mmask16 first16(int64_t n)
{
    return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1u);
}

static __mmask32 first32(int64_t n)
{
    return n >= 32 ? 0xffffffffu : (1u << n) - 1u;
}

static void prefetch(const void *p)
{
    _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
}

// ---- both sides int8
// ------------------------------------------------------------------------------

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    int16_t *out = prepared;
    for (int64_t k = 0; k < padded(depth); k += 32) {
        __m256i bytes = _mm256_maskz_loadu_epi8(depth - k > 0 ? first32(depth - k) : 0, codes + k);
        _mm512_storeu_si512(out + k, _mm512_cvtepi8_epi16(bytes));
    }
}

// n_x rows of x by n_w rows of w, constants at every call.
INLINE void int8_tile(const int8_t *w, int64_t w_stride, int64_t depth, const int16_t *x,
                      int64_t x_stride, int32_t *c, int64_t c_stride, const int n_x, const int n_w)
{
    __m512i sum[TILE_X][TILE_W];
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) sum[t][r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 32) {
        const __mmask32 lanes = first32(depth - k);
        __m512i wide[TILE_W];
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) {
            const int8_t *p = w + r * w_stride + k;
            if (k % 64 == 0) prefetch(p);
            wide[r] =
                _mm512_cvtepi8_epi16(lanes == 0xffffffffu ? _mm256_loadu_si256((const void *)p)
                                                          : _mm256_maskz_loadu_epi8(lanes, p));
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            const __m512i xs = _mm512_loadu_si512(x + t * x_stride + k);
#pragma GCC unroll 6
            for (int r = 0; r < n_w; r++)
                sum[t][r] = _mm512_add_epi32(sum[t][r], _mm512_madd_epi16(xs, wide[r]));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) c[t * c_stride + r] = _mm512_reduce_add_epi32(sum[t][r]);
}

INLINE void int8_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const int16_t *x, int64_t x_stride, int32_t *c, int64_t c_stride,
                      const int n_x)
{
    int64_t r = 0;
    for (; r + TILE_W <= n_rows; r += TILE_W)
        int8_tile(w + r * w_stride, w_stride, depth, x, x_stride, c + r, c_stride, n_x, TILE_W);
    for (; r + 2 <= n_rows; r += 2)
        int8_tile(w + r * w_stride, w_stride, depth, x, x_stride, c + r, c_stride, n_x, 2);
    if (r < n_rows)
        int8_tile(w + r * w_stride, w_stride, depth, x, x_stride, c + r, c_stride, n_x, 1);
}

static void dot_int8(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const void *prepared, int n_x, int32_t *c, int64_t c_stride)
{
    const int64_t stride = hb_int8_prepared_bytes(depth, 2) / 2;
    switch (n_x) {
    case 1: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 1); break;
    case 2: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 2); break;
    case 3: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 3); break;
    default: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 4); break;
    }
}

static void rescale(const int32_t *c, float x_factor, const float *extra, const float *w_factor,
                    int64_t n, float *out)
{
    const __m512 factor = _mm512_set1_ps(x_factor);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = first16(n - i);
        __m512 value = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes, c + i));
        value = _mm512_mul_ps(value, factor);
        if (extra != NULL) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, extra + i));
        value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, w_factor + i));
        _mm512_mask_storeu_ps(out + i, lanes, value);
    }
}

// ---- float32 x, few rows
// ----------------------------------------------------------------------------

enum { F32_W = 4, F32_X = 4 };

INLINE __m512 widen(__m128i codes)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

// Each sum has two chains, of even and of odd groups of 16, whatever n_x and n_w are.
INLINE void f32_tile(const int8_t *w, int64_t w_stride, int64_t depth, const float *x,
                     int64_t x_stride, float *y, int64_t y_stride, const int n_x, const int n_w)
{
    __m512 sum[F32_X][F32_W][2];
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) sum[t][r][0] = sum[t][r][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= depth; k += 32) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 wide[F32_W];
#pragma GCC unroll 4
            for (int r = 0; r < n_w; r++) {
                const int8_t *p = w + r * w_stride + k + half * 16;
                if (half == 0 && k % 64 == 0) prefetch(p);
                wide[r] = widen(_mm_loadu_si128((const void *)p));
            }
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++) {
                const __m512 xs = _mm512_loadu_ps(x + t * x_stride + k + half * 16);
#pragma GCC unroll 4
                for (int r = 0; r < n_w; r++)
                    sum[t][r][half] = _mm512_fmadd_ps(xs, wide[r], sum[t][r][half]);
            }
        }
    }
    for (int half = 0; k + half * 16 < depth; half++) {
        const int64_t at = k + half * 16;
        const __mmask16 lanes = first16(depth - at);
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) {
            const __m512 wide = widen(_mm_maskz_loadu_epi8(lanes, w + r * w_stride + at));
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++) {
                const __m512 xs = _mm512_maskz_loadu_ps(lanes, x + t * x_stride + at);
                if (half == 0)
                    sum[t][r][0] = _mm512_fmadd_ps(xs, wide, sum[t][r][0]);
                else
                    sum[t][r][1] = _mm512_fmadd_ps(xs, wide, sum[t][r][1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++)
            y[t * y_stride + r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[t][r][0], sum[t][r][1]));
}

INLINE void f32_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const float *x, int64_t x_stride, float *y, int64_t y_stride, const int n_x,
                     const int n_w)
{
    int64_t r = 0;
    for (; r + n_w <= n_rows; r += n_w)
        f32_tile(w + r * w_stride, w_stride, depth, x, x_stride, y + r, y_stride, n_x, n_w);
    for (; r < n_rows; r++)
        f32_tile(w + r * w_stride, w_stride, depth, x, x_stride, y + r, y_stride, n_x, 1);
}

static void dot_f32(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                    const float *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    switch (n_x) { // at most 24 sums in registers
    case 1: f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 1, 4); break;
    case 2: f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 2, 4); break;
    case 3: f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 3, 4); break;
    default: f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 4, 3); break;
    }
}

// ---- panels
// -----------------------------------------------------------------------------------------

// Codes of 16 rows by 16 columns: rows[i] holds row i before, column i after. Four rounds of
// interleaving the first half of the rows with the second.
INLINE void transpose_bytes(__m128i rows[16])
{
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
        __m128i next[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
            next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) rows[i] = next[i];
    }
}

static void decode_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                        int tile_cols, float *panel)
{
    for (int64_t k = 0; k < depth; k += 16) {
        const __mmask16 columns = first16(depth - k);
        for (int64_t r = 0; r < tile_cols; r += 16) {
            __m128i rows[16];
            for (int64_t i = 0; i < 16; i++) {
                const bool inside = r + i < n_rows;
                const int8_t *p = w + (inside ? (r + i) * w_stride + k : 0);
                rows[i] = _mm_maskz_loadu_epi8(inside ? columns : 0, p);
            }
            transpose_bytes(rows);
            const int64_t n = depth - k < 16 ? depth - k : 16;
            float *out = panel + k * tile_cols + r;
            if (n == 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm512_storeu_ps(out + i * tile_cols, widen(rows[i]));
            } else {
                for (int64_t i = 0; i < n; i++)
                    _mm512_storeu_ps(out + i * tile_cols, widen(rows[i]));
            }
        }
    }
}

static void decode_cols(const int8_t *w, int64_t w_stride, const float *factor, int64_t n_rows,
                        int64_t n_cols, int tile_cols, float *panel)
{
    for (int64_t r = 0; r < n_rows; r++) {
        const __m512 scale = _mm512_set1_ps(factor[r]);
        for (int64_t c = 0; c < tile_cols; c += 16) {
            const __mmask16 lanes = c < n_cols ? first16(n_cols - c) : 0;
            const __m128i codes = _mm_maskz_loadu_epi8(lanes, w + r * w_stride + c);
            _mm512_storeu_ps(panel + r * tile_cols + c,
                             _mm512_maskz_mul_ps(lanes, widen(codes), scale));
        }
    }
}

void hb_linear8_table_avx512(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = TILE_X;
    kernels->dot_f32_rows = F32_X;
    kernels->prepared_bytes = 2;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    hb_int8_pairs_table_avx512(&kernels->pairs);
    kernels->rescale = rescale;
    kernels->dot_f32 = dot_f32;
    kernels->decode_rows = decode_rows;
    kernels->decode_cols = decode_cols;
}
