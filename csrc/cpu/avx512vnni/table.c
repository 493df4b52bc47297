#include "core/kernels.h"

void hb_table_avx512vnni(hb_kernels *kernels)
{
    hb_linear4_int_table_avx512vnni(&kernels->linear4);
    hb_linear8_table_avx512vnni(&kernels->linear8);
    hb_ruler_table_avx512vnni(&kernels->ruler);
}
