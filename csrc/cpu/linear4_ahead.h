// How far ahead the x86 products of a few rows with 4-bit weights ask for codes and scales.
//
// Hardware does not follow several short streams of rows; one in the order of addresses it does,
// and scales, a ninth of all lines, cost as much as they are when only they come late. So the rows
// that come next are asked for as one stream, into the L2 cache, which can wait for more lines at
// once than L1. Where arithmetic is faster than that (not `keep`: one row of integers or of pairs
// of bfloat16) a second step, past the rows in hand, brings them into L1: non-temporal, because a
// token reads every weight once. What is asked for may lie outside of W.
#ifndef HB_CPU_LINEAR4_AHEAD_H
#define HB_CPU_LINEAR4_AHEAD_H

#include "cpu/simd.h"

enum {
    AHEAD_INTO_L2 =
        8 << 10,          // bytes of codes from behind the rows at work to what is asked for then
    AHEAD_INTO_L1 = 1024, // the same from the last of these rows on, where weights do not stay
    AHEAD_FAR = 7168,     // and from there to what comes into L2
};

// Bytes from the first of `rows` rows of codes at work to what is asked for then.
static inline int64_t bytes_ahead(const int rows, int64_t row_bytes, const bool keep)
{
    return keep ? rows * row_bytes + AHEAD_INTO_L2 : (rows - 1) * row_bytes + AHEAD_INTO_L1;
}

static inline __attribute__((always_inline)) void ask_ahead(const char *line, const int lines,
                                                            const bool keep)
{
#pragma GCC unroll 2
    for (int i = 0; i < 64 * lines; i += 64) {
        if (keep) {
            _mm_prefetch(line + i, _MM_HINT_T1);
        } else {
            _mm_prefetch(line + i, _MM_HINT_NTA);
            _mm_prefetch(line + i + AHEAD_FAR, _MM_HINT_T1);
        }
    }
}

#endif
