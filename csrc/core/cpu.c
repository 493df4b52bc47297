// Detection by CPUID and XGETBV on x86, by the auxiliary vector on AArch64.
//
// An instruction set counts only when the operating system also saves its registers: XCR0 bits 1, 2
// (xmm, ymm) for AVX2; in addition 5, 6, 7 (opmask, low and high zmm) for AVX-512; 17 and 18 (tile
// configuration, tiles) for AMX, which Linux lets a process use only after it has asked.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // syscall
#endif
#include "core/cpu.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

enum {
    ALL_AVX512 = HB_CPU_AVX2 | HB_CPU_AVX512,
    ALL_VNNI = ALL_AVX512 | HB_CPU_AVX512VNNI,
    ALL_VBMI = ALL_VNNI | HB_CPU_AVX512VBMI,
    ALL_BF16 = ALL_VBMI | HB_CPU_AVX512BF16,
    ALL_AMX = ALL_BF16 | HB_CPU_AMX
};

// Ascending; `all` is the folder's bit and every lower bit of its ladder.
static const struct {
    const char *name;
    uint32_t bit, all;
} ladder[] = {
    {"ref", 0, 0},
    {"avx2", HB_CPU_AVX2, HB_CPU_AVX2},
    {"avxvnni", HB_CPU_AVXVNNI, HB_CPU_AVX2 | HB_CPU_AVXVNNI},
    {"avx512", HB_CPU_AVX512, ALL_AVX512},
    {"avx512vnni", HB_CPU_AVX512VNNI, ALL_VNNI},
    {"avx512vbmi", HB_CPU_AVX512VBMI, ALL_VBMI},
    {"avx512bf16", HB_CPU_AVX512BF16, ALL_BF16},
    {"amx", HB_CPU_AMX, ALL_AMX},
    {"neon", HB_CPU_NEON, HB_CPU_NEON},
};
enum { LADDER_SIZE = sizeof ladder / sizeof *ladder };

// True when `value` has all `bits`.
static int has(uint64_t value, uint64_t bits)
{
    return (value & bits) == bits;
}

// The only palette that is defined, and a unit for at least one of its tiles: kernels know no
// other.
static int has_tiles(const hb_cpu_x86 *cpu)
{
    enum { BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, TILE_STATE = 0x60000 };
    enum { MAX_ROWS = 16, ROW_BYTES = 64, TILES = 8, TILE_BYTES = 1024 };
    return has(cpu->leaf7_edx, BF16 | TILE | INT8) && has(cpu->xcr0, TILE_STATE) &&
           cpu->leaf1d_eax >> 16 >= TILE_BYTES && (cpu->leaf1d_ebx & 0xffffu) >= ROW_BYTES &&
           cpu->leaf1d_ebx >> 16 >= TILES && (cpu->leaf1d_ecx & 0xffffu) >= MAX_ROWS &&
           (cpu->leaf1e_ebx & 0xffu) >= MAX_ROWS && (cpu->leaf1e_ebx >> 8 & 0xffffu) >= ROW_BYTES;
}

uint32_t hb_cpu_flags_x86(const hb_cpu_x86 *cpu)
{
    enum { FMA = 1u << 12, AVX = 1u << 28, F16C = 1u << 29 };           // leaf 1, ecx
    enum { BMI1 = 1u << 3, AVX2 = 1u << 5, BMI2 = 1u << 8 };            // leaf 7, ebx
    enum { F = 1u << 16, DQ = 1u << 17, CD = 1u << 28, BW = 1u << 30 }; // leaf 7, ebx
    const uint32_t VL = 1u << 31;                                       // leaf 7, ebx
    enum { VBMI = 1u << 1, VBMI2 = 1u << 6, VNNI = 1u << 11 };          // leaf 7, ecx
    enum { AVXVNNI = 1u << 4, BF16 = 1u << 5 };                         // leaf 7.1, eax
    enum { YMM_STATE = 0x06, ZMM_STATE = 0xe6 };                        // XCR0

    if (!has(cpu->leaf1_ecx, AVX | FMA | F16C) || !has(cpu->xcr0, YMM_STATE)) return 0;
    if (!has(cpu->leaf7_ebx, AVX2 | BMI1 | BMI2)) return 0;
    const uint32_t base =
        has(cpu->leaf71_eax, AVXVNNI) ? HB_CPU_AVXVNNI | HB_CPU_AVX2 : HB_CPU_AVX2;
    if (!has(cpu->xcr0, ZMM_STATE) || !has(cpu->leaf7_ebx, F | DQ | CD | BW | VL)) return base;
    if (!has(cpu->leaf7_ecx, VNNI)) return base | ALL_AVX512;
    if (!has(cpu->leaf7_ecx, VBMI | VBMI2)) return base | ALL_VNNI;
    if (!has(cpu->leaf71_eax, BF16)) return base | ALL_VBMI;
    return base | (has_tiles(cpu) ? ALL_AMX : ALL_BF16);
}

#if defined(__x86_64__) || defined(__i386__)

static uint64_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

uint32_t hb_cpu_detect(void)
{
    enum { OSXSAVE = 1u << 27 };
    hb_cpu_x86 cpu = {0};
    uint32_t a, b, c, d, max_subleaf;
    if (!__get_cpuid(1, &a, &b, &cpu.leaf1_ecx, &d)) return 0;
    if (has(cpu.leaf1_ecx, OSXSAVE)) cpu.xcr0 = read_xcr0();
    if (__get_cpuid_count(7, 0, &max_subleaf, &cpu.leaf7_ebx, &cpu.leaf7_ecx, &cpu.leaf7_edx) &&
        max_subleaf >= 1)
        __get_cpuid_count(7, 1, &cpu.leaf71_eax, &b, &c, &d);
#if defined(__x86_64__) && !defined(HB_WITHOUT_AMX)
    __get_cpuid_count(0x1d, 1, &cpu.leaf1d_eax, &cpu.leaf1d_ebx, &cpu.leaf1d_ecx, &d);
    __get_cpuid_count(0x1e, 0, &a, &cpu.leaf1e_ebx, &c, &d);
#endif
    return hb_cpu_flags_x86(&cpu);
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

bool hb_cpu_request_tiles(void)
{
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    enum { GET_PERMISSION = 0x1022, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; // asm/prctl.h
    uint64_t granted = 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 &&
           syscall(SYS_arch_prctl, GET_PERMISSION, &granted) == 0 &&
           (granted >> TILE_DATA & 1) == 1;
#else
    return false;
#endif
}

uint32_t hb_cpu_flags(int *unknown)
{
    const uint32_t detected = hb_cpu_detect(), usual = detected & ~(uint32_t)HB_CPU_AMX;
    const char *wish = getenv("HALFBYTE_CPU");
    if (unknown != NULL) *unknown = 0;
    if (wish == NULL || wish[0] == '\0') return usual;
    for (int i = 0; i < LADDER_SIZE; i++) {
        if (strcmp(wish, ladder[i].name) != 0) continue;
        const uint32_t flags = detected & ladder[i].all;
        return flags & HB_CPU_AMX && !hb_cpu_request_tiles() ? usual : flags;
    }
    if (unknown != NULL) *unknown = 1;
    return usual;
}

const char *hb_cpu_name(uint32_t flags)
{
    for (int i = LADDER_SIZE - 1; i > 0; i--)
        if (flags & ladder[i].bit) return ladder[i].name;
    return ladder[0].name;
}
