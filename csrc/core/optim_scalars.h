// The scalars of one step, prepared on the host in float64 and rounded: for the CPU's kernels and
// the GPU's. Both sides must be compiled without contraction (-ffp-contract=off).
#ifndef HB_CORE_OPTIM_SCALARS_H
#define HB_CORE_OPTIM_SCALARS_H

#include "core/kernels_optim.h"

#include <math.h>

static inline hb_optim_scalars hb_optim_scalars_of(hb_optimizer optimizer,
                                                   const hb_optim_settings *s, int64_t step)
{
    const double corr1 = 1.0 - pow(s->beta1, (double)step);
    const double corr2 = sqrt(1.0 - pow(s->beta2, (double)step));
    const bool coupled =
        optimizer == HB_MOMENTUM || optimizer == HB_RMSPROP || optimizer == HB_ADAGRAD;
    hb_optim_scalars made;
    made.gnorm_scale = (float)s->gnorm_scale;
    made.coupled_decay = coupled ? (float)s->weight_decay : 0.0f;
    made.keep = coupled ? 1.0f : (float)(1.0 - s->lr * s->weight_decay);
    made.beta1 = (float)s->beta1;
    made.beta1_rest = (float)(1.0 - s->beta1);
    made.beta2 = (float)s->beta2;
    made.beta2_rest = (float)(1.0 - s->beta2);
    made.beta3 = (float)s->beta3;
    made.beta3_rest = (float)(1.0 - s->beta3);
    made.alpha = (float)s->alpha;
    made.eps = (float)s->eps;
    made.lr = (float)s->lr;
    made.step_size = (float)(s->lr / corr1);
    made.inv_corr1 = (float)(1.0 / corr1);
    made.inv_corr2 = (float)(1.0 / corr2);
    made.scale = 1.0f;
    made.first = step == 1;
    return made;
}

#endif
