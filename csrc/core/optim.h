// What an optimizer step works on: the tensors of the list and the settings, for the CPU and the
// GPU.
#ifndef HB_CORE_OPTIM_H
#define HB_CORE_OPTIM_H

#include "core/dtype.h"

enum { HB_OPTIM_BLOCKSIZE = 256 }; // of 8-bit states, as bitsandbytes stores them

// One parameter tensor and its states, all contiguous, n elements each. States are float32, or
// uint8 codes of the maps given to hb_optimizer_step with one float32 scale per 256 elements.
// AdEMAMix's first state is [2, n] (fast, slow), its absmax1 [2, ceil(n / 256)].
typedef struct {
    void *p;
    const void *g;
    hb_dtype p_dtype, g_dtype; // float32, bfloat16 or float16 each
    int64_t n;
    bool state_is_8bit;
    void *state1, *state2;    // state2: Adam and AdEMAMix
    float *absmax1, *absmax2; // 8-bit only
    float *unorm;             // [1]: receives the norm of the update squared; NULL without a limit
    int64_t step;             // 1 in the first call
} hb_optim_tensor;

typedef struct {
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale;
    double max_unorm; // > 0: the update's norm is limited to max_unorm * the parameter's norm
    bool skip_zeros;  // leave elements whose gradient is zero untouched
} hb_optim_settings;

#endif
