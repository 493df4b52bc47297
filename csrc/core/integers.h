// Arithmetic of sizes, none negative.
#ifndef HB_CORE_INTEGERS_H
#define HB_CORE_INTEGERS_H

#include <stdint.h>

static inline int64_t hb_ceil_div(int64_t n, int64_t d)
{
    return n / d + (n % d != 0);
}

static inline int64_t hb_round_up(int64_t n, int64_t multiple)
{
    return hb_ceil_div(n, multiple) * multiple;
}

static inline int64_t hb_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t hb_most(int64_t a, int64_t b)
{
    return a < b ? b : a;
}

#endif
