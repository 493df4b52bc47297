// The loops of the rulers, for vectors of any width.
#ifndef HB_CPU_RULER_LOOPS_H
#define HB_CPU_RULER_LOOPS_H

#include "core/kernels_ruler.h"

// Eight streams with software prefetch: of the ways to read that were tried the fastest on pages of
// 4 KiB, which is what weights lie in. A ruler must not lose to what it measures.
#define HB_RULER_READ(name, vector_bytes)                                                          \
    static uint64_t name(const void *data, int64_t bytes)                                          \
    {                                                                                              \
        typedef uint64_t words __attribute__((vector_size(vector_bytes), aligned(1), may_alias));  \
        enum { PER_LINE = 64 / vector_bytes, AHEAD = 1024 };                                       \
        const int64_t stream_bytes = bytes / HB_RULER_LINES;                                       \
        words sum[HB_RULER_LINES] = {{0}};                                                         \
        for (int64_t at = 0; at < stream_bytes; at += 64) {                                        \
            _Pragma("GCC unroll 8") for (int s = 0; s < HB_RULER_LINES; s++)                       \
            {                                                                                      \
                const char *line = (const char *)data + s * stream_bytes + at;                     \
                __builtin_prefetch(line + AHEAD);                                                  \
                for (int i = 0; i < PER_LINE; i++) sum[s] += ((const words *)line)[i];             \
            }                                                                                      \
        }                                                                                          \
        uint64_t total = 0;                                                                        \
        for (int s = 0; s < HB_RULER_LINES; s++)                                                   \
            for (int i = 0; i < vector_bytes / 8; i++) total += sum[s][i];                         \
        return total;                                                                              \
    }

// STEP(sum) is one multiply-add of a chain, ADD(a, b) a vector sum, FIRST(sum) a lane as float.
#define HB_RULER_MULTIPLY(name, vector, SET1, STEP, ADD, FIRST)                                    \
    static float name(int64_t rounds)                                                              \
    {                                                                                              \
        vector sum[HB_RULER_CHAINS];                                                               \
        _Pragma("GCC unroll 12") for (int i = 0; i < HB_RULER_CHAINS; i++) sum[i] = SET1(i);       \
        for (int64_t round = 0; round < rounds; round++) {                                         \
            _Pragma("GCC unroll 12") for (int i = 0; i < HB_RULER_CHAINS; i++) sum[i] =            \
                STEP(sum[i]);                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 12") for (int i = 1; i < HB_RULER_CHAINS; i++) sum[0] =                \
            ADD(sum[0], sum[i]);                                                                   \
        return FIRST(sum[0]);                                                                      \
    }

#define HB_RULER_OPERATIONS(lanes) (2 * (int64_t)(lanes) * HB_RULER_CHAINS)

#endif
