// Steps on 8-bit blocks with AVX2. How: cpu/states8.h.
#include "cpu/avx2/states8.h"

#include "cpu/optim8.h"

OPTIM8(avx2)
