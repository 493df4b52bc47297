// The one place where kernels get their intrinsics. The test build defines HB_SIMDE and gets
// SIMDe's portable versions of the same names, so that every ISA runs on every machine.
#ifndef HB_CPU_SIMD_H
#define HB_CPU_SIMD_H

#if defined(HB_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#if defined(HB_SIMDE_NEON)
#include <simde/arm/neon.h>
#else
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include "simde_missing.h" // tests/c/simde: the few intrinsics that SIMDe lacks
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#if defined(HB_EMULATE_TILES)
#include "simde_tiles.h" // tests/c/simde: tile registers, which few machines have
#endif

#endif
