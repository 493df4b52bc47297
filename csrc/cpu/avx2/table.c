#include "core/kernels.h"

void hb_table_avx2(hb_kernels *kernels)
{
    HB_SET_CODEC(kernels->codec, avx2);
    hb_linear4_table_avx2(&kernels->linear4);
    hb_linear4_int_table_avx2(&kernels->linear4);
    hb_linear8_table_avx2(&kernels->linear8);
    hb_dense_table_avx2(&kernels->dense);
    hb_fused_table_avx2(&kernels->fused);
    hb_optim_table_avx2(&kernels->optim);
    HB_SET_OPTIM8(kernels->optim, avx2);
    hb_ruler_table_avx2(&kernels->ruler);
}
