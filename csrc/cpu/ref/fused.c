// Norms, activations and the like: the common loops under this folder's compiler flags. Formulas:
// kernels_fused.h.
#define HB_FUSED_ISA ref
#include "cpu/fused_loops.h"
