// Products with int8 weights on 8 float32 or 16 int16 lanes.
//
//   dot_int8  x as int16; w widened by vpmovsxbw, vpmaddwd into int32: 2 * 128 * 128 fits, exact
//   for every
//             code (maddubs would saturate). TILE_X x TILE_W sums stay in registers over the whole
//             depth.
//   dot_f32   w widened to int32 and converted, fused multiply-add; two chains of 8 lanes per sum.
//   panels    16 x 16 codes transposed as bytes, then widened.
//
// Weights are read in address order with software prefetch. Ends of rows go through a small buffer:
// nothing behind them is read. Accuracy: kernels_linear8.h (dot_f32: depth/16 + 7).
#include "core/kernels_linear8.h"
#include "cpu/codes8_x86.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_X = 2, TILE_W = 4, PREFETCH = 2048 };

static int64_t padded(int64_t depth)
{
    return (depth + 63) / 64 * 64;
}

static void prefetch(const void *p)
{
    _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
}

// The first n codes at p, then zeros; n >= 16 loads all sixteen.
INLINE __m128i load_codes(const int8_t *p, int64_t n)
{
    if (n >= 16) return _mm_loadu_si128((const void *)p);
    int8_t buffer[16] = {0};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return _mm_loadu_si128((const void *)buffer);
}

// ---- both sides int8
// ------------------------------------------------------------------------------

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    int16_t *out = prepared;
    for (int64_t k = 0; k < padded(depth); k += 16)
        _mm256_storeu_si256((void *)(out + k),
                            _mm256_cvtepi8_epi16(load_codes(codes + k, depth - k)));
}

// n_x rows of x by n_w rows of w, constants at every call.
INLINE void int8_tile(const int8_t *w, int64_t w_stride, int64_t depth, const int16_t *x,
                      int64_t x_stride, int32_t *c, int64_t c_stride, const int n_x, const int n_w)
{
    __m256i sum[TILE_X][TILE_W];
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) sum[t][r] = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += 16) {
        __m256i wide[TILE_W];
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) {
            const int8_t *p = w + r * w_stride + k;
            if (k % 64 == 0) prefetch(p);
            wide[r] = _mm256_cvtepi8_epi16(load_codes(p, depth - k));
        }
#pragma GCC unroll 2
        for (int t = 0; t < n_x; t++) {
            const __m256i xs = _mm256_loadu_si256((const void *)(x + t * x_stride + k));
#pragma GCC unroll 4
            for (int r = 0; r < n_w; r++)
                sum[t][r] = _mm256_add_epi32(sum[t][r], _mm256_madd_epi16(xs, wide[r]));
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) c[t * c_stride + r] = sum_of_lanes(sum[t][r]);
}

INLINE void int8_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const int16_t *x, int64_t x_stride, int32_t *c, int64_t c_stride,
                      const int n_x)
{
    int64_t r = 0;
    for (; r + TILE_W <= n_rows; r += TILE_W)
        int8_tile(w + r * w_stride, w_stride, depth, x, x_stride, c + r, c_stride, n_x, TILE_W);
    for (; r < n_rows; r++)
        int8_tile(w + r * w_stride, w_stride, depth, x, x_stride, c + r, c_stride, n_x, 1);
}

static void dot_int8(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const void *prepared, int n_x, int32_t *c, int64_t c_stride)
{
    const int64_t stride = hb_int8_prepared_bytes(depth, 2) / 2;
    if (n_x == 1)
        int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 1);
    else
        int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 2);
}

static void rescale(const int32_t *c, float x_factor, const float *extra, const float *w_factor,
                    int64_t n, float *out)
{
    const __m256 factor = _mm256_set1_ps(x_factor);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 value = _mm256_cvtepi32_ps(_mm256_loadu_si256((const void *)(c + i)));
        value = _mm256_mul_ps(value, factor);
        if (extra != NULL) value = _mm256_add_ps(value, _mm256_loadu_ps(extra + i));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(value, _mm256_loadu_ps(w_factor + i)));
    }
    for (; i < n; i++) {
        float value = (float)c[i] * x_factor;
        if (extra != NULL) value += extra[i];
        out[i] = value * w_factor[i];
    }
}

// ---- float32 x, few rows
// ----------------------------------------------------------------------------

enum { F32_X = 2, F32_W = 4 };

INLINE __m256 widen(__m128i codes) // the low eight
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

static float sum_of_floats(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
    return _mm_cvtss_f32(s);
}

// Each sum has two chains, of even and of odd groups of 8, and the last depth % 16 products one by
// one behind them, whatever n_x and n_w are.
INLINE void f32_tile(const int8_t *w, int64_t w_stride, int64_t depth, const float *x,
                     int64_t x_stride, float *y, int64_t y_stride, const int n_x, const int n_w)
{
    __m256 sum[F32_X][F32_W][2];
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) sum[t][r][0] = sum[t][r][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= depth; k += 16) {
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) {
            const int8_t *p = w + r * w_stride + k;
            if (k % 64 == 0) prefetch(p);
            const __m256 low = widen(_mm_loadl_epi64((const void *)p));
            const __m256 high = widen(_mm_loadl_epi64((const void *)(p + 8)));
#pragma GCC unroll 2
            for (int t = 0; t < n_x; t++) {
                const float *xs = x + t * x_stride + k;
                sum[t][r][0] = _mm256_fmadd_ps(_mm256_loadu_ps(xs), low, sum[t][r][0]);
                sum[t][r][1] = _mm256_fmadd_ps(_mm256_loadu_ps(xs + 8), high, sum[t][r][1]);
            }
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) {
            float tail = 0.0f;
            for (int64_t i = k; i < depth; i++)
                tail += x[t * x_stride + i] * (float)w[r * w_stride + i];
            y[t * y_stride + r] = sum_of_floats(_mm256_add_ps(sum[t][r][0], sum[t][r][1])) + tail;
        }
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
    if (n_x == 1)
        f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 1, 4);
    else
        f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 2, 2);
}

// ---- panels
// -----------------------------------------------------------------------------------------

// Codes of 16 rows by 16 columns: rows[i] holds row i before, column i after. Four rounds of
// interleaving the first half of the rows with the second.
INLINE void transpose_bytes(__m128i rows[16])
{
    for (int round = 0; round < 4; round++) {
        __m128i next[16];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
            next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
        }
        for (int i = 0; i < 16; i++) rows[i] = next[i];
    }
}

INLINE void store_widened(float *out, __m128i codes)
{
    _mm256_storeu_ps(out, widen(codes));
    _mm256_storeu_ps(out + 8, widen(_mm_srli_si128(codes, 8)));
}

static void decode_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                        int tile_cols, float *panel)
{
    for (int64_t k = 0; k < depth; k += 16)
        for (int64_t r = 0; r < tile_cols; r += 16) {
            __m128i rows[16];
            for (int64_t i = 0; i < 16; i++)
                rows[i] = r + i < n_rows ? load_codes(w + (r + i) * w_stride + k, depth - k)
                                         : _mm_setzero_si128();
            transpose_bytes(rows);
            const int64_t n = depth - k < 16 ? depth - k : 16;
            for (int64_t i = 0; i < n; i++) store_widened(panel + (k + i) * tile_cols + r, rows[i]);
        }
}

static void decode_cols(const int8_t *w, int64_t w_stride, const float *factor, int64_t n_rows,
                        int64_t n_cols, int tile_cols, float *panel)
{
    for (int64_t r = 0; r < n_rows; r++) {
        const __m256 scale = _mm256_set1_ps(factor[r]);
        for (int64_t c = 0; c < tile_cols; c += 16) {
            float *out = panel + r * tile_cols + c;
            if (c + 16 <= n_cols) {
                const __m128i codes = load_codes(w + r * w_stride + c, 16);
                _mm256_storeu_ps(out, _mm256_mul_ps(widen(codes), scale));
                _mm256_storeu_ps(out + 8, _mm256_mul_ps(widen(_mm_srli_si128(codes, 8)), scale));
            } else { // zero where there is no column, also when the factor is not finite
                for (int64_t i = 0; i < 16; i++)
                    out[i] = c + i < n_cols ? (float)w[r * w_stride + c + i] * factor[r] : 0.0f;
            }
        }
    }
}

void hb_linear8_table_avx2(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = TILE_X;
    kernels->dot_f32_rows = F32_X;
    kernels->prepared_bytes = 2;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    hb_int8_pairs_table_avx2(&kernels->pairs);
    kernels->rescale = rescale;
    kernels->dot_f32 = dot_f32;
    kernels->decode_rows = decode_rows;
    kernels->decode_cols = decode_cols;
}
