// VNNI on 32-byte vectors in the VEX encoding, for processors without AVX-512. Test builds take the
// EVEX form, which computes the same: where only that runs natively (HB_EVEX_VNNI), and in SIMDe.
#ifndef HB_CPU_AVXVNNI_VNNI_H
#define HB_CPU_AVXVNNI_VNNI_H

#include "cpu/simd.h"

#if defined(HB_SIMDE) || defined(HB_EVEX_VNNI)
#define HB_DPBUSD(sum, u8, s8)   _mm256_dpbusd_epi32(sum, u8, s8)
#define HB_DPWSSD(sum, s16, t16) _mm256_dpwssd_epi32(sum, s16, t16)
#define HB_DPBUSD_NAME           "vpdpbusd" // in assembly
#else
#define HB_DPBUSD(sum, u8, s8)   _mm256_dpbusd_avx_epi32(sum, u8, s8)
#define HB_DPWSSD(sum, s16, t16) _mm256_dpwssd_avx_epi32(sum, s16, t16)
#define HB_DPBUSD_NAME           "%{vex%} vpdpbusd"
#endif

#endif
