// Detection by CPUID and XGETBV on x86, by the auxiliary vector on AArch64.
//
// An instruction set counts only when the operating system also saves its registers: XCR0 bits 1, 2
// (xmm, ymm) for AVX2; in addition 5, 6, 7 (opmask, low and high zmm) for AVX-512.
#include "core/cpu.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

enum {
    ALL_AVX512 = HB_CPU_AVX2 | HB_CPU_AVX512,
    ALL_VNNI = ALL_AVX512 | HB_CPU_AVX512VNNI,
    ALL_VBMI = ALL_VNNI | HB_CPU_AVX512VBMI,
    ALL_BF16 = ALL_VBMI | HB_CPU_AVX512BF16
};

// Ascending; `all` is the folder's bit and every lower bit of its ladder.
static const struct {
    const char *name;
    uint32_t bit, all;
} ladder[] = {
    {"ref", 0, 0},
    {"avx2", HB_CPU_AVX2, HB_CPU_AVX2},
    {"avx512", HB_CPU_AVX512, ALL_AVX512},
    {"avx512vnni", HB_CPU_AVX512VNNI, ALL_VNNI},
    {"avx512vbmi", HB_CPU_AVX512VBMI, ALL_VBMI},
    {"avx512bf16", HB_CPU_AVX512BF16, ALL_BF16},
    {"neon", HB_CPU_NEON, HB_CPU_NEON},
};
enum { LADDER_SIZE = sizeof ladder / sizeof *ladder };

#if defined(__x86_64__) || defined(__i386__)

static uint64_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

// True when `value` has all `bits`.
static int has(uint64_t value, uint64_t bits)
{
    return (value & bits) == bits;
}

uint32_t hb_cpu_detect(void)
{
    enum { FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28, F16C = 1u << 29 }; // leaf 1, ecx
    enum { BMI1 = 1u << 3, AVX2 = 1u << 5, BMI2 = 1u << 8 };                      // leaf 7, ebx
    enum { F = 1u << 16, DQ = 1u << 17, CD = 1u << 28, BW = 1u << 30 };           // leaf 7, ebx
    const uint32_t VL = 1u << 31;                                                 // leaf 7, ebx
    enum { VBMI = 1u << 1, VBMI2 = 1u << 6, VNNI = 1u << 11 };                    // leaf 7, ecx
    enum { BF16 = 1u << 5 };                                                      // leaf 7.1, eax
    enum { YMM_STATE = 0x06, ZMM_STATE = 0xe6 };                                  // XCR0

    uint32_t eax, ebx, ecx, edx, max_subleaf;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    if (!has(ecx, OSXSAVE | AVX | FMA | F16C)) return 0;
    const uint64_t xcr0 = read_xcr0();
    if (!has(xcr0, YMM_STATE)) return 0;
    if (!__get_cpuid_count(7, 0, &max_subleaf, &ebx, &ecx, &edx)) return 0;
    if (!has(ebx, AVX2 | BMI1 | BMI2)) return 0;
    uint32_t flags = HB_CPU_AVX2;

    if (!has(xcr0, ZMM_STATE) || !has(ebx, F | DQ | CD | BW | VL)) return flags;
    flags = ALL_AVX512;
    if (!has(ecx, VNNI)) return flags;
    flags = ALL_VNNI;
    if (!has(ecx, VBMI | VBMI2)) return flags;
    flags = ALL_VBMI;
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has(eax, BF16))
        flags = ALL_BF16;
    return flags;
}

#elif defined(__aarch64__)

uint32_t hb_cpu_detect(void)
{
#if defined(__linux__)
    const unsigned long asimd = 1ul << 1; // HWCAP_ASIMD
    return (getauxval(AT_HWCAP) & asimd) ? HB_CPU_NEON : 0;
#else
    return HB_CPU_NEON; // every other AArch64 system requires it
#endif
}

#else

uint32_t hb_cpu_detect(void)
{
    return 0;
}

#endif

uint32_t hb_cpu_flags(int *unknown)
{
    const uint32_t detected = hb_cpu_detect();
    const char *wish = getenv("HALFBYTE_CPU");
    if (unknown != NULL) *unknown = 0;
    if (wish == NULL || wish[0] == '\0') return detected;
    for (int i = 0; i < LADDER_SIZE; i++)
        if (strcmp(wish, ladder[i].name) == 0) return detected & ladder[i].all;
    if (unknown != NULL) *unknown = 1;
    return detected;
}

const char *hb_cpu_name(uint32_t flags)
{
    for (int i = LADDER_SIZE - 1; i > 0; i--)
        if (flags & ladder[i].bit) return ladder[i].name;
    return ladder[0].name;
}
