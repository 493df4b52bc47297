// What the optimizer's kernels share: the table of tensors that travels with a launch, and the
// formulas of core/kernels_optim.h, one operation after the other as cpu/optim_loops.h has them.
#ifndef HB_CUDA_OPTIM_CUH
#define HB_CUDA_OPTIM_CUH

#include "dev.cuh"

#include "core/cuda_api.h"
#include "core/kernels_optim.h"
#include "core/sums.h"

// A tensor of the list. Its norms lie at norms + 2 * first_piece: for each piece of 2048 elements
// the sums of the squares of update and parameter. Once they are added up, the factor of its update
// lies there instead, as a float.
struct optim_entry {
    void *p;
    const void *g;
    void *state1, *state2;
    float *absmax1, *absmax2;
    int64_t n, first_piece;
    float step_size, inv_corr1, inv_corr2;
    uint8_t p_dtype, g_dtype;
    uint8_t first;   // step 1
    uint8_t aligned; // for accesses of 16 bytes (8-bit codes: 8)
};

// As many tensors as the 4096 bytes of a launch's arguments hold. What depends on the step is in
// the entries; those fields of `s` are not set.
enum { OPTIM_TENSORS = 44 };
struct optim_table {
    optim_entry entry[OPTIM_TENSORS];
    int64_t first_unit[OPTIM_TENSORS + 1]; // blocks of 256 elements (norms: pieces) before
    const float *map1, *map2;
    double *norms; // NULL: updates are not limited
    int64_t warps; // of the launch
    hb_optim_scalars s;
    int32_t count;
    bool skip_zeros;
};
static_assert(sizeof(optim_table) <= 4096, "what every driver takes as arguments of a kernel");

template <int OPTIMIZER> struct optim_states {
    enum : bool {
        SLOW = OPTIMIZER == HB_ADEMAMIX,
        SECOND = OPTIMIZER == HB_ADAM || OPTIMIZER == HB_ADEMAMIX
    };
};

// The scalars of a tensor in this step. size: what the update is multiplied by.
struct optim_step {
    float size, inv_corr1, inv_corr2, carried;
};

HB_DEVICE float sub_rn(float a, float b)
{
    return add_rn(a, -b);
}

template <int OPTIMIZER>
HB_DEVICE optim_step step_of(const optim_table &a, const optim_entry &entry)
{
    float scale = 1.0f;
    if (a.norms != nullptr) scale = load((const float *)(a.norms + 2 * entry.first_piece));
    const float rate = OPTIMIZER == HB_ADAM ? entry.step_size : a.s.lr;
    const bool limited = OPTIMIZER != HB_ADEMAMIX && OPTIMIZER != HB_ADAGRAD;
    return {limited ? mul_rn(rate, scale) : rate, entry.inv_corr1, entry.inv_corr2,
            entry.first ? 0.0f : a.s.beta1};
}

template <int OPTIMIZER> HB_DEVICE float gradient_of(const hb_optim_scalars &s, float g, float p)
{
    const float gradient = mul_rn(s.gnorm_scale, g);
    if (OPTIMIZER == HB_ADAM || OPTIMIZER == HB_ADEMAMIX || OPTIMIZER == HB_LION) return gradient;
    return add_rn(gradient, mul_rn(s.coupled_decay, p));
}

// beta x + rest y
HB_DEVICE float mix(float beta, float x, float rest, float y)
{
    return add_rn(mul_rn(beta, x), mul_rn(rest, y));
}

// One element's step.
template <int OPTIMIZER>
HB_DEVICE void step_element(const hb_optim_scalars &s, const optim_step &now, float g, float *p,
                            float *m, float *slow, float *v)
{
    const float gradient = gradient_of<OPTIMIZER>(s, g, *p);
    const float square = mul_rn(gradient, gradient);
    if (OPTIMIZER == HB_ADAM || OPTIMIZER == HB_ADEMAMIX) {
        *m = mix(s.beta1, *m, s.beta1_rest, gradient);
        if (OPTIMIZER == HB_ADEMAMIX) *slow = mix(s.beta3, *slow, s.beta3_rest, gradient);
        *v = mix(s.beta2, *v, s.beta2_rest, square);
        const float root = add_rn(mul_rn(sqrt_rn(*v), now.inv_corr2), s.eps);
        const float mixed = OPTIMIZER == HB_ADEMAMIX
                                ? add_rn(mul_rn(*m, now.inv_corr1), mul_rn(s.alpha, *slow))
                                : *m;
        *p = sub_rn(mul_rn(s.keep, *p), mul_rn(now.size, div_rn(mixed, root)));
    } else if (OPTIMIZER == HB_MOMENTUM) {
        *m = add_rn(mul_rn(now.carried, *m), gradient);
        *p = sub_rn(*p, mul_rn(now.size, *m));
    } else if (OPTIMIZER == HB_LION) {
        const float mixed = mix(s.beta1, *m, s.beta1_rest, gradient);
        const float sign = mixed > 0.0f ? 1.0f : mixed < 0.0f ? -1.0f : mixed;
        *p = sub_rn(mul_rn(s.keep, *p), mul_rn(now.size, sign));
        *m = mix(s.beta2, *m, s.beta2_rest, gradient);
    } else {
        *m = OPTIMIZER == HB_RMSPROP ? mix(s.beta1, *m, s.beta1_rest, square) : add_rn(*m, square);
        const float root = add_rn(sqrt_rn(*m), s.eps);
        *p = sub_rn(*p, mul_rn(now.size, div_rn(gradient, root)));
    }
}

// The update whose norm is limited: Adam's and momentum's.
template <int OPTIMIZER>
HB_DEVICE float update_of(const hb_optim_scalars &s, const optim_step &now, float g, float p,
                          float m, float v)
{
    const float gradient = gradient_of<OPTIMIZER>(s, g, p);
    if (OPTIMIZER == HB_MOMENTUM) return add_rn(mul_rn(now.carried, m), gradient);
    const float first = mix(s.beta1, m, s.beta1_rest, gradient);
    const float second = mix(s.beta2, v, s.beta2_rest, mul_rn(gradient, gradient));
    const float root = add_rn(mul_rn(sqrt_rn(second), now.inv_corr2), s.eps);
    return div_rn(mul_rn(first, now.inv_corr1), root);
}

// Element i of an array that this launch also writes, of a dtype known at run time.
HB_DEVICE float load_own(const void *p, int64_t i, int dtype)
{
    if (dtype == HB_F32) return load_once((const float *)p + i);
    const uint16_t bits = load_once((const uint16_t *)p + i);
    return dtype == HB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// The tensor that unit `unit` (block or piece) of the launch belongs to, from `tensor` on.
HB_DEVICE int tensor_of(const optim_table &a, int tensor, int64_t unit)
{
    while (unit >= a.first_unit[tensor + 1]) tensor++;
    return tensor;
}

// Launches of the other files; `table` is complete but for `warps`.
int hb_cuda_launch_optim_step(const hb_cuda_queue *queue, int optimizer, bool eight,
                              optim_table &table);
int hb_cuda_launch_optim_norms(const hb_cuda_queue *queue, int optimizer, bool eight,
                               const optim_table &table);
int hb_cuda_launch_optim_limits(const hb_cuda_queue *queue, const hb_cuda_optimizer *args);

#endif
