#include "core/kernels.h"

void hb_table_avx512vnni(hb_kernels *kernels)
{
    hb_linear8_table_avx512vnni(&kernels->linear8);
}
