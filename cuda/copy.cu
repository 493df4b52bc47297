// Copies between strided arrays: what makes a view contiguous, or writes a result into one.
//
//   target[i] = source[i] for every index i of a shape of up to eight dimensions
//
// The host first makes the shape simple: dimensions of length 1 go, the target is walked upwards
// (the signs of a dimension's strides change together), dimensions are put in the order of the
// target's strides, and neighbours that continue each other become one. A contiguous inner run is
// moved in units of up to 16 bytes, as wide as all addresses and lengths allow. What is left is a
// gather: neighbouring threads write neighbouring units, four each with the loads in front.
//
// Floor: two times the bytes. An index costs a multiplication by a reciprocal and a shift for each
// dimension but one.
#include "kernels.cuh"

#include "dev.cuh"

namespace
{

enum { THREADS = 256, UNITS = 4, AXES = HB_CUDA_MAX_NDIM };

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31: (high half of n * multiplier, plus n) >> shift, with
// multiplier = ceil(2^(32 + shift) / d) - 2^32 and 2^shift >= d (Granlund and Montgomery 1994).
struct divider {
    uint32_t multiplier, shift;
};

divider divider_of(int64_t d)
{
    uint32_t shift = 0;
    while ((int64_t)1 << shift < d) shift++;
    const uint64_t excess = ((uint64_t)1 << shift) - (uint64_t)d; // < 2^30: the product fits
    return {(uint32_t)(((excess << 32) + (uint64_t)d - 1) / (uint64_t)d), shift};
}

struct axis {
    int64_t length, source, target; // steps in bytes
};

struct plan {
    const unsigned char *source;
    unsigned char *target;
    int64_t units;
    int32_t ndim; // at least 1; axis[0] is the outermost
    axis axes[AXES];
    divider divide[AXES];
};

// NARROW: fewer than 2^31 units.
template <typename T, bool NARROW> HB_KERNEL(THREADS) copy_kernel(HB_ARGS plan p)
{
    const int64_t first = block_index() * (THREADS * UNITS) + thread_index();
    T value[UNITS];
    int64_t target[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int64_t rest = first + u * THREADS;
        if (rest >= p.units) continue;
        int64_t source = 0;
        target[u] = 0;
        for (int k = p.ndim - 1; k > 0; k--) {
            int64_t quotient;
            if (NARROW) {
                const uint32_t n = (uint32_t)rest;
                quotient = (mul_high(n, p.divide[k].multiplier) + n) >> p.divide[k].shift;
            } else {
                quotient = rest / p.axes[k].length;
            }
            const int64_t index = rest - quotient * p.axes[k].length;
            source += index * p.axes[k].source;
            target[u] += index * p.axes[k].target;
            rest = quotient;
        }
        source += rest * p.axes[0].source;
        target[u] += rest * p.axes[0].target;
        value[u] = load_once((const T *)(p.source + source));
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        if (first + u * THREADS < p.units) store((T *)(p.target + target[u]), value[u]);
}

template <typename T> int launch(const hb_cuda_queue *queue, const plan &p)
{
    const int64_t blocks = hb_ceil_div(p.units, (int64_t)THREADS * UNITS);
    if (p.units <= INT32_MAX)
        return HB_LAUNCH((copy_kernel<T, true>), blocks, THREADS, 0, queue->stream, p);
    return HB_LAUNCH((copy_kernel<T, false>), blocks, THREADS, 0, queue->stream, p);
}

// Starts the copy in units of `width` bytes.
int launch_units(const hb_cuda_queue *queue, plan &p, int width)
{
    p.units = 1;
    for (int k = 0; k < p.ndim; k++) {
        p.units *= p.axes[k].length;
        if (p.axes[k].length <= INT32_MAX) p.divide[k] = divider_of(p.axes[k].length);
    }
    switch (width) {
    case 1: return launch<uint8_t>(queue, p);
    case 2: return launch<uint16_t>(queue, p);
    case 4: return launch<uint32_t>(queue, p);
    case 8: return launch<uint2>(queue, p);
    default: return launch<uint4>(queue, p);
    }
}

// Drops, turns, orders and joins dimensions as said above.
void simplify(const hb_cuda_copy &a, plan *p)
{
    p->source = (const unsigned char *)a.source;
    p->target = (unsigned char *)a.target;
    p->ndim = 0;
    for (int d = 0; d < a.ndim; d++) {
        axis x = {a.shape[d], a.source_stride[d] * a.item_bytes, a.target_stride[d] * a.item_bytes};
        if (x.length == 1) continue;
        if (x.target < 0) {
            p->source += (x.length - 1) * x.source;
            p->target += (x.length - 1) * x.target;
            x.source = -x.source, x.target = -x.target;
        }
        int k = p->ndim++;
        for (; k > 0 && p->axes[k - 1].target < x.target; k--) p->axes[k] = p->axes[k - 1];
        p->axes[k] = x;
    }
    int last = 0;
    for (int k = 1; k < p->ndim; k++) {
        const axis x = p->axes[k];
        axis *outer = &p->axes[last];
        if (outer->source == x.length * x.source && outer->target == x.length * x.target)
            *outer = {outer->length * x.length, x.source, x.target};
        else
            p->axes[++last] = x;
    }
    if (p->ndim == 0) p->axes[0] = {1, a.item_bytes, a.item_bytes};
    p->ndim = last + 1;
}

// The widest unit, up to 16 bytes, in which the inner run can be moved.
int widen(plan *p, int item)
{
    axis *inner = &p->axes[p->ndim - 1];
    if (inner->source != item || inner->target != item) return item;
    uint64_t all = (uint64_t)(uintptr_t)p->source | (uint64_t)(uintptr_t)p->target |
                   (uint64_t)inner->length * (uint64_t)item;
    for (int k = 0; k + 1 < p->ndim; k++)
        all |= (uint64_t)p->axes[k].source | (uint64_t)p->axes[k].target;
    int width = 16;
    while (width > item && all % (uint64_t)width != 0) width /= 2;
    *inner = {inner->length * item / width, width, width};
    return width;
}

// One contiguous run, both ends of which may be anywhere: up to 16-byte aligned addresses, from
// there on in wide units, and the rest.
int copy_run(const hb_cuda_queue *queue, const plan &whole, int item)
{
    const int64_t bytes = whole.axes[0].length * item;
    int64_t head = -(int64_t)((uintptr_t)whole.target & 15) & 15;
    if ((((uintptr_t)whole.source ^ (uintptr_t)whole.target) & 15) != 0 || head > bytes) head = 0;
    const int64_t body = (bytes - head) / 16 * 16;
    const int64_t ends[3] = {head, head + body, bytes};
    int64_t begin = 0;
    for (int part = 0; part < 3; part++) {
        const int64_t length = ends[part] - begin;
        if (length == 0) continue;
        plan p = whole;
        p.source += begin, p.target += begin;
        p.axes[0].length = length / item;
        const int width = widen(&p, item);
        const int status = launch_units(queue, p, width);
        if (status != 0) return status;
        begin = ends[part];
    }
    return 0;
}

} // namespace

int hb_cuda_launch_copy(const hb_cuda_queue *queue, const hb_cuda_copy *args)
{
    for (int d = 0; d < args->ndim; d++)
        if (args->shape[d] == 0) return 0;
    plan p;
    simplify(*args, &p);
    if (p.ndim == 1 && p.axes[0].source == args->item_bytes && p.axes[0].target == args->item_bytes)
        return copy_run(queue, p, args->item_bytes);
    const int width = widen(&p, args->item_bytes);
    return launch_units(queue, p, width);
}
