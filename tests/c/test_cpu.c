// Detection, the override, and that each flag implies what its folder's compiler flags need.
#include "check.h"

#include <stdio.h>
#include <stdlib.h>

// Registers of processors as their manuals describe them; on all, the system saves what it can.
static const hb_cpu_x86 haswell = {.leaf1_ecx = 0x7ffafbff, .leaf7_ebx = 0x000027ab, .xcr0 = 0x7};
static const hb_cpu_x86 skylake_server = {
    .leaf1_ecx = 0x7ffefbff, .leaf7_ebx = 0xd39ffffb, .leaf7_ecx = 0x8, .xcr0 = 0x2ff};
static const hb_cpu_x86 cascade_lake = {
    .leaf1_ecx = 0x7ffefbff, .leaf7_ebx = 0xd39ffffb, .leaf7_ecx = 0x808, .xcr0 = 0x2ff};
static const hb_cpu_x86 ice_lake = {
    .leaf1_ecx = 0x7ffefbff, .leaf7_ebx = 0xf3bfa7eb, .leaf7_ecx = 0x40417f5e, .xcr0 = 0x2ff};
static const hb_cpu_x86 sapphire_rapids = {.leaf1_ecx = 0x7ffefbff,
                                           .leaf7_ebx = 0xf3bfbffb,
                                           .leaf7_ecx = 0xfb417ffe,
                                           .leaf7_edx = 0xffdd4432,
                                           .leaf71_eax = 0x1c30,
                                           .leaf1d_eax = 0x04002000,
                                           .leaf1d_ebx = 0x00080040,
                                           .leaf1d_ecx = 0x10,
                                           .leaf1e_ebx = 0x4010,
                                           .xcr0 = 0x602e7};

// One bit after the other is taken from a processor with everything: which flags are left.
static void check_without(check *c, const char *what, size_t offset, uint64_t mask, uint32_t left)
{
    const bool is_xcr0 = offset == offsetof(hb_cpu_x86, xcr0);
    for (int bit = 0; bit < 64; bit++) {
        if (!(mask >> bit & 1)) continue;
        hb_cpu_x86 cpu = sapphire_rapids;
        if (is_xcr0)
            cpu.xcr0 &= ~(UINT64_C(1) << bit);
        else
            *(uint32_t *)((char *)&cpu + offset) &= ~(UINT32_C(1) << bit);
        const bool has_vnni = cpu.leaf71_eax & 1u << 4;
        // It has AVX-VNNI as well, which stands beside the ladder and needs AVX2.
        if (left != 0 && has_vnni) left |= HB_CPU_AVXVNNI;
        CHECK(c, hb_cpu_flags_x86(&cpu) == left, "%s without bit %d: 0x%x, expected 0x%x", what,
              bit, hb_cpu_flags_x86(&cpu), left);
    }
}

CHECK_GROUP_ONCE(cpu_x86)
{
    const uint32_t vnni = HB_CPU_AVX2 | HB_CPU_AVX512 | HB_CPU_AVX512VNNI;
    const uint32_t vbmi = vnni | HB_CPU_AVX512VBMI, bf16 = vbmi | HB_CPU_AVX512BF16;
    const uint32_t avx512 = HB_CPU_AVX2 | HB_CPU_AVX512;
    CHECK(c, hb_cpu_flags_x86(&(hb_cpu_x86){0}) == 0, "nothing");
    CHECK(c, hb_cpu_flags_x86(&haswell) == HB_CPU_AVX2, "Haswell");
    CHECK(c, hb_cpu_flags_x86(&skylake_server) == avx512, "Skylake");
    CHECK(c, hb_cpu_flags_x86(&cascade_lake) == vnni, "Cascade Lake");
    CHECK(c, hb_cpu_flags_x86(&ice_lake) == vbmi, "Ice Lake");
    CHECK(c, hb_cpu_flags_x86(&sapphire_rapids) == (bf16 | HB_CPU_AMX | HB_CPU_AVXVNNI),
          "Sapphire Rapids");
    hb_cpu_x86 alder_lake = haswell; // AVX-512 is fused off
    alder_lake.leaf71_eax = 0x10;
    CHECK(c, hb_cpu_flags_x86(&alder_lake) == (HB_CPU_AVX2 | HB_CPU_AVXVNNI), "Alder Lake");
    alder_lake.xcr0 = 0x3;
    CHECK(c, hb_cpu_flags_x86(&alder_lake) == 0, "Alder Lake without the state of ymm");
    hb_cpu_x86 cpu = skylake_server; // BF16 and VNNI, but no VBMI
    cpu.leaf7_ecx = 0x808, cpu.leaf71_eax = 1u << 5;
    CHECK(c, hb_cpu_flags_x86(&cpu) == vnni, "Cooper Lake");

#define WITHOUT(member, mask, left)                                                                \
    check_without(c, #member, offsetof(hb_cpu_x86, member), mask, left)
    WITHOUT(leaf1_ecx, 1u << 12 | 1u << 28 | 1u << 29, 0); // FMA, AVX, F16C
    WITHOUT(leaf7_ebx, 1u << 3 | 1u << 5 | 1u << 8, 0);    // BMI1, AVX2, BMI2
    WITHOUT(leaf7_ebx, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31, HB_CPU_AVX2);
    WITHOUT(leaf7_ecx, 1u << 11, avx512);                     // VNNI
    WITHOUT(leaf7_ecx, 1u << 1 | 1u << 6, vnni);              // VBMI, VBMI2
    WITHOUT(leaf71_eax, 1u << 5, vbmi);                       // BF16
    WITHOUT(leaf71_eax, 1u << 4, bf16 | HB_CPU_AMX);          // AVX-VNNI
    WITHOUT(leaf7_edx, 1u << 22 | 1u << 24 | 1u << 25, bf16); // AMX
    WITHOUT(xcr0, 0x6, 0);
    WITHOUT(xcr0, 0xe0, HB_CPU_AVX2);
    WITHOUT(xcr0, 0x60000, bf16);
    WITHOUT(leaf1d_eax, 0x04000000, bf16); // tiles smaller than kernels think
    WITHOUT(leaf1d_ebx, 0x00080040, bf16);
    WITHOUT(leaf1d_ecx, 0x10, bf16);
    WITHOUT(leaf1e_ebx, 0x4010, bf16);
#undef WITHOUT
    cpu = sapphire_rapids; // a system that saves nothing but what every program has
    cpu.xcr0 = 0;
    CHECK(c, hb_cpu_flags_x86(&cpu) == 0, "no XSAVE");
}

CHECK_GROUP_ONCE(cpu)
{
    static const struct {
        const char *name;
        uint32_t all;
    } ladder[] = {{"ref", 0},        {"avx2", 1},        {"avx512", 3},
                  {"avx512vnni", 7}, {"avx512vbmi", 15}, {"avx512bf16", 31},
                  {"amx", 63},       {"neon", 64},       {"avxvnni", HB_CPU_AVX2 | HB_CPU_AVXVNNI}};
    enum { STEPS = sizeof ladder / sizeof *ladder };
    const uint32_t detected = hb_cpu_detect(), usual = detected & ~(uint32_t)HB_CPU_AMX;
    // Tiles only by their name, and only when the system grants them.
    const uint32_t most = hb_cpu_request_tiles() ? detected : usual;
    CHECK(c, hb_cpu_request_tiles() == hb_cpu_request_tiles(), "the answer changes");
    bool known = false;
    for (int i = 0; i < STEPS; i++)
        known = known || (detected & ~(uint32_t)HB_CPU_AVXVNNI) == ladder[i].all;
    CHECK(c, known, "detected 0x%x is no step of the ladder", detected);
    for (int i = 0; i < STEPS; i++) {
        int unknown = -1;
        setenv("HALFBYTE_CPU", ladder[i].name, 1);
        CHECK(c, hb_cpu_flags(&unknown) == (most & ladder[i].all) && unknown == 0, "%s",
              ladder[i].name);
        CHECK(c, strcmp(hb_cpu_name(ladder[i].all), ladder[i].name) == 0, "name of 0x%x",
              ladder[i].all);
    }
    int unknown = 0;
    setenv("HALFBYTE_CPU", "pentium", 1);
    CHECK(c, hb_cpu_flags(&unknown) == usual && unknown == 1, "unknown name");
    CHECK(c, hb_cpu_flags(NULL) == usual, "unknown may be NULL");
    setenv("HALFBYTE_CPU", "", 1);
    CHECK(c, hb_cpu_flags(&unknown) == usual && unknown == 0, "empty");
    unsetenv("HALFBYTE_CPU");

#if defined(__linux__) && defined(__x86_64__)
    // The kernel's own opinion (it hides what it does not save).
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (file == NULL) return;
    static char line[8192];
    while (fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, "flags", 5) == 0) break;
    fclose(file);
    CHECK(c, (strstr(line, " avx2 ") != NULL) == ((detected & HB_CPU_AVX2) != 0), "avx2");
    CHECK(c, (strstr(line, " avx512vl ") != NULL) == ((detected & HB_CPU_AVX512) != 0), "avx512");
    CHECK(c, strstr(line, " amx_tile ") != NULL || !(detected & HB_CPU_AMX), "amx");
#endif
}
