// Products with int8 weights on 4 float32 or 16 int8 lanes (baseline Advanced SIMD).
//
//   dot_int8  smull into int16, sadalp pairs of them into int32: 128 * 128 fits, exact for every
//   code.
//             TILE_X x TILE_W sums stay in registers over the whole depth.
//   dot_f32   w widened twice and converted, fused multiply-add; four chains of 4 lanes per sum.
//   panels    16 x 16 codes transposed as bytes, then widened.
//
// Ends of rows go through a small buffer: nothing behind them is read. Prepared x is the codes,
// with zeros up to a multiple of 64. Accuracy: kernels_linear8.h (dot_f32: depth/16 + 6).
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_X = 2, TILE_W = 4 };

static int64_t padded(int64_t depth)
{
    return (depth + 63) / 64 * 64;
}

// The first n codes at p, then zeros; n >= 16 loads all sixteen.
INLINE int8x16_t load_codes(const int8_t *p, int64_t n)
{
    if (n >= 16) return vld1q_s8(p);
    int8_t buffer[16] = {0};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return vld1q_s8(buffer);
}

// ---- both sides int8
// ------------------------------------------------------------------------------

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    int8_t *out = prepared;
    for (int64_t k = 0; k < padded(depth); k += 16)
        vst1q_s8(out + k, load_codes(codes + k, depth - k));
}

// n_x rows of x by n_w rows of w, constants at every call.
INLINE void int8_tile(const int8_t *w, int64_t w_stride, int64_t depth, const int8_t *x,
                      int64_t x_stride, int32_t *c, int64_t c_stride, const int n_x, const int n_w)
{
    int32x4_t sum[TILE_X][TILE_W];
    for (int t = 0; t < n_x; t++)
        for (int r = 0; r < n_w; r++) sum[t][r] = vdupq_n_s32(0);
    for (int64_t k = 0; k < depth; k += 16) {
        int8x16_t ws[TILE_W];
        for (int r = 0; r < n_w; r++) ws[r] = load_codes(w + r * w_stride + k, depth - k);
        for (int t = 0; t < n_x; t++) {
            const int8x16_t xs = vld1q_s8(x + t * x_stride + k);
            for (int r = 0; r < n_w; r++) {
                const int16x8_t low = vmull_s8(vget_low_s8(xs), vget_low_s8(ws[r]));
                const int16x8_t high = vmull_s8(vget_high_s8(xs), vget_high_s8(ws[r]));
                sum[t][r] = vpadalq_s16(vpadalq_s16(sum[t][r], low), high);
            }
        }
    }
    for (int t = 0; t < n_x; t++)
        for (int r = 0; r < n_w; r++) c[t * c_stride + r] = vaddvq_s32(sum[t][r]);
}

INLINE void int8_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const int8_t *x, int64_t x_stride, int32_t *c, int64_t c_stride,
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
    const int64_t stride = hb_int8_prepared_bytes(depth, 1);
    if (n_x == 1)
        int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 1);
    else
        int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 2);
}

static void rescale(const int32_t *c, float x_factor, const float *extra, const float *w_factor,
                    int64_t n, float *out)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(c + i)), x_factor);
        if (extra != NULL) value = vaddq_f32(value, vld1q_f32(extra + i));
        vst1q_f32(out + i, vmulq_f32(value, vld1q_f32(w_factor + i)));
    }
    for (; i < n; i++) {
        float value = (float)c[i] * x_factor;
        if (extra != NULL) value += extra[i];
        out[i] = value * w_factor[i];
    }
}

// ---- float32 x, few rows
// ----------------------------------------------------------------------------

enum { F32_X = 2, F32_W = 2 };

typedef struct {
    float32x4_t part[4];
} float32x16;

INLINE float32x16 widen(int8x16_t codes)
{
    const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    float32x16 wide;
    wide.part[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    wide.part[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    wide.part[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    wide.part[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
    return wide;
}

// Each sum has four chains, and the last depth % 16 products one by one behind them, whatever n_x
// and n_w.
INLINE void f32_tile(const int8_t *w, int64_t w_stride, int64_t depth, const float *x,
                     int64_t x_stride, float *y, int64_t y_stride, const int n_x, const int n_w)
{
    float32x4_t sum[F32_X][F32_W][4];
    for (int t = 0; t < n_x; t++)
        for (int r = 0; r < n_w; r++)
            for (int i = 0; i < 4; i++) sum[t][r][i] = vdupq_n_f32(0.0f);
    int64_t k = 0;
    for (; k + 16 <= depth; k += 16)
        for (int r = 0; r < n_w; r++) {
            const float32x16 wide = widen(vld1q_s8(w + r * w_stride + k));
            for (int t = 0; t < n_x; t++)
                for (int i = 0; i < 4; i++)
                    sum[t][r][i] = vfmaq_f32(sum[t][r][i], vld1q_f32(x + t * x_stride + k + 4 * i),
                                             wide.part[i]);
        }
    for (int t = 0; t < n_x; t++)
        for (int r = 0; r < n_w; r++) {
            float tail = 0.0f;
            for (int64_t i = k; i < depth; i++)
                tail += x[t * x_stride + i] * (float)w[r * w_stride + i];
            const float32x4_t *s = sum[t][r];
            const float32x4_t all = vaddq_f32(vaddq_f32(s[0], s[1]), vaddq_f32(s[2], s[3]));
            y[t * y_stride + r] = vaddvq_f32(all) + tail;
        }
}

INLINE void f32_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const float *x, int64_t x_stride, float *y, int64_t y_stride, const int n_x)
{
    int64_t r = 0;
    for (; r + F32_W <= n_rows; r += F32_W)
        f32_tile(w + r * w_stride, w_stride, depth, x, x_stride, y + r, y_stride, n_x, F32_W);
    for (; r < n_rows; r++)
        f32_tile(w + r * w_stride, w_stride, depth, x, x_stride, y + r, y_stride, n_x, 1);
}

static void dot_f32(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                    const float *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    if (n_x == 1)
        f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 1);
    else
        f32_rows(w, w_stride, n_rows, depth, x, x_stride, y, y_stride, 2);
}

// ---- panels
// -----------------------------------------------------------------------------------------

// Codes of 16 rows by 16 columns: rows[i] holds row i before, column i after. Four rounds of
// interleaving the first half of the rows with the second.
INLINE void transpose_bytes(int8x16_t rows[16])
{
    for (int round = 0; round < 4; round++) {
        int8x16_t next[16];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = vzip1q_s8(rows[i], rows[i + 8]);
            next[2 * i + 1] = vzip2q_s8(rows[i], rows[i + 8]);
        }
        for (int i = 0; i < 16; i++) rows[i] = next[i];
    }
}

INLINE void store_widened(float *out, int8x16_t codes)
{
    const float32x16 wide = widen(codes);
    for (int i = 0; i < 4; i++) vst1q_f32(out + 4 * i, wide.part[i]);
}

static void decode_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                        int tile_cols, float *panel)
{
    for (int64_t k = 0; k < depth; k += 16)
        for (int64_t r = 0; r < tile_cols; r += 16) {
            int8x16_t rows[16];
            for (int64_t i = 0; i < 16; i++)
                rows[i] = r + i < n_rows ? load_codes(w + (r + i) * w_stride + k, depth - k)
                                         : vdupq_n_s8(0);
            transpose_bytes(rows);
            const int64_t n = depth - k < 16 ? depth - k : 16;
            for (int64_t i = 0; i < n; i++) store_widened(panel + (k + i) * tile_cols + r, rows[i]);
        }
}

static void decode_cols(const int8_t *w, int64_t w_stride, const float *factor, int64_t n_rows,
                        int64_t n_cols, int tile_cols, float *panel)
{
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < tile_cols; c += 16) {
            float *out = panel + r * tile_cols + c;
            if (c + 16 <= n_cols) {
                const float32x16 wide = widen(vld1q_s8(w + r * w_stride + c));
                for (int i = 0; i < 4; i++)
                    vst1q_f32(out + 4 * i, vmulq_n_f32(wide.part[i], factor[r]));
            } else { // zero where there is no column, also when the factor is not finite
                for (int64_t i = 0; i < 16; i++)
                    out[i] = c + i < n_cols ? (float)w[r * w_stride + c + i] * factor[r] : 0.0f;
            }
        }
}

void hb_linear8_table_neon(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = TILE_X;
    kernels->dot_f32_rows = F32_X;
    kernels->prepared_bytes = 1;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    kernels->rescale = rescale;
    kernels->dot_f32 = dot_f32;
    kernels->decode_rows = decode_rows;
    kernels->decode_cols = decode_cols;
}
