// dx of a few rows, AVX2 + FMA: rows of W added to sums of its columns. Part of avx2/linear4.c,
// whose lookup and scales it uses.
#ifndef HB_CPU_AVX2_LINEAR4_ADD_H
#define HB_CPU_AVX2_LINEAR4_ADD_H

// The 64 columns from `column` (32 when `half`) of `rows` rows, times n_x rows of dy, onto sums in
// the order of permuted x. The upper lanes of a half have weights 0.
INLINE void add_chunk(const book *b, const uint8_t *const *packed, const float *const *absmax,
                      int64_t column, int shift, const bool half, const bool two_blocks,
                      const float *dy, const int rows, const int n_x, const bool bf16, float *sums,
                      int64_t sums_stride)
{
    float *target = sums + column;
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++, target += 4 * LANES) {
        __m256 sum[ADD_UNTIL][4];
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sum[t][v] = _mm256_load_ps(target + t * sums_stride + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const void *at = packed[r] + column / 2;
            __m256i bytes =
                half ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(at), 0)
                     : _mm256_loadu_si256(at);
            __m256 scale = two_blocks || half ? chunk_scale(absmax[r], column, shift, half)
                                              : _mm256_broadcast_ss(absmax[r] + (column >> shift));
            if (bf16) scale = sane_scale(scale);
            __m256 value[4];
            look_up_f32(b, nibbles(bytes, n), value);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                value[v] = _mm256_mul_ps(value[v], scale);
                if (bf16) value[v] = rounded_weight(value[v]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < n_x; t++) {
                __m256 factor = _mm256_broadcast_ss(dy + t * HB_LINEAR4_X_BLOCK + r);
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++)
                    sum[t][v] = _mm256_fmadd_ps(value[v], factor, sum[t][v]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_x; t++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                _mm256_store_ps(target + t * sums_stride + v * LANES, sum[t][v]);
    }
}

typedef book add_book;

INLINE add_book make_add_book(const float *codebook)
{
    return make_book(codebook, false);
}

#include "cpu/linear4_add_loops.h"

#endif
