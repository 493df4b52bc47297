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

#include "cpu/optim8.h"

OPTIM8(avx512)
