// NF4 and FP4 quantize: x [n] -> absmax per block and packed codes, the bits of the CPU's kernels.
//
//   v = x * inverse(absmax[b]), both rounded;  code = code_of_rank[#{t in threshold: v > t}]
//
// A lane takes 8 consecutive elements (two or one 16-byte loads, one 4-byte store of codes), so a
// block of up to 256 elements is reduced by 2 to 5 shuffles inside its warp. Longer blocks belong
// to one warp, which reads them twice; the second time from the cache.
//
// Floor at 64 elements a block, bfloat16: 2.56 bytes of traffic a weight. Source: QLoRA
// (arXiv:2305.14314) §3; the order of operations is that of docs/formats.md.
#include "absmax.cuh"
#include "codebooks.cuh"
#include "kernels.cuh"

namespace
{

enum { THREADS = 256, EACH = 8, WARP_ELEMENTS = HB_LANES * EACH };

// The 8 elements from i on, 0 for those at and behind n. ALIGNED: x is 16-byte aligned.
template <int IO, bool ALIGNED>
HB_DEVICE void take8(const hb_cuda_quantize4 &a, int64_t i, float *value)
{
    if (ALIGNED && i + EACH <= a.n) {
        load8<IO>(a.x, i, value);
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) value[j] = i + j < a.n ? load_float<IO>(a.x, i + j) : 0.0f;
}

template <bool ALIGNED>
HB_DEVICE void put8(const hb_cuda_quantize4 &a, const encoder4 *encoder, uint32_t nan_code,
                    int64_t i, const float *value, float inverse)
{
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        float v = i + j < a.n ? mul_rn(value[j], inverse) : 0.0f;
        // Element 0 goes to bits 4..7, element 1 to bits 0..3, element 2 to bits 12..15, ...
        word |= encode4(encoder, nan_code, v) << (8 * (j / 2) + (j % 2 ? 0 : 4));
    }
    if (ALIGNED && i + EACH <= a.n) {
        store_once((uint32_t *)(a.packed + i / 2), word);
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j += 2)
        if (i + j < a.n) store(a.packed + (i + j) / 2, (uint8_t)(word >> (4 * j)));
}

// LONG: the block has `chunks` > 1 times 256 elements; else it is a part of 256, or all of them.
template <int IO, bool ALIGNED, bool LONG>
HB_KERNEL(THREADS)
quantize4_kernel(HB_ARGS hb_cuda_quantize4 a)
{
    encoder4 *encoder = (encoder4 *)shared_memory();
    encoder4_fill(encoder, a.format);
    block_sync();
    const uint32_t nan_code = codebooks[a.format].nan_code;
    const int64_t chunks = LONG ? a.blocksize / WARP_ELEMENTS : 1;
    const int64_t warp = block_index() * (THREADS / HB_LANES) + warp_index();
    const int64_t first = warp * WARP_ELEMENTS * chunks + lane_index() * EACH;

    float value[EACH];
    uint32_t largest = 0;
    for (int64_t c = 0; c < chunks; c++) {
        take8<IO, ALIGNED>(a, first + c * WARP_ELEMENTS, value);
        largest = larger_magnitude<EACH>(value, largest);
    }
    const int lanes = LONG ? HB_LANES : (int)a.blocksize / EACH; // that share a block
    const float absmax = absmax_of_lanes(largest, lanes);
    if (first < a.n && lane_index() % lanes == 0) store(a.absmax + first / a.blocksize, absmax);

    const float inverse = inverse_scale(absmax);
    for (int64_t c = 0; c < chunks; c++) {
        if (LONG) take8<IO, ALIGNED>(a, first + c * WARP_ELEMENTS, value);
        put8<ALIGNED>(a, encoder, nan_code, first + c * WARP_ELEMENTS, value, inverse);
    }
}

template <int IO, bool ALIGNED> int launch(const hb_cuda_queue *queue, const hb_cuda_quantize4 &a)
{
    const bool is_long = a.blocksize > WARP_ELEMENTS;
    const int64_t warp_elements = is_long ? a.blocksize : (int64_t)WARP_ELEMENTS;
    const int64_t blocks = hb_ceil_div(a.n, warp_elements * (THREADS / HB_LANES));
    if (is_long)
        return HB_LAUNCH((quantize4_kernel<IO, ALIGNED, true>), blocks, THREADS, sizeof(encoder4),
                         queue->stream, a);
    return HB_LAUNCH((quantize4_kernel<IO, ALIGNED, false>), blocks, THREADS, sizeof(encoder4),
                     queue->stream, a);
}

template <int IO> int launch_io(const hb_cuda_queue *queue, const hb_cuda_quantize4 &a)
{
    const bool aligned = ((uintptr_t)a.x & 15) == 0 && ((uintptr_t)a.packed & 3) == 0;
    return aligned ? launch<IO, true>(queue, a) : launch<IO, false>(queue, a);
}

} // namespace

int hb_cuda_launch_quantize4(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args)
{
    if (args->n == 0) return 0;
    if (args->search != 0) return hb_cuda_launch_search4(queue, args);
    switch (args->x_dtype) {
    case HB_F32: return launch_io<HB_F32>(queue, *args);
    case HB_BF16: return launch_io<HB_BF16>(queue, *args);
    default: return launch_io<HB_F16>(queue, *args);
    }
}
