// A step of Adam on 8-bit blocks with AVX-512 VBMI: codes are looked up in planes of bytes.
#include "cpu/avx512vbmi/planes8.h"
#include "cpu/avx512vbmi/words8.h"

typedef planes decoder;

static inline decoder make_decoder(const float *map)
{
    return split_map(map);
}

static inline void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
{
    look_up_sixty_four(d, _mm512_loadu_si512(codes), value);
}

#include "cpu/avx512/adam8.h"

ADAM8(f32, HB_F32, avx512vbmi)
ADAM8(bf16, HB_BF16, avx512vbmi)
ADAM8(f16, HB_F16, avx512vbmi)
