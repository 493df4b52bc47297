// What this processor (and its operating system) can run.
#ifndef HB_CORE_CPU_H
#define HB_CORE_CPU_H

#include <stdint.h>

// One bit per kernel folder under csrc/cpu; a folder's bit means everything that its flags need.
enum {
    HB_CPU_AVX2 = 1u << 0,       // AVX2, FMA, F16C, BMI2
    HB_CPU_AVX512 = 1u << 1,     // F, BW, DQ, VL, CD
    HB_CPU_AVX512VNNI = 1u << 2, // the above and VNNI
    HB_CPU_AVX512VBMI = 1u << 3, // F..VL and VBMI, VBMI2 (VNNI implied: Ice Lake, Zen 4)
    HB_CPU_AVX512BF16 = 1u << 4, // the above and BF16
    HB_CPU_NEON = 1u << 5        // AArch64 Advanced SIMD
};

// The flags of this machine, each implying the lower ones it needs.
uint32_t hb_cpu_detect(void);
// Detected flags limited by the environment variable HALFBYTE_CPU ("ref", "avx2", "avx512",
// "avx512vnni", "avx512vbmi", "avx512bf16", "neon"); *unknown gets true for a name not in the list.
uint32_t hb_cpu_flags(int *unknown);
// "avx2" for HB_CPU_AVX2, ...; the name of the highest flag set; "ref" for 0.
const char *hb_cpu_name(uint32_t flags);

#endif
