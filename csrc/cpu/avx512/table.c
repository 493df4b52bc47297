#include "core/kernels.h"

void hb_table_avx512(hb_kernels *kernels)
{
    HB_SET_CODEC(kernels->codec, avx512);
    hb_linear4_table_avx512(&kernels->linear4);
    hb_linear8_table_avx512(&kernels->linear8);
    hb_dense_table_avx512(&kernels->dense);
    hb_fused_table_avx512(&kernels->fused);
    hb_optim_table_avx512(&kernels->optim);
    HB_SET_OPTIM8(kernels->optim, avx512);
    hb_ruler_table_avx512(&kernels->ruler);
}
