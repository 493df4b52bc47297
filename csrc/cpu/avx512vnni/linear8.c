// Sums of int8 products by vpdpbusd: four products of an unsigned and a signed byte per int32 lane.
//
//   dot_int8   sum_k w x = sum_k (w + 128) x - 128 sum_k x
//
// w + 128 is w with its top bit flipped; 128 sum x is found once per row of x and kept behind it.
// Nothing saturates, int32 wraps around both ways: exact for every code. Layout of prepared x: the
// codes, zeros up to a multiple of 64, then 128 sum x as int32 in the last 64 bytes.
//
// The accumulation is inline assembly: gcc 12 copies the accumulators of the intrinsic to the stack
// and back (3x slower). Test builds through SIMDe use the intrinsic.
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

enum { TILE_X = 4, TILE_W = 6, PREFETCH = 4096 };

INLINE __m512i add_products(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes)
{
#if defined(HB_SIMDE)
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sum;
#endif
}

static __mmask64 first64(int64_t n)
{
    return n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1u;
}

static int64_t padded(int64_t depth)
{
    return (depth + 63) / 64 * 64;
}

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    int8_t *out = prepared;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 64) {
        const __m512i x = _mm512_maskz_loadu_epi8(first64(depth - k), codes + k);
        _mm512_storeu_si512(out + k, x);
        sum = add_products(sum, _mm512_set1_epi8(-128), x); // 128 as an unsigned byte
    }
    const int32_t total = _mm512_reduce_add_epi32(sum);
    memcpy(out + padded(depth), &total, sizeof total);
}

// n_x rows of x by n_w rows of w, constants at every call.
INLINE void int8_tile(const int8_t *w, int64_t w_stride, int64_t depth, const int8_t *x,
                      int64_t x_stride, int32_t *c, int64_t c_stride, const int n_x, const int n_w)
{
    const __m512i flip = _mm512_set1_epi8(-128);
    __m512i sum[TILE_X][TILE_W];
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++)
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) sum[t][r] = _mm512_setzero_si512();
    for (int64_t k = 0; k + 64 <= depth; k += 64) {
        __m512i biased[TILE_W];
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) {
            const int8_t *p = w + r * w_stride + k;
            _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
            biased[r] = _mm512_xor_si512(_mm512_loadu_si512(p), flip);
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++) {
            const __m512i xs = _mm512_loadu_si512(x + t * x_stride + k);
#pragma GCC unroll 6
            for (int r = 0; r < n_w; r++) sum[t][r] = add_products(sum[t][r], biased[r], xs);
        }
    }
    if (depth % 64 != 0) { // behind the end x is zero: what w is there does not matter
        const int64_t k = depth / 64 * 64;
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++) {
            const __m512i tail = _mm512_maskz_loadu_epi8(first64(depth - k), w + r * w_stride + k);
            const __m512i biased = _mm512_xor_si512(tail, flip);
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++)
                sum[t][r] =
                    add_products(sum[t][r], biased, _mm512_loadu_si512(x + t * x_stride + k));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_x; t++) {
        uint32_t correction;
        memcpy(&correction, x + t * x_stride + padded(depth), sizeof correction);
#pragma GCC unroll 6
        for (int r = 0; r < n_w; r++)
            c[t * c_stride + r] =
                (int32_t)((uint32_t)_mm512_reduce_add_epi32(sum[t][r]) - correction);
    }
}

INLINE void int8_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                      const int8_t *x, int64_t x_stride, int32_t *c, int64_t c_stride,
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
    const int64_t stride = hb_int8_prepared_bytes(depth, 1);
    switch (n_x) {
    case 1: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 1); break;
    case 2: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 2); break;
    case 3: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 3); break;
    default: int8_rows(w, w_stride, n_rows, depth, prepared, stride, c, c_stride, 4); break;
    }
}

void hb_linear8_table_avx512vnni(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = TILE_X;
    kernels->prepared_bytes = 1;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    kernels->pairs.from = 0; // of AVX2: multiplications of bytes are faster for any rows
}
