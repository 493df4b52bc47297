// The ladder: reference first, then each better ISA overwrites. Folders that this architecture
// cannot compile are left out; tests/c sets HB_WITH_* itself where it emulates them, setup.py
// HB_WITHOUT_AMX, _AVXVNNI where the tools do not know the instructions.
#include "core/cpu.h"
#include "core/kernels.h"

#if !defined(HB_WITH_X86)
#if defined(__x86_64__) || defined(_M_X64)
#define HB_WITH_X86 1
#else
#define HB_WITH_X86 0
#endif
#endif
#if !defined(HB_WITH_NEON)
#if defined(__aarch64__)
#define HB_WITH_NEON 1
#else
#define HB_WITH_NEON 0
#endif
#endif

void hb_kernels_init(hb_kernels *kernels, uint32_t cpu_flags)
{
    hb_table_ref(kernels);
#if HB_WITH_NEON
    if (cpu_flags & HB_CPU_NEON) hb_table_neon(kernels);
#endif
#if HB_WITH_X86
    if (cpu_flags & HB_CPU_AVX2) hb_table_avx2(kernels);
#if !defined(HB_WITHOUT_AVXVNNI)
    if (cpu_flags & HB_CPU_AVXVNNI) hb_table_avxvnni(kernels);
#endif
    if (cpu_flags & HB_CPU_AVX512) hb_table_avx512(kernels);
    if (cpu_flags & HB_CPU_AVX512VNNI) hb_table_avx512vnni(kernels);
    if (cpu_flags & HB_CPU_AVX512VBMI) hb_table_avx512vbmi(kernels);
    if (cpu_flags & HB_CPU_AVX512BF16) hb_table_avx512bf16(kernels);
#if !defined(HB_WITHOUT_AMX)
    if (cpu_flags & HB_CPU_AMX) hb_table_amx(kernels);
#endif
#endif
    (void)cpu_flags;
}
