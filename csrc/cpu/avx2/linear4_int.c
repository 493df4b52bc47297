// Products with 4-bit weights in integers, AVX2: see the header.
#include "cpu/avx2/linear4_int.h"

HB_INT4_ENTRIES(avx2, 16, 8)
