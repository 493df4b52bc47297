// Rulers in plain C: 16-byte vectors, which every 64-bit processor has, and no fused multiply-add.
#include "cpu/ruler_loops.h"

typedef float vector __attribute__((vector_size(16)));

#define SET1(i)    ((vector){(float)(i), (float)(i), (float)(i), (float)(i)})
#define STEP(sum)  ((sum) * 0.999f + 0.001f)
#define ADD(a, b)  ((a) + (b))
#define FIRST(sum) ((sum)[0])

HB_RULER_READ(read_16, 16)
HB_RULER_MULTIPLY(multiply_f32, vector, SET1, STEP, ADD, FIRST)

void hb_ruler_table_ref(hb_kernels_ruler *kernels)
{
    kernels->read = read_16;
    kernels->f32 = (hb_ruler){multiply_f32, HB_RULER_OPERATIONS(4)};
    kernels->bf16 = kernels->int8 = (hb_ruler){0};
}
