// The loops behind the rulers of bench_machine.c and ruler.c: reading memory, multiplying in
// registers. Each at the widest vectors that `flags` (HB_CPU_*) allow.
#ifndef HB_BENCHMARKS_MACHINE_LOOPS_H
#define HB_BENCHMARKS_MACHINE_LOOPS_H

#include "core/cpu.h"

#include <stddef.h>
#include <stdint.h>

typedef uint64_t (*read_fn)(const void *data, int64_t bytes);
typedef float (*fma_fn)(int64_t rounds);

#define WORDS(n, type)                                                                             \
    typedef type type##_##n __attribute__((vector_size(n), aligned(n), may_alias))
WORDS(64, uint64_t);
WORDS(32, uint64_t);
WORDS(16, uint64_t);

// `bytes` is a multiple of STREAMS * 64.
#define READ(name, attribute, vector)                                                              \
    attribute static uint64_t name(const void *data, int64_t bytes)                                \
    {                                                                                              \
        enum { STREAMS = 8, PER_LINE = 64 / sizeof(vector), AHEAD = 1024 };                        \
        const int64_t stream_bytes = bytes / STREAMS;                                              \
        vector sum[STREAMS] = {{0}};                                                               \
        for (int64_t at = 0; at < stream_bytes; at += 64) {                                        \
            _Pragma("GCC unroll 8") for (int s = 0; s < STREAMS; s++)                              \
            {                                                                                      \
                const char *line = (const char *)data + s * stream_bytes + at;                     \
                __builtin_prefetch(line + AHEAD);                                                  \
                for (int i = 0; i < (int)PER_LINE; i++) sum[s] += ((const vector *)line)[i];       \
            }                                                                                      \
        }                                                                                          \
        uint64_t total = 0;                                                                        \
        for (int s = 0; s < STREAMS; s++)                                                          \
            for (size_t i = 0; i < sizeof(vector) / 8; i++) total += sum[s][i];                    \
        return total;                                                                              \
    }

#define CHAINS 12 // more than latency times throughput of any processor so far
#define FMA(name, attribute, vector, set1, fmadd)                                                  \
    attribute static float name(int64_t rounds)                                                    \
    {                                                                                              \
        const vector factor = set1(0.999f), term = set1(0.001f);                                   \
        vector sum[CHAINS];                                                                        \
        for (int i = 0; i < CHAINS; i++) sum[i] = set1((float)i);                                  \
        for (int64_t round = 0; round < rounds; round++) {                                         \
            _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) sum[i] =                     \
                fmadd(sum[i], factor, term);                                                       \
        }                                                                                          \
        for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];                                         \
        return sum[0][0];                                                                          \
    }

READ(read_16, , uint64_t_16)
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2   __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define VNNI   __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define BF16   __attribute__((target("avx512f,avx512bw,avx512bf16")))
READ(read_32, AVX2, uint64_t_32)
READ(read_64, AVX512, uint64_t_64)
FMA(fma_8, AVX2, __m256, _mm256_set1_ps, _mm256_fmadd_ps)
FMA(fma_16, AVX512, __m512, _mm512_set1_ps, _mm512_fmadd_ps)

VNNI static inline float dot_64(int64_t rounds)
{
    __m512i sum[CHAINS], x = _mm512_set1_epi8(3);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_set1_epi32(i);
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) __asm__("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(x));
#pragma GCC unroll 12
    for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    return (float)_mm512_reduce_add_epi32(sum[0]);
}

BF16 static inline float dot_bf16(int64_t rounds)
{
    __m512 sum[CHAINS];
    const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f00); // 0.5
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
#pragma GCC unroll 12
    for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_reduce_add_ps(sum[0]);
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define NEON_FMA(sum, factor, term) vfmaq_f32(term, sum, factor)
FMA(fma_4, , float32x4_t, vdupq_n_f32, NEON_FMA)
#endif

static read_fn widest_read(uint32_t flags)
{
    read_fn read = read_16;
#if defined(__x86_64__)
    if (flags & HB_CPU_AVX2) read = read_32;
    if (flags & HB_CPU_AVX512) read = read_64;
#endif
    (void)flags;
    return read;
}

// The function and its floating-point operations per round.
static fma_fn widest_fma(uint32_t flags, int64_t *operations)
{
    fma_fn fma = NULL;
#if defined(__x86_64__)
    if (flags & HB_CPU_AVX2) fma = fma_8, *operations = 2 * 8 * CHAINS;
    if (flags & HB_CPU_AVX512) fma = fma_16, *operations = 2 * 16 * CHAINS;
#elif defined(__aarch64__)
    fma = fma_4, *operations = 2 * 4 * CHAINS;
#endif
    (void)flags;
    return fma;
}

// The same for dot products of bfloat16 and of int8, NULL where the processor has none.
static fma_fn bf16_dots(uint32_t flags, int64_t *operations)
{
#if defined(__x86_64__)
    if (flags & HB_CPU_AVX512BF16) return *operations = 2 * 32 * CHAINS, dot_bf16;
#endif
    (void)flags;
    (void)operations;
    return NULL;
}

static fma_fn int8_dots(uint32_t flags, int64_t *operations)
{
#if defined(__x86_64__)
    if (flags & HB_CPU_AVX512VNNI) return *operations = 2 * 64 * CHAINS, dot_64;
#endif
    (void)flags;
    (void)operations;
    return NULL;
}

#endif
