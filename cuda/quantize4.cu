// NF4 and FP4 quantize: x [n] -> absmax per block and packed codes, the bits of the CPU's kernels.
//
//   v = x * inverse(absmax[b]), both rounded;  code = code_of_rank[#{t in threshold: v > t}]
//
// A lane takes 16 consecutive elements (2 to 4 loads of 16 bytes, one store of 8), so a block of up
// to 512 elements is reduced by 1 to 5 shuffles inside its warp. Longer blocks belong to one warp,
// which reads them twice; the second time from the cache.
//
// Floor at 64 elements a block, bfloat16: 2.56 bytes of traffic a weight, for which an H200 has
// time for 19.9 instructions. Eleven of them encode (codebooks.cuh); tests/cuda/gates.toml has the
// sum. Source: QLoRA (arXiv:2305.14314) §3; the order of operations is that of docs/formats.md.
#include "absmax.cuh"
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, EACH = 16, WARP_ELEMENTS = HB_LANES * EACH };

// The EACH elements from i on, 0 for those at and behind n. ALIGNED: x is 16-byte aligned.
template <int IO, bool ALIGNED>
HB_DEVICE void take(const hb_cuda_quantize4 &a, int64_t i, float *value)
{
    if (ALIGNED && i + EACH <= a.n) {
        load8<IO>(a.x, i, value);
        load8<IO>(a.x, i + 8, value + 8);
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) value[j] = i + j < a.n ? load_float<IO>(a.x, i + j) : 0.0f;
}

template <bool ALIGNED>
HB_DEVICE void put(const hb_cuda_quantize4 &a, const encoder4 *encoder, int64_t i,
                   const float *value, float inverse)
{
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float v = mul_rn(value[j], inverse);
        // Element 0 goes to bits 4..7, element 1 to bits 0..3, element 2 to bits 12..15, ...
        word[j / 8] |= encode4(encoder, v) << (8 * (j % 8 / 2) + (j % 2 ? 0 : 4));
    }
    if (ALIGNED && i + EACH <= a.n) {
        store_once((uint2 *)(a.packed + i / 2), uint2{word[0], word[1]});
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j += 2) {
        uint32_t byte = word[j / 8] >> (4 * (j % 8)) & 255;
        if (i + j + 1 == a.n) byte = (byte & 0xf0) | encode4(encoder, 0.0f); // nothing behind it
        if (i + j < a.n) store(a.packed + (i + j) / 2, (uint8_t)byte);
    }
}

// LONG: the block has `chunks` > 1 times 512 elements; else it is a part of 512, or all of them.
template <int IO, bool ALIGNED, bool LONG>
HB_KERNEL(THREADS)
quantize4_kernel(HB_ARGS hb_cuda_quantize4 a)
{
    encoder4 *encoder = (encoder4 *)shared_memory();
    encoder4_fill(encoder, a.format);
    block_sync();
    const int64_t chunks = LONG ? a.blocksize / WARP_ELEMENTS : 1;
    const int64_t warp = block_index() * (THREADS / HB_LANES) + warp_index();
    const int64_t first = warp * WARP_ELEMENTS * chunks + lane_index() * EACH;

    float value[EACH];
    uint32_t largest = 0;
    for (int64_t c = 0; c < chunks; c++) {
        take<IO, ALIGNED>(a, first + c * WARP_ELEMENTS, value);
        largest = larger_magnitude<EACH>(value, largest);
    }
    const int lanes = LONG ? HB_LANES : (int)a.blocksize / EACH; // that share a block
    const float absmax = absmax_of_lanes(largest, lanes);
    if (first < a.n && (lane_index() & (lanes - 1)) == 0)
        store(a.absmax + block_of(first, a.blocksize), absmax);

    const float inverse = inverse_scale(absmax);
    for (int64_t c = 0; c < chunks; c++) {
        if (LONG) take<IO, ALIGNED>(a, first + c * WARP_ELEMENTS, value);
        put<ALIGNED>(a, encoder, first + c * WARP_ELEMENTS, value, inverse);
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
    const bool aligned = ((uintptr_t)a.x & 15) == 0 && ((uintptr_t)a.packed & 7) == 0;
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
