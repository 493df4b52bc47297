// Steps on 8-bit blocks with AVX-512 F/BW/DQ/VL: a gather per sixteen codes. How: cpu/states8.h.
#include "cpu/avx512/words8.h"

#include "cpu/avx512/states8.h"

typedef const float *decoder;

static inline decoder make_decoder(const float *map)
{
    return map;
}

static inline void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
{
    for (int k = 0; k < 4; k++) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(codes + 16 * k)));
        value[k] = _mm512_i32gather_ps(index, *d, 4);
    }
}

#include "cpu/adam8.h"
#include "cpu/norm8.h"
#include "cpu/single8.h"

#define OPTIM8(io, dtype)                                                                          \
    ADAM8(io, dtype, avx512)                                                                       \
    SINGLE8(io, dtype, avx512)                                                                     \
    NORM8(io, dtype, avx512)
OPTIM8(f32, HB_F32)
OPTIM8(bf16, HB_BF16)
OPTIM8(f16, HB_F16)
