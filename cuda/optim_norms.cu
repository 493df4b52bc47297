// The norm limit of LAMB and LARS, and the launches of an optimizer's step.
//
//   update's factor = min(1, max_unorm * |p| / |update|)          (momentum: max_unorm * |p| + eps)
//
// The first of three launches adds the squares of a piece of 2048 elements, a block of threads a
// piece; the second adds a tensor's pieces, a block a tensor, and leaves the factor in the
// workspace; the third is the step. All sums are float64 in the order of core/sums.h, where thread
// t has lane t: the CPU's bits. Floor: what a step reads, once more.
#include "fold.cuh"
#include "kernels.cuh"
#include "optim.cuh"

#include "core/optim_scalars.h"

namespace
{

enum { THREADS = HB_SUM_LANES, EACH = HB_OPTIM_PIECE / THREADS, LIMITS = 128 };

template <int OPTIMIZER, bool EIGHT> HB_KERNEL(THREADS) optim_norms_kernel(HB_ARGS optim_table a)
{
    const bool second = optim_states<OPTIMIZER>::SECOND;
    double *room = (double *)shared_memory();
    float *map1 = (float *)(room + FOLD_BYTES / 8), *map2 = map1 + 256;
    const int t = thread_index();
    if (EIGHT) {
        shared_store(map1 + t, load(a.map1 + t));
        if (second) shared_store(map2 + t, load(a.map2 + t));
        block_sync();
    }
    const int tensor = tensor_of(a, 0, block_index());
    const optim_entry &e = a.entry[tensor];
    const int64_t piece = block_index() - a.first_unit[tensor];
    const optim_step now = {0.0f, e.inv_corr1, e.inv_corr2, e.first ? 0.0f : a.s.beta1};
    double update = 0.0, parameter = 0.0;
#pragma unroll 4
    for (int j = 0; j < EACH; j++) {
        const int64_t i = piece * HB_OPTIM_PIECE + j * THREADS + t;
        if (i >= e.n) continue;
        const float p = load_own(e.p, i, e.p_dtype), g = load_own(e.g, i, e.g_dtype);
        float m, v = 0.0f;
        if (EIGHT) {
            const int64_t block = i / HB_OPTIM_BLOCKSIZE;
            m = mul_rn(shared_load(map1 + load((const uint8_t *)e.state1 + i)),
                       load(e.absmax1 + block));
            if (second)
                v = mul_rn(shared_load(map2 + load((const uint8_t *)e.state2 + i)),
                           load(e.absmax2 + block));
        } else {
            m = load((const float *)e.state1 + i);
            if (second) v = load((const float *)e.state2 + i);
        }
        const double u = (double)update_of<OPTIMIZER>(a.s, now, g, p, m, v);
        update = add_rn(update, mul_rn(u, u)); // the squares are exact
        parameter = add_rn(parameter, mul_rn((double)p, (double)p));
    }
    update = fold_block(update, room);
    parameter = fold_block(parameter, room);
    double *norm = a.norms + 2 * (e.first_piece + piece);
    if (t == 0) {
        store(norm, update);
        store(norm + 1, parameter);
    }
}

struct limit_table {
    struct {
        float *unorm;
        int64_t first_piece, pieces;
    } entry[LIMITS];
    double *norms;
    double max_unorm, eps;
};
static_assert(sizeof(limit_table) <= 4096, "what every driver takes as arguments of a kernel");

HB_KERNEL(THREADS) optim_limits_kernel(HB_ARGS limit_table a)
{
    double *room = (double *)shared_memory();
    const int t = thread_index();
    const int64_t tensor = block_index();
    const int64_t pieces = a.entry[tensor].pieces;
    double *norms = a.norms + 2 * a.entry[tensor].first_piece;
    double update = 0.0, parameter = 0.0;
    for (int64_t c = t; c < pieces; c += THREADS) {
        update = add_rn(update, load_once(norms + 2 * c));
        parameter = add_rn(parameter, load_once(norms + 2 * c + 1));
    }
    update = fold_block(update, room);
    parameter = fold_block(parameter, room);
    if (t != 0) return;
    if (a.entry[tensor].unorm != nullptr) store(a.entry[tensor].unorm, round_to_float(update));
    if (pieces == 0) return;
    const double norm = sqrt_rn(update);
    const double limit = add_rn(mul_rn(a.max_unorm, sqrt_rn(parameter)), a.eps);
    const float factor = norm > limit ? round_to_float(div_rn(limit, norm)) : 1.0f;
    store((float *)norms, factor);
}

int launch_norms(const hb_cuda_queue *queue, int optimizer, bool eight, const optim_table &a)
{
    const int64_t pieces = a.first_unit[a.count];
    const int bytes = FOLD_BYTES + (eight ? 2 * 256 * 4 : 0);
    if (optimizer == HB_ADAM) {
        if (eight)
            return HB_LAUNCH((optim_norms_kernel<HB_ADAM, true>), pieces, THREADS, bytes,
                             queue->stream, a);
        return HB_LAUNCH((optim_norms_kernel<HB_ADAM, false>), pieces, THREADS, bytes,
                         queue->stream, a);
    }
    if (eight)
        return HB_LAUNCH((optim_norms_kernel<HB_MOMENTUM, true>), pieces, THREADS, bytes,
                         queue->stream, a);
    return HB_LAUNCH((optim_norms_kernel<HB_MOMENTUM, false>), pieces, THREADS, bytes,
                     queue->stream, a);
}

int launch_limits(const hb_cuda_queue *queue, const hb_cuda_optimizer &a)
{
    limit_table table;
    table.norms = (double *)a.workspace;
    table.max_unorm = a.settings->max_unorm;
    table.eps = a.optimizer == HB_MOMENTUM ? a.settings->eps : 0.0;
    int64_t piece = 0;
    for (int64_t first = 0; first < a.count; first += LIMITS) {
        int count = 0;
        for (; count < LIMITS && first + count < a.count; count++) {
            const hb_optim_tensor &t = a.tensors[first + count];
            const int64_t pieces = hb_ceil_div(t.n, HB_OPTIM_PIECE);
            table.entry[count] = {t.unorm, piece, pieces};
            piece += pieces;
        }
        const int status =
            HB_LAUNCH(optim_limits_kernel, count, THREADS, FOLD_BYTES, queue->stream, table);
        if (status != 0) return status;
    }
    return 0;
}

bool aligned(const void *p, uintptr_t bytes)
{
    return ((uintptr_t)p & (bytes - 1)) == 0;
}

optim_entry entry_of(int optimizer, const hb_optim_tensor &t, const hb_optim_scalars &s,
                     int64_t first_piece)
{
    const uintptr_t state_bytes = t.state_is_8bit ? 8 : 16;
    return {t.p, t.g, t.state1, t.state2, t.absmax1, t.absmax2, t.n, first_piece, s.step_size,
            s.inv_corr1, s.inv_corr2, (uint8_t)t.p_dtype, (uint8_t)t.g_dtype, s.first,
            // The slow momentum lies n elements behind the first.
            aligned(t.p, 16) && aligned(t.g, 16) && aligned(t.state1, state_bytes) &&
                aligned(t.state2, state_bytes) && (optimizer != HB_ADEMAMIX || t.n % 8 == 0)};
}

// Launches one pass over the tensors with 8-bit states, or over those with float32 states.
int launch_pass(const hb_cuda_queue *queue, const hb_cuda_optimizer &a, bool eight, bool norms)
{
    optim_table table;
    table.map1 = a.map1;
    table.map2 = a.map2;
    table.norms = a.settings->max_unorm > 0.0 ? (double *)a.workspace : nullptr;
    table.warps = 0;
    table.count = 0;
    table.skip_zeros = a.settings->skip_zeros;
    table.first_unit[0] = 0;
    int64_t piece = 0;
    for (int64_t i = 0; i <= a.count; i++) {
        if (table.count == OPTIM_TENSORS || (i == a.count && table.count > 0)) {
            const int status = norms ? launch_norms(queue, a.optimizer, eight, table)
                                     : hb_cuda_launch_optim_step(queue, a.optimizer, eight, table);
            if (status != 0) return status;
            table.count = 0;
        }
        if (i == a.count) break;
        const hb_optim_tensor &t = a.tensors[i];
        if (t.n > 0 && t.state_is_8bit == eight) {
            table.s = hb_optim_scalars_of((hb_optimizer)a.optimizer, a.settings, t.step);
            const int k = table.count++;
            table.entry[k] = entry_of(a.optimizer, t, table.s, piece);
            const int64_t unit = norms ? (int)HB_OPTIM_PIECE : (int)HB_OPTIM_BLOCKSIZE;
            table.first_unit[k + 1] = table.first_unit[k] + hb_ceil_div(t.n, unit);
        }
        piece += hb_ceil_div(t.n, HB_OPTIM_PIECE);
    }
    return 0;
}

} // namespace

int64_t hb_cuda_optimizer_workspace(const hb_cuda_queue *, const hb_cuda_optimizer *args)
{
    if (!(args->settings->max_unorm > 0.0)) return 0;
    int64_t pieces = 0;
    for (int64_t i = 0; i < args->count; i++)
        pieces += hb_ceil_div(args->tensors[i].n, HB_OPTIM_PIECE);
    return pieces * 2 * (int64_t)sizeof(double);
}

int hb_cuda_launch_optimizer(const hb_cuda_queue *queue, const hb_cuda_optimizer *args)
{
    int status = 0;
    if (args->settings->max_unorm > 0.0) {
        if (args->optimizer != HB_ADAM && args->optimizer != HB_MOMENTUM) return HB_CUDA_INVALID;
        for (int eight = 0; eight < 2 && status == 0; eight++)
            status = launch_pass(queue, *args, eight != 0, true);
        if (status == 0) status = launch_limits(queue, *args);
    }
    for (int eight = 0; eight < 2 && status == 0; eight++)
        status = launch_pass(queue, *args, eight != 0, false);
    return status;
}
