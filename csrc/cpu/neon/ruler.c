// Rulers on 16-byte vectors with fused multiply-adds. Reading is the plain loop's.
#include "cpu/ruler_loops.h"
#include "cpu/simd.h"

#define SET1(i)    vdupq_n_f32((float)(i))
#define STEP(sum)  vfmaq_f32(vdupq_n_f32(0.001f), sum, vdupq_n_f32(0.999f))
#define FIRST(sum) vgetq_lane_f32(sum, 0)

HB_RULER_MULTIPLY(multiply_f32, float32x4_t, SET1, STEP, vaddq_f32, FIRST)

void hb_ruler_table_neon(hb_kernels_ruler *kernels)
{
    kernels->f32 = (hb_ruler){multiply_f32, HB_RULER_OPERATIONS(4)};
}
