// One step of an optimizer for a list of tensors, with float32 or 8-bit states: the bits of the
// CPU's. Formulas: core/kernels_optim.h; 8-bit states: core/ops_optim.c, arXiv:2110.02861.
//
// A warp takes a block of 256 elements, eight consecutive ones a lane, and goes on with the block
// `warps` further; the blocks of all tensors of the table are counted through, so that hundreds of
// small tensors are one launch. 8-bit states: a block of threads prepares both maps once
// (buckets8.cuh); codes become floats by a look-up, the new states stay in registers, are reduced
// to their largest magnitude by the warp, and become codes again.
//
// Floor: Adam with 8-bit states and bfloat16 parameters moves 10 bytes an element, at 4.3 TB/s on
// an H200 1.64 elements a clock and multiprocessor: 78 instructions each. Counted (sm_90): 103,
// slow paths of root and quotient included; these two, rounded as IEEE 754 says, are a third.
//
// Step and learning rate travel as arguments: a captured graph repeats the step that it was
// captured with. Capture anew (or update the graph's arguments) where they change.
#include "absmax.cuh"
#include "buckets8.cuh"
#include "kernels.cuh"
#include "optim.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / HB_LANES, EACH = 8, BLOCK = HB_OPTIM_BLOCKSIZE };

// Blocks of threads on a multiprocessor: 128, 80 or 64 registers a thread.
template <int OPTIMIZER> constexpr int share()
{
    return optim_states<OPTIMIZER>::SLOW ? 2 : optim_states<OPTIMIZER>::SECOND ? 3 : 4;
}
static_assert((int)BLOCK == (int)HB_LANES * (int)EACH, "a warp is a block");

// What a block of threads knows about the maps, in shared memory.
struct tables8 {
    float map1[256], map2[256], tree1[256], tree2[256];
    uint32_t flags[8];
    int32_t first_positive; // codes of map1 from here on are >= 0
    uint32_t buckets1[signed_buckets::WORDS];
};
struct tables8_second : tables8 {
    uint32_t buckets2[unsigned_buckets::WORDS];
};

struct ready8 { // the same for all threads
    bool fits1, fits2;
    int first_positive;
};

template <bool SECOND> HB_DEVICE ready8 prepare8(const optim_table &a, tables8 *shared)
{
    const int t = thread_index();
    ready8 ready = {};
    float *room = (float *)shared->buckets1; // not used yet
    search8_fill(a.map1, shared->tree1, room);
    if (SECOND) search8_fill(a.map2, shared->tree2, room);
    const float value = load(a.map1 + t);
    shared_store(shared->map1 + t, value);
    if (SECOND) shared_store(shared->map2 + t, load(a.map2 + t));
    if (t == 0) shared_store(&shared->first_positive, 0);
    block_sync();
    if (value < 0.0f && (t == 255 || !(shared_load(shared->map1 + t + 1) < 0.0f)))
        shared_store(&shared->first_positive, t + 1);
    ready.fits1 = signed_buckets_fill(shared->map1, shared->tree1, shared->buckets1, shared->flags);
    if (SECOND)
        ready.fits2 = unsigned_buckets_fill(shared->map2, shared->tree2,
                                            ((tables8_second *)shared)->buckets2, shared->flags);
    ready.first_positive = shared_load(&shared->first_positive);
    return ready;
}

// The lane's elements of a block: [i, i + count) of a tensor; WIDE: all eight, and the tensor
// aligned for wide accesses.
struct place {
    int64_t i;
    int count;
};

template <int IO, bool WIDE>
HB_DEVICE void take8_as(const void *from, const place &at, float *value)
{
    if constexpr (WIDE) {
        load8<IO>(from, at.i, value);
    } else {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            value[j] = j < at.count ? load_own(from, at.i + j, IO) : 0.0f;
    }
}

template <bool WIDE>
HB_DEVICE void take8(const void *from, int dtype, const place &at, float *value)
{
    if (dtype == HB_F32)
        take8_as<HB_F32, WIDE>(from, at, value);
    else if (dtype == HB_BF16)
        take8_as<HB_BF16, WIDE>(from, at, value);
    else
        take8_as<HB_F16, WIDE>(from, at, value);
}

template <int IO, bool WIDE> HB_DEVICE void put8_as(void *to, const place &at, const float *value)
{
    if constexpr (WIDE) {
        store8<IO>(to, at.i, value);
    } else {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (j < at.count) store_float<IO>(to, at.i + j, value[j]);
    }
}

template <bool WIDE> HB_DEVICE void put8(void *to, int dtype, const place &at, const float *value)
{
    if (dtype == HB_F32)
        put8_as<HB_F32, WIDE>(to, at, value);
    else if (dtype == HB_BF16)
        put8_as<HB_BF16, WIDE>(to, at, value);
    else
        put8_as<HB_F16, WIDE>(to, at, value);
}

template <bool WIDE> HB_DEVICE uint2 take_codes(const uint8_t *codes, const place &at)
{
    if constexpr (WIDE) {
        return load_once((const uint2 *)(codes + at.i));
    } else {
        uint2 word = {0, 0};
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const uint32_t code = j < at.count ? load_once(codes + at.i + j) : 0;
            (j < 4 ? word.x : word.y) |= code << (8 * (j % 4));
        }
        return word;
    }
}

template <bool WIDE> HB_DEVICE void put_codes(uint8_t *codes, const place &at, uint2 word)
{
    if constexpr (WIDE) {
        store_once((uint2 *)(codes + at.i), word);
    } else {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (j < at.count)
                store(codes + at.i + j, (uint8_t)((j < 4 ? word.x : word.y) >> (8 * (j % 4))));
    }
}

HB_DEVICE void decode8(const float *map, uint2 codes, float scale, float *value)
{
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const uint32_t code = merge_bytes(j < 4 ? codes.x : codes.y, 0, 0x4440 + j % 4);
        value[j] = mul_rn(shared_load(map + code), scale);
    }
}

// Puts the first element behind the last.
HB_DEVICE void turn(float *x)
{
    const float first = x[0];
#pragma unroll
    for (int k = 0; k + 1 < EACH; k++) x[k] = x[k + 1];
    x[EACH - 1] = first;
}

// Codes of x by the search tree, for what the buckets do not take. KEEP: a code whose value has
// another sign than x moves by one.
template <bool KEEP>
HB_DEVICE uint2 search_codes(const float *tree, const float *x, float inverse, int first_positive)
{
    uint2 word = {0, 0};
    float turned[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) turned[j] = x[j];
#pragma unroll 1
    for (int j = 0; j < EACH; j++) { // one copy of the code: the elements come past it
        const float value = turned[0];
        turn(turned);
        int code = (int)search8(tree, mul_rn(value, inverse));
        if (KEEP) {
            if (value > 0.0f && code < first_positive)
                code++;
            else if (value < 0.0f && code >= first_positive)
                code--;
        }
        word.x = word.x >> 8 | word.y << 24;
        word.y = word.y >> 8 | (uint32_t)code << 24;
    }
    return word;
}

// Stores a state of a block as codes and absmax: FIRST with map1, else map2. The whole warp calls;
// elements behind the tensor's end are 0.
template <bool FIRST, bool WIDE>
HB_DEVICE void encode_state(tables8 *shared, const ready8 &ready, const float *x, uint8_t *codes,
                            float *absmax, const place &at)
{
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; j++) largest = max_magnitude(largest, x[j]);
    const uint32_t bits = warp_max(float_bits(largest));
    const float scale = bits_float(bits > 0x7f800000u ? NAN_BITS : bits);
    if (lane_index() == 0) store(absmax, scale);
    const float inverse = inverse_scale(scale);
    uint2 word;
    if ((FIRST ? ready.fits1 : ready.fits2) && buckets_take(scale)) {
        uint32_t sum[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++)
            sum[j] = FIRST ? signed_code(shared->buckets1, x[j], inverse)
                           : unsigned_sum(((tables8_second *)shared)->buckets2, x[j], inverse);
        enum { PLACE = FIRST ? 0 : unsigned_buckets::SHIFT / 8 };
        word = {join_bytes<PLACE>(sum), join_bytes<PLACE>(sum + 4)};
    } else {
        word = search_codes<FIRST>(FIRST ? shared->tree1 : shared->tree2, x, inverse,
                                   ready.first_positive);
    }
    if (WIDE || at.count > 0) put_codes<WIDE>(codes, at, word);
}

HB_DEVICE bool finite(float x)
{
    return (float_bits(x) & 0x7f800000u) != 0x7f800000u;
}

// A warp's step of block `block` of a tensor.
template <int OPTIMIZER, bool EIGHT, bool WIDE>
HB_DEVICE void step_block(const optim_table &a, const optim_entry &e, int64_t block,
                          tables8 *shared, const ready8 &ready)
{
    typedef optim_states<OPTIMIZER> has;
    const int64_t blocks = (e.n + BLOCK - 1) / BLOCK; // where AdEMAMix's second row begins
    place at = {block * BLOCK + lane_index() * EACH, EACH};
    if (!WIDE) {
        const int64_t left = e.n - at.i;
        at.count = left < 0 ? 0 : left < EACH ? (int)left : EACH;
    }
    const place slow_at = {at.i + e.n, at.count};

    float p[EACH], g[EACH], m[EACH], slow[EACH] = {}, v[EACH] = {};
    take8<WIDE>(e.g, e.g_dtype, at, g);
    take8<WIDE>(e.p, e.p_dtype, at, p);
    if (EIGHT) {
        const uint2 codes1 = take_codes<WIDE>((const uint8_t *)e.state1, at);
        const float scale1 = load_once(e.absmax1 + block);
        if (has::SLOW)
            decode8(shared->map1, take_codes<WIDE>((const uint8_t *)e.state1, slow_at),
                    load_once(e.absmax1 + blocks + block), slow);
        if (has::SECOND)
            decode8(shared->map2, take_codes<WIDE>((const uint8_t *)e.state2, at),
                    load_once(e.absmax2 + block), v);
        decode8(shared->map1, codes1, scale1, m);
    } else {
        take8_as<HB_F32, WIDE>(e.state1, at, m);
        if (has::SLOW) take8_as<HB_F32, WIDE>(e.state1, slow_at, slow);
        if (has::SECOND) take8_as<HB_F32, WIDE>(e.state2, at, v);
    }

    const optim_step now = step_of<OPTIMIZER>(a, e);
    bool special = a.skip_zeros; // an element may have to stay as it is
    if (EIGHT) {
        float sum = 0.0f; // NaN as soon as a gradient is not finite
#pragma unroll
        for (int j = 0; j < EACH; j++) sum = fma_rn(g[j], 0.0f, sum);
        special = special || !(sum == 0.0f);
    }
    if (!special) {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            step_element<OPTIMIZER>(a.s, now, g[j], p + j, m + j, slow + j, v + j);
    } else {
#pragma unroll 1
        for (int j = 0; j < EACH; j++) { // rare: one copy of the code, the elements come past it
            const bool reset = EIGHT && !finite(g[0]);
            if (!reset && !(a.skip_zeros && g[0] == 0.0f))
                step_element<OPTIMIZER>(a.s, now, g[0], p, m, slow, v);
            if (reset) m[0] = slow[0] = v[0] = 0.0f;
            turn(g), turn(p), turn(m), turn(slow), turn(v);
        }
    }
    if (WIDE || at.count > 0) put8<WIDE>(e.p, e.p_dtype, at, p);
    if (EIGHT) {
        if (!WIDE) {
#pragma unroll
            for (int j = 0; j < EACH; j++) // of what the tensor does not have, 0 / 0 among it
                if (j >= at.count) m[j] = slow[j] = v[j] = 0.0f;
        }
        encode_state<true, WIDE>(shared, ready, m, (uint8_t *)e.state1, e.absmax1 + block, at);
        if (has::SLOW)
            encode_state<true, WIDE>(shared, ready, slow, (uint8_t *)e.state1,
                                     e.absmax1 + blocks + block, slow_at);
        if (has::SECOND)
            encode_state<false, WIDE>(shared, ready, v, (uint8_t *)e.state2, e.absmax2 + block, at);
    } else if (WIDE || at.count > 0) {
        put8_as<HB_F32, WIDE>(e.state1, at, m);
        if (has::SLOW) put8_as<HB_F32, WIDE>(e.state1, slow_at, slow);
        if (has::SECOND) put8_as<HB_F32, WIDE>(e.state2, at, v);
    }
}

template <int OPTIMIZER, bool EIGHT>
HB_KERNEL_RESIDENT(THREADS, share<OPTIMIZER>())
optim_step_kernel(HB_ARGS optim_table a)
{
    tables8 *shared = (tables8 *)shared_memory();
    ready8 ready = {};
    if (EIGHT) ready = prepare8<optim_states<OPTIMIZER>::SECOND>(a, shared);
    const int64_t units = a.first_unit[a.count];
    int tensor = 0;
    for (int64_t unit = block_index() * WARPS + warp_index(); unit < units; unit += a.warps) {
        tensor = tensor_of(a, tensor, unit);
        const optim_entry &e = a.entry[tensor];
        const int64_t block = unit - a.first_unit[tensor];
        if (e.aligned && (block + 1) * BLOCK <= e.n)
            step_block<OPTIMIZER, EIGHT, true>(a, e, block, shared, ready);
        else
            step_block<OPTIMIZER, EIGHT, false>(a, e, block, shared, ready);
    }
}

template <int OPTIMIZER> int launch(const hb_cuda_queue *queue, bool eight, optim_table &a)
{
    int64_t blocks = hb_ceil_div(a.first_unit[a.count], (int64_t)WARPS);
    const int64_t most =
        (int64_t)hb_cuda_device_multiprocessors(queue->device) * share<OPTIMIZER>();
    if (most > 0 && blocks > most) blocks = most;
    a.warps = blocks * WARPS;
    const int bytes = optim_states<OPTIMIZER>::SECOND ? sizeof(tables8_second) : sizeof(tables8);
    if (eight)
        return HB_LAUNCH((optim_step_kernel<OPTIMIZER, true>), blocks, THREADS, bytes,
                         queue->stream, a);
    return HB_LAUNCH((optim_step_kernel<OPTIMIZER, false>), blocks, THREADS, 0, queue->stream, a);
}

} // namespace

int hb_cuda_launch_optim_step(const hb_cuda_queue *queue, int optimizer, bool eight,
                              optim_table &table)
{
    switch (optimizer) {
    case HB_ADAM: return launch<HB_ADAM>(queue, eight, table);
    case HB_ADEMAMIX: return launch<HB_ADEMAMIX>(queue, eight, table);
    case HB_MOMENTUM: return launch<HB_MOMENTUM>(queue, eight, table);
    case HB_LION: return launch<HB_LION>(queue, eight, table);
    case HB_RMSPROP: return launch<HB_RMSPROP>(queue, eight, table);
    default: return launch<HB_ADAGRAD>(queue, eight, table);
    }
}
