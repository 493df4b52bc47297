#include "core/kernels.h"

void hb_table_ref(hb_kernels *kernels)
{
    HB_SET_CODEC(kernels->codec, ref);
}
