// The rulers of reading and of float32 multiply-adds, for the `vector` of float32 that the file
// which includes this has defined, with VECTOR(name), the intrinsic of that width.
#ifndef HB_CPU_RULER_X86_H
#define HB_CPU_RULER_X86_H

#include "cpu/ruler_loops.h"

#define STEP(sum)  VECTOR(fmadd_ps)(sum, VECTOR(set1_ps)(0.999f), VECTOR(set1_ps)(0.001f))
#define FIRST(sum) VECTOR(cvtss_f32)(sum)

HB_RULER_READ(read_vectors, (int)sizeof(vector))
HB_RULER_MULTIPLY(multiply_f32, vector, VECTOR(set1_ps), STEP, VECTOR(add_ps), FIRST)

static inline void fill_table(hb_kernels_ruler *kernels)
{
    kernels->read = read_vectors;
    kernels->f32 = (hb_ruler){multiply_f32, HB_RULER_OPERATIONS(sizeof(vector) / sizeof(float))};
}

#endif
