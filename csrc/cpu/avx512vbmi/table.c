#include "core/kernels.h"

void hb_table_avx512vbmi(hb_kernels *kernels)
{
    HB_SET_IO(kernels->codec, decode8, map8_decode, avx512vbmi);
    HB_SET_OPTIM8(kernels->optim, avx512vbmi);
}
