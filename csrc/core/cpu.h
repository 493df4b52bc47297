// What this processor (and its operating system) can run.
#ifndef HB_CORE_CPU_H
#define HB_CORE_CPU_H

#include <stdbool.h>
#include <stdint.h>

// One bit per kernel folder under csrc/cpu; a folder's bit means everything that its flags need.
enum {
    HB_CPU_AVX2 = 1u << 0,       // AVX2, FMA, F16C, BMI2
    HB_CPU_AVX512 = 1u << 1,     // F, BW, DQ, VL, CD
    HB_CPU_AVX512VNNI = 1u << 2, // the above and VNNI
    HB_CPU_AVX512VBMI = 1u << 3, // F..VL and VBMI, VBMI2 (VNNI implied: Ice Lake, Zen 4)
    HB_CPU_AVX512BF16 = 1u << 4, // the above and BF16
    HB_CPU_AMX = 1u << 5,        // the above and AMX-TILE, AMX-BF16, AMX-INT8
    HB_CPU_NEON = 1u << 6,       // AArch64 Advanced SIMD
    HB_CPU_AVXVNNI = 1u << 7     // AVX2 and AVX-VNNI; AVX-512 overwrites what it brings
};

// What CPUID and XGETBV say on x86; registers of leaves that there are not, and XCR0 without
// OSXSAVE: 0.
typedef struct {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf71_eax;
    uint32_t leaf1d_eax, leaf1d_ebx, leaf1d_ecx; // subleaf 1: the shape of tiles
    uint32_t leaf1e_ebx;                         // what their multiplier takes
    uint64_t xcr0;
} hb_cpu_x86;

// The flags of such a processor, each implying the lower ones it needs.
uint32_t hb_cpu_flags_x86(const hb_cpu_x86 *cpu);
// The flags of this machine.
uint32_t hb_cpu_detect(void);
// Asks the system to let this process use tile registers (for good; threads and forks, too). False
// when it does not: not Linux, older than 5.16, forbidden by a filter, or a thread's alternate
// signal stack is too small for frames with tiles in them. After true such stacks are refused.
bool hb_cpu_request_tiles(void);
// Detected flags limited by the environment variable HALFBYTE_CPU ("ref", "avx2", "avxvnni",
// "avx512", "avx512vnni", "avx512vbmi", "avx512bf16", "amx", "neon"); *unknown gets true for a name
// not in the list. HB_CPU_AMX only when it is named (no machine that has it has run these kernels
// yet) and the system grants it.
uint32_t hb_cpu_flags(int *unknown);
// "avx2" for HB_CPU_AVX2, ...; the name of the highest flag set; "ref" for 0.
const char *hb_cpu_name(uint32_t flags);

#endif
