// Optimizer steps: the common loops under this folder's compiler flags. Formulas: kernels_optim.h.
#define HB_OPTIM_ISA avx512
#include "cpu/optim_loops.h"
