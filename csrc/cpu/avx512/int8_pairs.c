// Sums of int8 products, two by one multiplication of int16: strips of 32 rows of W, 16 lanes each.
// Formula, layout, accuracy: cpu/int8_pairs.h.
//
// Registers: 16 sums, 4 for a quad of W, 4 for a row of x and its products. A row of x is one piece
// of assembly, as gcc 12 moves sums to the stack and back otherwise.
#include "core/kernels_linear8.h"
#include "cpu/simd.h"

#define INLINE static inline __attribute__((always_inline))

typedef __m512i vector;
enum {
    LANES = 16,
    VECTORS = 2,
    TILE_X = 8,
    FROM = 40, // below dot_int8, which does not widen W to memory, is faster
};

INLINE vector load(const void *p)
{
    return _mm512_loadu_si512(p);
}

INLINE void store(void *p, vector v)
{
    _mm512_storeu_si512(p, v);
}

INLINE vector add_i32(vector u, vector v)
{
    return _mm512_add_epi32(u, v);
}

INLINE vector broadcast_i32(const void *p)
{
    int32_t value;
    memcpy(&value, p, sizeof value);
    return _mm512_set1_epi32(value);
}

INLINE void add_quad(vector sum[VECTORS], const void *x_first, const void *x_second,
                     const vector first[VECTORS], const vector second[VECTORS])
{
#if defined(HB_SIMDE)
    const vector a0 = broadcast_i32(x_first), a1 = broadcast_i32(x_second);
    for (int v = 0; v < VECTORS; v++)
        sum[v] = add_i32(sum[v], _mm512_madd_epi16(_mm512_add_epi16(a0, second[v]),
                                                   _mm512_add_epi16(a1, first[v])));
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
            : [sum0] "+v"(sum[0]), [sum1] "+v"(sum[1]), [a0] "=&v"(a0), [a1] "=&v"(a1),
              [p] "=&v"(p), [q] "=&v"(q)
            : [x0] "m"(*(const int32_t *)x_first), [x1] "m"(*(const int32_t *)x_second),
              [f0] "v"(first[0]), [f1] "v"(first[1]), [s0] "v"(second[0]), [s1] "v"(second[1]));
#endif
}

#include "cpu/int8_pairs.h"

void hb_int8_pairs_table_avx512(hb_int8_pairs *pairs)
{
    *pairs = (hb_int8_pairs){
        .from = FROM, .rows = TILE_X, .widen_x = widen_x, .widen_w = widen_w, .multiply = multiply};
}
