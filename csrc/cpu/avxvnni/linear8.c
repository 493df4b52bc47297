// Sums of int8 products by vpdpbusd on 32-byte vectors.
//
//   dot_int8   sum_k w x = sum_k (w + 128) x - 128 sum_k x
//
// As in avx512vnni/linear8.c: w + 128 is w with its top bit flipped; 128 sum x is found once per
// row of x and kept behind it. Nothing saturates, int32 wraps around both ways: exact for every
// code. Layout of prepared x: the codes, zeros up to a multiple of 64, then 128 sum x as int32 in
// the last 64 bytes. Ends of rows of W go through a small buffer.
#include "core/kernels_linear8.h"
#include "cpu/codes8_x86.h"
#include "cpu/avxvnni/vnni.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_X = 2, TILE_W = 4, PREFETCH = 2048 };

static int64_t padded(int64_t depth)
{
    return (depth + 63) / 64 * 64;
}

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    int8_t *out = prepared;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < padded(depth); k += 32) {
        const __m256i x = k < depth ? load_32_codes(codes + k, depth - k) : _mm256_setzero_si256();
        _mm256_storeu_si256((void *)(out + k), x);
        sum = HB_DPBUSD(sum, _mm256_set1_epi8(-128), x); // 128 as an unsigned byte
    }
    const int32_t total = sum_of_lanes(sum);
    memcpy(out + padded(depth), &total, sizeof total);
}

// n_x rows of x by n_w rows of w, constants at every call.
INLINE void int8_tile(const int8_t *w, int64_t w_stride, int64_t depth, const int8_t *x,
                      int64_t x_stride, int32_t *c, int64_t c_stride, const int n_x, const int n_w)
{
    const __m256i flip = _mm256_set1_epi8(-128);
    __m256i sum[TILE_X][TILE_W];
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) sum[t][r] = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += 32) {
        __m256i biased[TILE_W];
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++) {
            const int8_t *p = w + r * w_stride + k;
            if (k % 64 == 0) _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
            biased[r] = _mm256_xor_si256(load_32_codes(p, depth - k), flip);
        }
#pragma GCC unroll 2
        for (int t = 0; t < n_x; t++) {
            const __m256i xs = _mm256_loadu_si256((const void *)(x + t * x_stride + k));
#pragma GCC unroll 4
            for (int r = 0; r < n_w; r++) sum[t][r] = HB_DPBUSD(sum[t][r], biased[r], xs);
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < n_x; t++) {
        uint32_t correction;
        memcpy(&correction, x + t * x_stride + padded(depth), sizeof correction);
#pragma GCC unroll 4
        for (int r = 0; r < n_w; r++)
            c[t * c_stride + r] = (int32_t)((uint32_t)sum_of_lanes(sum[t][r]) - correction);
    }
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

void hb_linear8_table_avxvnni(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = TILE_X;
    kernels->prepared_bytes = 1;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    kernels->pairs.from = 0; // of AVX2: multiplications of bytes are faster for any rows
}
