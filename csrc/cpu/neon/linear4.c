// Products with 4-bit weights, NEON (baseline AArch64).
//
// Decoding: the codebook's float32 values are kept as four tables of 16 bytes, one per byte of a
// value (what vld4 leaves in its four registers). tbl looks up 16 codes in each; zipping the four
// results twice gives 16 float32 in four vectors, in order. bfloat16 values need two tables, one
// zip and a widening shift.
//
// A load of 16 bytes is a chunk of 32 columns, which lie in one block of W; high nibbles (even
// columns) come first, then low ones. dot keeps that order and permutes x once per call instead:
//
//   permuted[16n + i] = x[2i + n], n = 0, 1, in every chunk of 32
//
// The sum of a chunk's 8 products per lane is scaled once; the four chunks of a group of 128 have
// totals of their own (16 partial sums per y, as the bound in kernels_linear4.h counts them).
// decode_rows first zips the bytes of 4 rows, so that a lane is a row of W; decode_cols zips high
// with low nibbles, so that columns keep their order. The bfloat16 set is the same arithmetic on
// rounded values.
#include "core/kernels_linear4.h"
#include "cpu/neon/io.h"
#include "cpu/linear4_entries.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    DOT_ROWS = 4,
    DOT_UNTIL = 4,
    TILE_ROWS = 6,
    TILE_COLS = 16,
    PANEL_STEPS = 256,
    LANES = 4,
    CHUNK = 32,
};

// ---- conversions ------------------------------------------------------------------------------

INLINE float32x4_t rounded_to_bf16(float32x4_t value)
{
    return vreinterpretq_f32_u32(vshll_n_u16(bf16_from_f32x4(value), 16));
}

// The same for values that are numbers or the NaN of sane_scale: adding cannot carry out of it.
INLINE float32x4_t rounded_weight(float32x4_t value)
{
    uint32x4_t bits = vreinterpretq_u32_f32(value);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    return vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(0xffff0000u)));
}

// A NaN becomes the one with the smallest payload, which every product with it then has.
INLINE float32x4_t sane_scale(float32x4_t scale)
{
    float32x4_t nan = vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000));
    return vbslq_f32(vceqq_f32(scale, scale), scale, nan);
}

// ---- codebook ---------------------------------------------------------------------------------

// val[b]: byte b of the 16 values.
INLINE uint8x16x4_t make_book(const float *codebook, bool bf16)
{
    float values[16];
    for (int i = 0; i < 16; i += LANES) {
        float32x4_t value = vld1q_f32(codebook + i);
        vst1q_f32(values + i, bf16 ? rounded_to_bf16(value) : value);
    }
    return vld4q_u8((const uint8_t *)values);
}

// The codes in high (0) or low (1) nibbles, as bytes.
INLINE uint8x16_t nibbles(uint8x16_t bytes, const int which)
{
    return which == 0 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
}

INLINE float32x4_t as_f32x4(uint16x8_t bits)
{
    return vreinterpretq_f32_u16(bits);
}

// Values of 16 codes, exact float32.
INLINE void look_up_f32(const uint8x16x4_t *b, uint8x16_t codes, float32x4_t *value)
{
    uint8x16_t byte0 = vqtbl1q_u8(b->val[0], codes), byte1 = vqtbl1q_u8(b->val[1], codes);
    uint8x16_t byte2 = vqtbl1q_u8(b->val[2], codes), byte3 = vqtbl1q_u8(b->val[3], codes);
    uint16x8_t half0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
    uint16x8_t half0b = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    uint16x8_t half1 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    uint16x8_t half1b = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    value[0] = as_f32x4(vzip1q_u16(half0, half1));
    value[1] = as_f32x4(vzip2q_u16(half0, half1));
    value[2] = as_f32x4(vzip1q_u16(half0b, half1b));
    value[3] = as_f32x4(vzip2q_u16(half0b, half1b));
}

// Values of 16 codes where all values are bfloat16 numbers.
INLINE void look_up_bf16(const uint8x16x4_t *b, uint8x16_t codes, float32x4_t *value)
{
    uint8x16_t byte2 = vqtbl1q_u8(b->val[2], codes), byte3 = vqtbl1q_u8(b->val[3], codes);
    uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    value[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(first), 16));
    value[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(first), 16));
    value[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(second), 16));
    value[3] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(second), 16));
}

// ---- dot --------------------------------------------------------------------------------------

INLINE void permute_io(const void *x, hb_dtype io, int64_t depth, bool bf16, float *permuted)
{
    const int64_t padded = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    for (int64_t k = 0; k < padded; k += CHUNK)
        for (int v = 0; v < 4; v++) {
            const int64_t at = k + 2 * LANES * v;
            float32x4_t a = vdupq_n_f32(0), b = a;
            if (at < depth) {
                a = load_f32x4(x, at, io);
                b = load_f32x4(x, at + LANES, io);
            }
            float32x4_t even = vuzp1q_f32(a, b), odd = vuzp2q_f32(a, b);
            vst1q_f32(permuted + k + LANES * v, bf16 ? rounded_to_bf16(even) : even);
            vst1q_f32(permuted + k + 16 + LANES * v, bf16 ? rounded_to_bf16(odd) : odd);
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

// 32 columns of `rows` rows of W against n_x rows of x, scaled and added to total[r * n_x + t].
INLINE void dot_chunk(const uint8x16x4_t *b, const uint8x16_t *bytes, const float *scale,
                      const float *x, int64_t x_stride, const int rows, const int n_x,
                      const bool bf16, float32x4_t *total)
{
    float32x4_t sum[DOT_ROWS * 2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        float32x4_t value[2][4];
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
                float32x4_t x_f32x4 = vld1q_f32(x + t * x_stride + (4 * n + v) * LANES);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) {
                    float32x4_t *s = &sum[r * n_x + t];
                    *s = n + v == 0 ? vmulq_f32(value[r][v], x_f32x4)
                                    : vfmaq_f32(*s, value[r][v], x_f32x4);
                }
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows * n_x; i++) total[i] = vfmaq_n_f32(total[i], sum[i], scale[i / n_x]);
}

// `rows` rows of W from row `first` against n_x rows of x, both small constants.
INLINE void dot_some(const hb_matrix4 *w, int64_t first, int64_t depth, const int shift,
                     const uint8x16x4_t *b, const float *x, const int rows, const int n_x,
                     const bool bf16, float *y, int64_t y_stride)
{
    const int64_t x_stride = hb_ceil_div(depth, HB_LINEAR4_X_GROUP) * HB_LINEAR4_X_GROUP;
    const uint8_t *packed[2];
    const float *absmax[2];
    float32x4_t total[4][DOT_ROWS * 2];
    uint8x16_t bytes[2];
    float scale[2];
    for (int r = 0; r < rows; r++) {
        packed[r] = w->packed + (first + r) * w->row_bytes;
        absmax[r] = w->absmax + (first + r) * w->absmax_stride;
    }
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < rows * n_x; i++) total[c][i] = vdupq_n_f32(0);
    int64_t k = 0;
    for (; k + 4 * CHUNK <= depth; k += 4 * CHUNK)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const int64_t at = k + c * CHUNK;
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                bytes[r] = vld1q_u8(packed[r] + at / 2);
                scale[r] = absmax[r][at >> shift];
                if (c == 0) // the rows that come next
                    __builtin_prefetch(packed[r] + at / 2 + rows * w->row_bytes);
            }
            dot_chunk(b, bytes, scale, x + at, x_stride, rows, n_x, bf16, total[c]);
        }
    for (int c = 0; k < depth; k += CHUNK, c++) {
        for (int r = 0; r < rows; r++) {
            bytes[r] = vld1q_u8(packed[r] + k / 2);
            scale[r] = absmax[r][k >> shift];
        }
        dot_chunk(b, bytes, scale, x + k, x_stride, rows, n_x, bf16, total[c]);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < n_x; t++) {
            int i = r * n_x + t;
            y[t * y_stride + first + r] = vaddvq_f32(vaddq_f32(
                vaddq_f32(total[0][i], total[1][i]), vaddq_f32(total[2][i], total[3][i])));
        }
}

INLINE void dot_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const int shift,
                     const uint8x16x4_t *b, const float *x, const int rows, const int n_x,
                     const bool bf16, float *y, int64_t y_stride)
{
    int64_t r = 0;
    for (; r + rows <= n_rows; r += rows)
        dot_some(w, r, depth, shift, b, x, rows, n_x, bf16, y, y_stride);
    for (; rows > 1 && r < n_rows; r++)
        dot_some(w, r, depth, shift, b, x, 1, n_x, bf16, y, y_stride);
}

INLINE void dot(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const float *x, int n_x,
                const bool bf16, float *y, int64_t y_stride)
{
    const uint8x16x4_t b = make_book(w->codebook, bf16);
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    switch (n_x) {
    case 1: dot_rows(w, n_rows, depth, shift, &b, x, 1, 1, bf16, y, y_stride); break;
    case 2: dot_rows(w, n_rows, depth, shift, &b, x, 2, 2, bf16, y, y_stride); break;
    case 3: dot_rows(w, n_rows, depth, shift, &b, x, 2, 3, bf16, y, y_stride); break;
    default: dot_rows(w, n_rows, depth, shift, &b, x, 2, 4, bf16, y, y_stride); break;
    }
}

// ---- panel ------------------------------------------------------------------------------------

INLINE void pack_io(const void *x, hb_dtype io, int64_t x_stride, int n_x, int64_t steps, bool bf16,
                    float *packed)
{
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK)
        for (int t = 0; t < TILE_ROWS; t++)
            for (int i = 0; i < HB_LINEAR4_X_BLOCK; i += LANES) {
                float32x4_t value = vdupq_n_f32(0);
                if (t < n_x && s + i < steps)
                    value = load_upto_f32x4(x, t * x_stride + s + i, t * x_stride + steps, io);
                if (bf16) value = rounded_to_bf16(value);
                vst1q_f32(packed + s * TILE_ROWS + t * HB_LINEAR4_X_BLOCK + i, value);
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

// 16 bytes of each of 4 rows -> 32-bit lane q of out[m]: byte 4m + q of the rows.
INLINE void interleave_rows(const uint8x16_t *v, uint8x16_t *out)
{
    uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(v[0], v[1]));
    uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(v[0], v[1]));
    uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(v[2], v[3]));
    uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(v[2], v[3]));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(low01, low23));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(low01, low23));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(high01, high23));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(high01, high23));
}

// 4 rows of W (n_rows of them present) into 4 columns of the panel.
INLINE void decode_4_rows(const hb_matrix4 *w, int64_t first, int64_t n_rows, int64_t depth,
                          const uint8x16x4_t *b, const bool bf16, float *panel)
{
    const uint8_t *packed[4];
    const int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    for (int r = 0; r < 4; r++)
        packed[r] = w->packed + (first + (r < n_rows ? r : 0)) * w->row_bytes;
    float32x4_t scale = vdupq_n_f32(0);
    for (int64_t k = 0; k < depth; k += 32) {
        if ((k & (w->blocksize - 1)) == 0) {
            float scales[4] = {0};
            for (int r = 0; r < 4 && r < n_rows; r++)
                scales[r] = w->absmax[(first + r) * w->absmax_stride + (k >> shift)];
            scale = vld1q_f32(scales);
            if (bf16) scale = sane_scale(scale);
        }
        uint8x16_t v[4], codes[4];
        for (int r = 0; r < 4; r++) {
            v[r] = vld1q_u8(packed[r] + k / 2);
            if (k % 128 == 0) // the same rows of the next panel
                __builtin_prefetch(packed[r] + k / 2 + PANEL_STEPS / 2);
        }
        interleave_rows(v, codes);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++)
#pragma GCC unroll 2
            for (int n = 0; n < 2; n++) {
                float32x4_t value[4];
                look_up_f32(b, nibbles(codes[m], n), value);
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++) {
                    float32x4_t weight = vmulq_f32(value[q], scale);
                    if (bf16) weight = rounded_weight(weight);
                    vst1q_f32(panel + (k + 2 * (4 * m + q) + n) * TILE_COLS, weight);
                }
            }
    }
}

INLINE void decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, const bool bf16,
                        float *panel)
{
    const uint8x16x4_t b = make_book(w->codebook, false);
    for (int64_t r = 0; r < TILE_COLS; r += LANES) {
        if (r < n_rows)
            decode_4_rows(w, r, n_rows - r, depth, &b, bf16, panel + r);
        else
            for (int64_t k = 0; k < depth; k++)
                vst1q_f32(panel + k * TILE_COLS + r, vdupq_n_f32(0));
    }
}

INLINE void decode_16_columns(uint8x16_t codes, float scale, const uint8x16x4_t *b, const bool bf16,
                              float *panel)
{
    float32x4_t value[4];
    float32x4_t factor = vdupq_n_f32(scale);
    if (bf16) factor = sane_scale(factor);
    look_up_f32(b, codes, value);
    for (int v = 0; v < 4; v++) {
        float32x4_t weight = vmulq_f32(value[v], factor);
        vst1q_f32(panel + v * LANES, bf16 ? rounded_weight(weight) : weight);
    }
}

INLINE void decode_cols(const hb_matrix4 *w, int64_t n_rows, int64_t n_cols, const bool bf16,
                        float *panel)
{
    const uint8x16x4_t b = make_book(w->codebook, false);
    if (n_cols < TILE_COLS) { // 0: there is nothing to read
        memset(panel, 0, (size_t)(n_rows * TILE_COLS) * sizeof *panel);
        return;
    }
    for (int64_t r = 0; r < n_rows; r += 2) {
        const int64_t other = r + 1 < n_rows ? r + 1 : r;
        const uint8_t *packed = w->packed + r * w->row_bytes;
        const uint8_t *packed_other = w->packed + other * w->row_bytes;
        uint8x16_t bytes = vcombine_u8(vld1_u8(packed), vld1_u8(packed_other));
        uint8x16_t high = nibbles(bytes, 0), low = nibbles(bytes, 1);
        __builtin_prefetch(packed + 16 * w->row_bytes);
        __builtin_prefetch(packed_other + 16 * w->row_bytes);
        decode_16_columns(vzip1q_u8(high, low), w->absmax[r * w->absmax_stride], &b, bf16,
                          panel + r * TILE_COLS);
        if (other > r)
            decode_16_columns(vzip2q_u8(high, low), w->absmax[other * w->absmax_stride], &b, bf16,
                              panel + other * TILE_COLS);
    }
}

// n_x rows of x times the panel; n_x is a constant at each call.
INLINE void tile(const float *packed, const float *panel, int64_t steps, bool accumulate,
                 float *sums, const int n_x)
{
    float32x4_t sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sum[t][c] = vdupq_n_f32(0);
    for (int64_t s = 0; s < steps; s += HB_LINEAR4_X_BLOCK) {
        int64_t block = steps - s < HB_LINEAR4_X_BLOCK ? steps - s : HB_LINEAR4_X_BLOCK;
        const float *x = packed + s * TILE_ROWS;
        for (int64_t i = 0; i < block; i++) {
            float32x4_t weight[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) weight[c] = vld1q_f32(panel + c * LANES);
            panel += TILE_COLS;
#pragma GCC unroll 6
            for (int t = 0; t < n_x; t++) {
                float value = x[t * HB_LINEAR4_X_BLOCK];
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) sum[t][c] = vfmaq_n_f32(sum[t][c], weight[c], value);
            }
            x++;
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            float *target = sums + t * TILE_COLS + c * LANES;
            if (accumulate) sum[t][c] = vaddq_f32(vld1q_f32(target), sum[t][c]);
            vst1q_f32(target, sum[t][c]);
        }
}

// ---- entries -----------------------------------------------------------------------------------

HB_LINEAR4_ENTRIES(f32, neon, false)
HB_LINEAR4_ENTRIES(bf16, neon, true)
HB_LINEAR4_TILE(f32, neon)

INLINE void finish(const float *sums, const float *bias, int64_t n, hb_dtype io, void *y)
{
    for (int64_t i = 0; i < n; i += LANES) {
        float32x4_t value = load_upto_f32x4(sums, i, n, HB_F32);
        if (bias != NULL) value = vaddq_f32(value, load_upto_f32x4(bias, i, n, HB_F32));
        store_upto_f32x4(y, i, n, value, io);
    }
}

static void hb_linear4_finish_neon(const float *sums, const float *bias, int64_t n, hb_dtype dtype,
                                   void *y)
{
    switch (dtype) {
    case HB_F32: finish(sums, bias, n, HB_F32, y); break;
    case HB_BF16: finish(sums, bias, n, HB_BF16, y); break;
    default: finish(sums, bias, n, HB_F16, y); break;
    }
}

void hb_linear4_table_neon(hb_kernels_linear4 *kernels)
{
    kernels->f32 = HB_LINEAR4_SET(f32, neon);
    kernels->bf16 = HB_LINEAR4_SET(bf16, neon);
    for (int c = 0; c < TILE_COLS; c++)
        kernels->bf16.column_order[c] = kernels->f32.column_order[c] = (uint8_t)c;
    kernels->bf16.columns_in_order = kernels->f32.columns_in_order = true;
    kernels->finish = hb_linear4_finish_neon;
}
