// Optimizer steps over a list of tensors.
//
// Work is cut into pieces of PIECE elements, whole 8-bit blocks, and all pieces of all tensors form
// one parallel loop, so that many small tensors cost one start of the pool. A piece is brought to
// float32 in scratch that stays in the L1 cache (float32 data are updated where they are), stepped
// by the kernel, rounded and stored.
//
// 8-bit states (arXiv:2110.02861): codes are the nearest entries of x / absmax, except that the
// first state keeps its sign: a code whose value has another sign than the state moves by one.
// With max_unorm, a first pass sums the squares of every piece's update in the order of sums.h: the
// result does not depend on the threads.
#include "core/ops.h"
#include "core/ops_cuda.h"
#include "core/optim_scalars.h"
#include "core/pieces.h"
#include "core/sums.h"

#include <math.h>

enum { PIECE = HB_OPTIM_PIECE, BLOCK = HB_OPTIM_BLOCKSIZE };

typedef struct {
    const hb_kernels *kernels;
    hb_optimizer optimizer;
    const hb_optim_tensor *tensors;
    const int64_t *first_piece; // [count + 1]
    hb_optim_scalars *scalars;  // [count]
    hb_optim_squares *norms;    // [pieces], NULL without a limit
    int64_t count;
    bool skip_zeros;
    const float *map1, *map2;
    hb_search8 search1, search2;
    int first_positive; // codes of map1 from here on are >= 0
} step_job;

// The float32 form of a piece: pointers into the tensor, or into the scratch behind them.
typedef struct {
    float *p, *m, *slow, *v;
    const float *g;
    _Alignas(64) float p_scratch[PIECE];
    _Alignas(64) float g_scratch[PIECE];
    _Alignas(64) float state_scratch[3][PIECE];
} piece;

static bool has_second_state(hb_optimizer optimizer)
{
    return optimizer == HB_ADAM || optimizer == HB_ADEMAMIX;
}

// The state of elements [first, first + n) in float32. `row` chooses AdEMAMix's slow momentum.
static float *load_state(const step_job *job, const hb_optim_tensor *t, void *state,
                         const float *absmax, const float *map, int row, int64_t first, int64_t n,
                         float *scratch)
{
    const int64_t element = row * t->n + first;
    if (!t->state_is_8bit) return (float *)state + element;
    absmax += row * hb_ceil_div(t->n, BLOCK) + first / BLOCK;
    job->kernels->codec.decode8[HB_F32]((const uint8_t *)state + element, n, map, BLOCK, absmax,
                                        scratch, false);
    return scratch;
}

static void store_state(const step_job *job, const hb_optim_tensor *t, void *state, float *absmax,
                        const hb_search8 *search, int row, int64_t first, int64_t n,
                        const float *values, bool keep_sign)
{
    if (!t->state_is_8bit) return;
    uint8_t *codes = (uint8_t *)state + row * t->n + first;
    absmax += row * hb_ceil_div(t->n, BLOCK) + first / BLOCK;
    job->kernels->codec.absmax[HB_F32](values, n, BLOCK, absmax);
    job->kernels->codec.encode8[HB_F32](values, n, search, BLOCK, absmax, codes);
    if (keep_sign) job->kernels->optim.keep_sign(values, n, job->first_positive, codes);
}

static void load_piece(const step_job *job, const hb_optim_tensor *t, int64_t first, int64_t n,
                       piece *x)
{
    const hb_kernels_optim *k = &job->kernels->optim;
    const size_t p_offset = (size_t)first * hb_dtype_bytes(t->p_dtype);
    const size_t g_offset = (size_t)first * hb_dtype_bytes(t->g_dtype);
    x->p = (float *)((uint8_t *)t->p + p_offset);
    if (t->p_dtype != HB_F32) {
        k->widen[t->p_dtype](x->p, n, x->p_scratch);
        x->p = x->p_scratch;
    }
    x->g = (const float *)((const uint8_t *)t->g + g_offset);
    if (t->g_dtype != HB_F32) {
        k->widen[t->g_dtype](x->g, n, x->g_scratch);
        x->g = x->g_scratch;
    }
    x->m = load_state(job, t, t->state1, t->absmax1, job->map1, 0, first, n, x->state_scratch[0]);
    x->slow = x->v = NULL;
    if (job->optimizer == HB_ADEMAMIX)
        x->slow =
            load_state(job, t, t->state1, t->absmax1, job->map1, 1, first, n, x->state_scratch[1]);
    if (has_second_state(job->optimizer))
        x->v =
            load_state(job, t, t->state2, t->absmax2, job->map2, 0, first, n, x->state_scratch[2]);
}

// Elements that the step must leave alone: with 8-bit states those whose gradient is not finite (it
// would spoil the whole block) and, if wished, those with none. Rare, therefore stepped and put
// back.
typedef struct {
    int64_t count;
    uint16_t index[PIECE];
    float p[PIECE], m[PIECE], slow[PIECE], v[PIECE];
} untouched;

static void remember(const step_job *job, const hb_optim_tensor *t, const piece *x, int64_t n,
                     untouched *kept)
{
    kept->count = 0;
    if (!t->state_is_8bit && !job->skip_zeros) return;
    float largest;
    job->kernels->codec.absmax[HB_F32](x->g, n, n, &largest); // NaN when there is one
    if (largest <= 0x1.fffffep127f && !job->skip_zeros) return;
    for (int64_t i = 0; i < n; i++) {
        const bool reset = t->state_is_8bit && x->g[i] - x->g[i] != 0.0f;
        if (!reset && !(job->skip_zeros && x->g[i] == 0.0f)) continue;
        const int64_t k = kept->count++;
        kept->index[k] = (uint16_t)i;
        kept->p[k] = x->p[i];
        kept->m[k] = reset ? 0.0f : x->m[i];
        kept->slow[k] = reset || x->slow == NULL ? 0.0f : x->slow[i];
        kept->v[k] = reset || x->v == NULL ? 0.0f : x->v[i];
    }
}

static void put_back(const untouched *kept, const piece *x)
{
    for (int64_t k = 0; k < kept->count; k++) {
        const int i = kept->index[k];
        x->p[i] = kept->p[k];
        x->m[i] = kept->m[k];
        if (x->slow != NULL) x->slow[i] = kept->slow[k];
        if (x->v != NULL) x->v[i] = kept->v[k];
    }
}

static void step_piece(const step_job *job, int64_t tensor, int64_t first, int64_t n)
{
    const hb_optim_tensor *t = &job->tensors[tensor];
    const hb_kernels_optim *k = &job->kernels->optim;
    piece x;
    untouched kept;
    load_piece(job, t, first, n, &x);
    remember(job, t, &x, n, &kept);
    k->step[job->optimizer](x.p, x.g, x.m, x.slow, x.v, n, &job->scalars[tensor]);
    put_back(&kept, &x);
    if (t->p_dtype != HB_F32) {
        uint8_t *p = (uint8_t *)t->p + (size_t)first * hb_dtype_bytes(t->p_dtype);
        k->narrow[t->p_dtype](x.p, n, p);
    }
    store_state(job, t, t->state1, t->absmax1, &job->search1, 0, first, n, x.m, true);
    if (x.slow != NULL)
        store_state(job, t, t->state1, t->absmax1, &job->search1, 1, first, n, x.slow, true);
    if (x.v != NULL)
        store_state(job, t, t->state2, t->absmax2, &job->search2, 0, first, n, x.v, false);
}

// Whether the kernels that decode, step and encode in one pass take tensor t.
static bool is_for_fused(const step_job *job, const hb_optim_tensor *t)
{
    const hb_search8 *search1 = &job->search1, *search2 = &job->search2;
    if (!t->state_is_8bit || job->skip_zeros || t->p_dtype != t->g_dtype) return false;
    if (!search1->decades.fits || !search1->decades.is_signed) return false;
    return !has_second_state(job->optimizer) ||
           (search2->decades.fits && !search2->decades.is_signed);
}

static hb_states8 states_at(const step_job *job, const hb_optim_tensor *t, int64_t first)
{
    hb_states8 states = {.codes1 = (uint8_t *)t->state1 + first,
                         .absmax1 = t->absmax1 + first / BLOCK,
                         .map1 = job->map1,
                         .map2 = job->map2,
                         .search1 = &job->search1,
                         .search2 = &job->search2};
    if (job->optimizer == HB_ADEMAMIX) {
        states.slow_codes = states.codes1 + t->n;
        states.slow_absmax = states.absmax1 + hb_ceil_div(t->n, BLOCK);
    }
    if (has_second_state(job->optimizer)) {
        states.codes2 = (uint8_t *)t->state2 + first;
        states.absmax2 = t->absmax2 + first / BLOCK;
    }
    return states;
}

// Elements [first, first + n): whole blocks at once, the rest of the tensor as a piece.
static void step_fused(const step_job *job, hb_step8_fn *step, int64_t tensor, int64_t first,
                       int64_t n)
{
    const hb_optim_tensor *t = &job->tensors[tensor];
    const int64_t blocks = n / BLOCK, whole = blocks * BLOCK;
    const hb_states8 states = states_at(job, t, first);
    if (blocks > 0)
        step((uint8_t *)t->p + (size_t)first * hb_dtype_bytes(t->p_dtype),
             (const uint8_t *)t->g + (size_t)first * hb_dtype_bytes(t->g_dtype), blocks, &states,
             &job->scalars[tensor]);
    if (whole < n) step_piece(job, tensor, first + whole, n - whole);
}

static void norm_piece(const step_job *job, int64_t tensor, int64_t first, int64_t n,
                       hb_optim_squares *squares)
{
    piece x;
    load_piece(job, &job->tensors[tensor], first, n, &x);
    job->kernels->optim.norm[job->optimizer](x.p, x.g, x.m, x.v, n, &job->scalars[tensor], squares);
}

// The norms of elements [first, first + n): pieces of whole blocks at once, the last one otherwise.
static void norm_fused(const step_job *job, hb_norm8_fn *norm, int64_t tensor, int64_t first,
                       int64_t n, hb_optim_squares *squares)
{
    const hb_optim_tensor *t = &job->tensors[tensor];
    const int64_t pieces = n % BLOCK == 0 ? hb_ceil_div(n, PIECE) : n / PIECE;
    const int64_t whole = hb_min_i64(pieces * PIECE, n);
    const hb_states8 states = states_at(job, t, first);
    if (pieces > 0)
        norm((const uint8_t *)t->p + (size_t)first * hb_dtype_bytes(t->p_dtype),
             (const uint8_t *)t->g + (size_t)first * hb_dtype_bytes(t->g_dtype), whole / BLOCK,
             &states, &job->scalars[tensor], squares);
    if (whole < n) norm_piece(job, tensor, first + whole, n - whole, squares + pieces);
}

// Calls one of the two for pieces [begin, end) of the whole list.
static void run_pieces(const step_job *job, int64_t begin, int64_t end, bool norms)
{
    const hb_kernels_optim *k = &job->kernels->optim;
    int64_t tensor = 0, high = job->count;
    while (high - tensor > 1) { // the last tensor whose first piece is <= begin
        int64_t middle = tensor + (high - tensor) / 2;
        if (job->first_piece[middle] <= begin)
            tensor = middle;
        else
            high = middle;
    }
    for (int64_t i = begin, last; i < end; i = last) {
        while (i >= job->first_piece[tensor + 1]) tensor++;
        const hb_optim_tensor *t = &job->tensors[tensor];
        const bool fits = is_for_fused(job, t);
        hb_step8_fn *step = fits && !norms ? k->step8[job->optimizer][t->p_dtype] : NULL;
        hb_norm8_fn *norm = fits && norms ? k->norm8[job->optimizer][t->p_dtype] : NULL;
        const bool fused = step != NULL || norm != NULL;
        last = fused ? hb_min_i64(end, job->first_piece[tensor + 1]) : i + 1;
        const int64_t first = (i - job->first_piece[tensor]) * PIECE;
        const int64_t n = hb_min_i64((last - i) * PIECE, t->n - first);
        if (norm != NULL)
            norm_fused(job, norm, tensor, first, n, &job->norms[i]);
        else if (norms)
            norm_piece(job, tensor, first, n, &job->norms[i]);
        else if (step != NULL)
            step_fused(job, step, tensor, first, n);
        else
            step_piece(job, tensor, first, n);
    }
}

static void step_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    run_pieces(arg, begin, end, false);
}

// The same behind norm_pieces, from the last piece to the first: what was read last is still in the
// caches.
static void step_pieces_back(void *arg, int64_t begin, int64_t end, int lane)
{
    enum { AT_ONCE = 16 };
    const step_job *job = arg;
    const int64_t pieces = job->first_piece[job->count];
    (void)lane;
    for (; begin < end; begin += AT_ONCE)
        run_pieces(job, pieces - hb_min_i64(begin + AT_ONCE, end), pieces - begin, false);
}

static void norm_pieces(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    run_pieces(arg, begin, end, true);
}

// Sets the scale of each tensor's update from the sums of its pieces.
static void limit_norms(const step_job *job, const hb_optim_settings *settings)
{
    for (int64_t t = 0; t < job->count; t++) {
        double updates[HB_SUM_LANES] = {0}, parameters[HB_SUM_LANES] = {0};
        const int64_t first = job->first_piece[t], pieces = job->first_piece[t + 1] - first;
        for (int64_t i = 0; i < pieces; i++) {
            updates[i % HB_SUM_LANES] += job->norms[first + i].update;
            parameters[i % HB_SUM_LANES] += job->norms[first + i].parameter;
        }
        const double update = hb_fold(updates, HB_SUM_LANES);
        const double parameter = hb_fold(parameters, HB_SUM_LANES);
        if (job->tensors[t].unorm != NULL) *job->tensors[t].unorm = (float)update;
        double norm = sqrt(update), limit = settings->max_unorm * sqrt(parameter);
        if (!has_second_state(job->optimizer)) limit += settings->eps;
        if (norm > limit) job->scalars[t].scale = (float)(limit / norm);
    }
}

static hb_status check_tensor(hb_error *error, hb_optimizer optimizer, const hb_optim_tensor *t,
                              int64_t i, const float *map1, const float *map2)
{
    HB_CHECK(error, t->n >= 0, HB_ERR_VALUE, "optimizer_step: tensor %lld has %lld elements",
             (long long)i, (long long)t->n);
    HB_CHECK(error, hb_dtype_is_io(t->p_dtype), HB_ERR_TYPE,
             "optimizer_step: p[%lld] is %s, expected float32, bfloat16 or float16", (long long)i,
             hb_dtype_name(t->p_dtype));
    HB_CHECK(error, hb_dtype_is_io(t->g_dtype), HB_ERR_TYPE,
             "optimizer_step: g[%lld] is %s, expected float32, bfloat16 or float16", (long long)i,
             hb_dtype_name(t->g_dtype));
    HB_CHECK(error, t->step >= 1, HB_ERR_VALUE,
             "optimizer_step: step[%lld] is %lld, expected at least 1", (long long)i,
             (long long)t->step);
    if (t->n == 0) return HB_OK;
    HB_CHECK(error, t->state1 != NULL, HB_ERR_VALUE, "optimizer_step: state1[%lld] is missing",
             (long long)i);
    HB_CHECK(error, !has_second_state(optimizer) || t->state2 != NULL, HB_ERR_VALUE,
             "optimizer_step: state2[%lld] is missing", (long long)i);
    if (!t->state_is_8bit) return HB_OK;
    HB_CHECK(error, map1 != NULL && t->absmax1 != NULL, HB_ERR_VALUE,
             "optimizer_step: map1 and absmax1[%lld] are needed for 8-bit states", (long long)i);
    HB_CHECK(error, !has_second_state(optimizer) || (map2 != NULL && t->absmax2 != NULL),
             HB_ERR_VALUE, "optimizer_step: map2 and absmax2[%lld] are needed for 8-bit states",
             (long long)i);
    return HB_OK;
}

hb_status hb_optimizer_step(hb_context *context, const hb_device *device, hb_optimizer optimizer,
                            const hb_optim_tensor *tensors, int64_t count,
                            const hb_optim_settings *settings, const float *map1, const float *map2,
                            void *workspace, hb_error *error)
{
    HB_CHECK(error, (unsigned)optimizer < HB_OPTIMIZER_COUNT, HB_ERR_VALUE,
             "optimizer_step: optimizer is %d, expected 0 to %d", (int)optimizer,
             HB_OPTIMIZER_COUNT - 1);
    const bool limited = settings->max_unorm > 0.0;
    HB_CHECK(error, !limited || context->kernels.optim.norm[optimizer] != NULL, HB_ERR_VALUE,
             "optimizer_step: max_unorm is %g, this optimizer has no norm limit",
             settings->max_unorm);
    for (int64_t i = 0; i < count; i++)
        HB_TRY(check_tensor(error, optimizer, &tensors[i], i, map1, map2));
    if (count == 0) return HB_OK;
    if (device->type == HB_CUDA)
        return hb_optimizer_step_cuda(device, optimizer, tensors, count, settings, map1, map2,
                                      workspace, error);
    step_job job = {.kernels = &context->kernels,
                    .optimizer = optimizer,
                    .tensors = tensors,
                    .count = count,
                    .skip_zeros = settings->skip_zeros,
                    .map1 = map1,
                    .map2 = map2};
    if (map1 != NULL) {
        HB_TRY(hb_check_map8(error, "optimizer_step", map1));
        hb_search8_init(&job.search1, map1);
        while (job.first_positive < 256 && map1[job.first_positive] < 0.0f) job.first_positive++;
    }
    if (map2 != NULL) {
        HB_TRY(hb_check_map8(error, "optimizer_step", map2));
        hb_search8_init(&job.search2, map2);
    }
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; i++) pieces += hb_ceil_div(tensors[i].n, PIECE);
    hb_scratch scratch = {0};
    unsigned char *memory;
    const int64_t first_at =
        hb_scratch_reserve(&scratch, (count + 1) * (int64_t)sizeof *job.first_piece);
    const int64_t scalars_at = hb_scratch_reserve(&scratch, count * (int64_t)sizeof *job.scalars);
    const int64_t norms_at =
        hb_scratch_reserve(&scratch, limited ? pieces * (int64_t)sizeof *job.norms : 0);
    HB_TRY(hb_scratch_open(&scratch, context->scratch, NULL, 0, "optimizer_step", &memory, error));
    int64_t *first_piece = (int64_t *)(memory + first_at);
    job.scalars = (hb_optim_scalars *)(memory + scalars_at);
    first_piece[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        first_piece[i + 1] = first_piece[i] + hb_ceil_div(tensors[i].n, PIECE);
        job.scalars[i] = hb_optim_scalars_of(optimizer, settings, tensors[i].step);
    }
    job.first_piece = first_piece;
    if (limited) {
        job.norms = (hb_optim_squares *)(memory + norms_at);
        hb_parallel_for(context->pool, pieces, norm_pieces, &job);
        limit_norms(&job, settings);
    }
    hb_parallel_for(context->pool, pieces, limited ? step_pieces_back : step_pieces, &job);
    hb_scratch_close(&scratch);
    return HB_OK;
}
