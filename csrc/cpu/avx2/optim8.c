// Steps on 8-bit blocks with AVX2. How: cpu/states8.h.
#include "cpu/avx2/states8.h"

#include "cpu/adam8.h"
#include "cpu/norm8.h"
#include "cpu/single8.h"

#define OPTIM8(io, dtype)                                                                          \
    ADAM8(io, dtype, avx2)                                                                         \
    SINGLE8(io, dtype, avx2)                                                                       \
    NORM8(io, dtype, avx2)
OPTIM8(f32, HB_F32)
OPTIM8(bf16, HB_BF16)
OPTIM8(f16, HB_F16)
