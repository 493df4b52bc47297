// The operations of simde/intrinsics.def with the processor's own instructions, whatever the flags
// of the build.
#include "simde_ops.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(HB_SIMDE)
#include <immintrin.h>
#include <string.h>

#define ALL                                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,"      \
                          "avx512vbmi2,avx512vnni,avx512bf16")))
#define BH512_SI(x) ((__m512i)(x))
#define BH256_SI(x) ((__m256i)(x))
#define BH128_SI(x) ((__m128i)(x))
#define SI_BH512(x) ((__m512bh)(x))
#define SI_BH256(x) ((__m256bh)(x))

#define OP(name, expression)                                                                       \
    ALL static void native_##name(const uint8_t in[3][64], uint64_t m, uint8_t p[64],              \
                                  uint8_t out[64])                                                 \
    {                                                                                              \
        __m512i a = _mm512_loadu_si512(in[0]), b = _mm512_loadu_si512(in[1]);                      \
        __m512i d = _mm512_loadu_si512(in[2]);                                                     \
        (void)a, (void)b, (void)d, (void)m, (void)p;                                               \
        _mm512_storeu_si512(out, expression);                                                      \
    }
#include "simde/intrinsics.def"
#undef OP

static const simde_entry entries[] = {
#define OP(name, expression) {#name, native_##name},
#include "simde/intrinsics.def"
#undef OP
    {NULL, NULL}};
const simde_entry *const simde_native_ops = entries;
#else
const simde_entry *const simde_native_ops = NULL;
#endif
