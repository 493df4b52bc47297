// Products with 4-bit weights in integers, AVX512-VNNI on 32-byte vectors: wider ones would gain
// nothing where memory is the limit, which is where these modes are reached on such processors.
#include "cpu/simd.h"

#define HB_DPBUSD(sum, u8, s8)   _mm256_dpbusd_epi32(sum, u8, s8)
#define HB_DPWSSD(sum, s16, t16) _mm256_dpwssd_epi32(sum, s16, t16)
#define HB_DPBUSD_NAME           "vpdpbusd" // in assembly
#include "cpu/avx2/linear4_int.h"

HB_INT4_ENTRIES(avx512vnni, 4, 8)
