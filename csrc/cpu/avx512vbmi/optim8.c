// Steps on 8-bit blocks with AVX-512 VBMI: codes are looked up in planes of bytes. How:
// cpu/states8.h.
#include "cpu/avx512vbmi/planes8.h"
#include "cpu/avx512vbmi/words8.h"

#include "cpu/avx512/states8.h"

typedef planes decoder;

static inline decoder make_decoder(const float *map)
{
    return split_map(map);
}

static inline void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
{
    look_up_sixty_four(d, _mm512_loadu_si512(codes), value);
}

#include "cpu/optim8.h"

OPTIM8(avx512vbmi)
