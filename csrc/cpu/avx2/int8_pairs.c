// Sums of int8 products, two by one multiplication of int16: strips of 16 rows of W, 8 lanes each.
// Formula, layout, accuracy: cpu/int8_pairs.h.
//
// Registers: 8 sums, 4 for a quad of W, 4 for a row of x and its products. A row of x is one piece
// of assembly, as gcc 12 moves sums to the stack and back otherwise.
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

typedef __m256i vector;
enum {
    LANES = 8,
    VECTORS = 2,
    TILE_X = 4,
    FROM = 3, // below dot_int8 has W in registers
};

INLINE vector load(const void *p)
{
    return _mm256_loadu_si256(p);
}

INLINE void store(void *p, vector v)
{
    _mm256_storeu_si256(p, v);
}

INLINE vector add_i32(vector u, vector v)
{
    return _mm256_add_epi32(u, v);
}

INLINE vector broadcast_i32(const void *p)
{
    int32_t value;
    memcpy(&value, p, sizeof value);
    return _mm256_set1_epi32(value);
}

INLINE void add_quad(vector sum[VECTORS], const void *x_first, const void *x_second,
                     const vector first[VECTORS], const vector second[VECTORS])
{
#if defined(HB_SIMDE)
    const vector a0 = broadcast_i32(x_first), a1 = broadcast_i32(x_second);
    for (int v = 0; v < VECTORS; v++)
        sum[v] = add_i32(sum[v], _mm256_madd_epi16(_mm256_add_epi16(a0, second[v]),
                                                   _mm256_add_epi16(a1, first[v])));
#else
    vector a0, a1, p, q;
    __asm__("vpbroadcastd %[x0], %[a0]\n\t"
            "vpbroadcastd %[x1], %[a1]\n\t"
            "vpaddw %[a0], %[s0], %[p]\n\t"
            "vpaddw %[a1], %[f0], %[q]\n\t"
            "vpmaddwd %[p], %[q], %[p]\n\t"
            "vpaddw %[a0], %[s1], %[a0]\n\t"
            "vpaddw %[a1], %[f1], %[a1]\n\t"
            "vpaddd %[p], %[sum0], %[sum0]\n\t"
            "vpmaddwd %[a0], %[a1], %[a0]\n\t"
            "vpaddd %[a0], %[sum1], %[sum1]"
            : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [a0] "=&x"(a0), [a1] "=&x"(a1),
              [p] "=&x"(p), [q] "=&x"(q)
            : [x0] "m"(*(const int32_t *)x_first), [x1] "m"(*(const int32_t *)x_second),
              [f0] "x"(first[0]), [f1] "x"(first[1]), [s0] "x"(second[0]), [s1] "x"(second[1]));
#endif
}

#include "cpu/int8_pairs.h"

void hb_int8_pairs_table_avx2(hb_int8_pairs *pairs)
{
    *pairs = (hb_int8_pairs){
        .from = FROM, .rows = TILE_X, .widen_x = widen_x, .widen_w = widen_w, .multiply = multiply};
}
