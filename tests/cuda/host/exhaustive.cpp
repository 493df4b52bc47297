// Encodes every float32 with the encoder of cuda/codebooks.cuh and with the definition: the rank is
// the number of thresholds below. Compiled with and without contraction of a * b + c, as nvcc may
// or may not do it.
//
//   exhaustive STEP     every STEP-th bit pattern, 1 for all; prints the number compared
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// In the place of dev.cuh: plain functions.
#define HB_CUDA_DEV_CUH
#define HB_DEVICE   static inline
#define HB_CONSTANT static const
static int thread;
HB_DEVICE int thread_index()
{
    return thread;
}
template <typename T> HB_DEVICE T shared_load(const T *p)
{
    return *p;
}
template <typename T> HB_DEVICE void shared_store(T *p, T value)
{
    *p = value;
}
HB_DEVICE uint32_t float_bits(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
HB_DEVICE float magnitude(float x)
{
    return std::fabs(x);
}
HB_DEVICE float min_magnitude(float x, float limit)
{
    return std::fabs(x) < limit ? std::fabs(x) : limit;
}
#include "codebooks.cuh"

static uint32_t defined(const codebook_tables &book, float v)
{
    if (v != v) return book.nan_code;
    int rank = 0;
    for (float t : book.threshold) rank += v > t;
    return book.code_of_rank[rank];
}

int main(int, char **arguments)
{
    const uint64_t step = std::strtoull(arguments[1], nullptr, 10);
    uint64_t compared = 0;
    for (int format = 0; format < HB_CODEBOOK_COUNT; format++) {
        encoder4 encoder;
        for (thread = 0; thread < BUCKETS; thread++) encoder4_fill(&encoder, format);
        for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += step, compared++) {
            const uint32_t pattern = (uint32_t)bits;
            float v;
            std::memcpy(&v, &pattern, sizeof v);
            if (encode4(&encoder, v) == defined(codebooks[format], v)) continue;
            std::printf("format %d, %a: %u, expected %u\n", format, (double)v, encode4(&encoder, v),
                        defined(codebooks[format], v));
            return 1;
        }
    }
    std::printf("%llu\n", (unsigned long long)compared);
    return 0;
}
