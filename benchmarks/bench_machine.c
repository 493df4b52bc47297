// What the machine can do: the rulers that the other benchmarks are read against.
//
// - read: sum of all 64-byte words of a buffer far larger than the caches, or of 256 KiB ("L2").
//   Eight streams with software prefetch: of the ways to read that were tried, the fastest on
//   pages of 4 KiB, which is what weights lie in. A ruler must not lose to what it measures.
// - copy: memcpy between two such buffers, bytes read plus bytes written.
// - fma: independent chains of float32 fused multiply-adds in registers, at the widest vectors.
// - dot: the same with int8 dot products (vpdpbusd), where the processor has them.
#include "check.h"

#include <stdlib.h>

enum {
    MIB = 1 << 20,
    DRAM_BYTES = 256 * MIB,
    TURN_BYTES = 16 * MIB,
    PIECE = MIB / 4,
    L2_BYTES = 256 << 10
};

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
READ(read_32, AVX2, uint64_t_32)
READ(read_64, AVX512, uint64_t_64)
FMA(fma_8, AVX2, __m256, _mm256_set1_ps, _mm256_fmadd_ps)
FMA(fma_16, AVX512, __m512, _mm512_set1_ps, _mm512_fmadd_ps)

VNNI static float dot_64(int64_t rounds)
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

typedef struct {
    read_fn read;
    fma_fn fma;
    const uint8_t *from;
    uint8_t *to;
    volatile float sink[64];
    volatile uint64_t read_sink[64];
} job;

static void read_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->read_sink[lane & 63] = j->read(j->from + begin * PIECE, (end - begin) * PIECE);
}

static void copy_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    (void)lane;
    memcpy(j->to + begin * PIECE, j->from + begin * PIECE, (size_t)(end - begin) * PIECE);
}

static void compute(void *arg, int64_t begin, int64_t end, int lane)
{
    job *j = arg;
    j->sink[lane & 63] = j->fma(1000 * (end - begin));
}

BENCH_GROUP(machine)
{
    uint8_t *memory = aligned_alloc(4096, DRAM_BYTES);
    if (memory == NULL) return;
    memset(memory, 1, DRAM_BYTES);
    hb_pool *pool = c->context->pool;
    job j = {.read = widest_read(c->flags)};
    int64_t operations = 0;
    fma_fn fma = widest_fma(c->flags, &operations);
    for (int threads = 1; threads <= 2; threads++) {
        hb_pool_set_threads(pool, threads);
        CHECK_BENCH(c, b, "machine read DRAM", TURN_BYTES, 0)
        {
            j.from = memory + (int64_t)b.copy * TURN_BYTES % DRAM_BYTES;
            hb_parallel_for(pool, TURN_BYTES / PIECE, read_pieces, &j);
        }
        CHECK_BENCH(c, b, "machine copy DRAM", 2 * TURN_BYTES, 0)
        {
            j.from = memory + (int64_t)b.copy * TURN_BYTES % (DRAM_BYTES / 2);
            j.to = (uint8_t *)(uintptr_t)j.from + DRAM_BYTES / 2;
            hb_parallel_for(pool, TURN_BYTES / PIECE, copy_pieces, &j);
        }
        enum { CALLS = 64 };
        j.fma = fma;
        if (fma != NULL) CHECK_BENCH(c, b, "machine fma f32", 0, operations * 1000 * CALLS)
        hb_parallel_for(pool, CALLS, compute, &j);
#if defined(__x86_64__)
        j.fma = dot_64;
        if (c->flags & HB_CPU_AVX512VNNI)
            CHECK_BENCH(c, b, "machine dot int8", 0, 2.0 * 64 * CHAINS * 1000 * CALLS)
        hb_parallel_for(pool, CALLS, compute, &j);
#endif
    }
    hb_pool_set_threads(pool, 1);
    CHECK_BENCH(c, b, "machine read L2", L2_BYTES, 0) j.read_sink[0] = j.read(memory, L2_BYTES);
    free(memory);
}
