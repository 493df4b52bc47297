#include "core/kernels.h"

void hb_table_avx512bf16(hb_kernels *kernels)
{
    hb_linear4_table_avx512bf16(&kernels->linear4);
    hb_dense_table_avx512bf16(&kernels->dense);
    hb_ruler_table_avx512bf16(&kernels->ruler);
}
