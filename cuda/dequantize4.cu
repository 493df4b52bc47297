// NF4 and FP4 dequantize, nested scales fused: out[i] = value[code of start + i] * absmax, rounded
// once to out's dtype. The bits of the CPU's kernels.
//
//   absmax[b] = map[q[b]] * absmax2[b / nested_blocksize] + offset        (two roundings, as there)
//
// A thread takes 16 weights that share one scale: one 8-byte load of codes, two or four 16-byte
// stores. The value table lies in shared memory: 16 words, 16 banks, so any mix of codes is one
// access. Where start or the pointers are not aligned so, the same kernel works element by element.
//
// Floor at block size 64, bfloat16 out: 2.56 bytes of traffic a weight.
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, EACH = 16, TABLE_BYTES = 16 * 4 };

template <int IO, bool ALIGNED> HB_KERNEL(THREADS) dequantize4_kernel(HB_ARGS hb_cuda_dequantize4 a)
{
    float *table = (float *)shared_memory(), *map = table + 16;
    const int t = thread_index();
    codebook_fill(table, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    const int64_t i = (block_index() * THREADS + t) * EACH;
    if (i >= a.n) return;
    const float offset = scale_offset(a.scales);

    const int64_t element = a.start + i;
    float value[EACH];
    if (ALIGNED && i + EACH <= a.n) {
        const float scale = scale_of(a.scales, map, offset, block_of(element, a.blocksize));
        decode16(table, load_once((const uint2 *)(a.packed + element / 2)), scale, value);
        store8<IO>(a.out, i, value);
        store8<IO>(a.out, i + 8, value + 8);
        return;
    }
    for (int j = 0; j < EACH && i + j < a.n; j++) {
        const float scale = scale_of(a.scales, map, offset, block_of(element + j, a.blocksize));
        uint32_t byte = load(a.packed + (element + j) / 2);
        uint32_t code = (element + j) % 2 ? byte & 15 : byte >> 4;
        store_float<IO>(a.out, i + j, mul_rn(shared_load(table + code), scale));
    }
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_dequantize4 &a)
{
    const int64_t blocks = hb_ceil_div(a.n, (int64_t)THREADS * EACH);
    const int shared_bytes = TABLE_BYTES + scale_map_bytes(a.scales);
    const bool aligned =
        a.start % EACH == 0 && ((uintptr_t)a.packed & 7) == 0 && ((uintptr_t)a.out & 15) == 0;
    if (aligned)
        return HB_LAUNCH((dequantize4_kernel<IO, true>), blocks, THREADS, shared_bytes,
                         queue->stream, a);
    return HB_LAUNCH((dequantize4_kernel<IO, false>), blocks, THREADS, shared_bytes, queue->stream,
                     a);
}

} // namespace

int hb_cuda_launch_dequantize4(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args)
{
    if (args->n == 0) return 0;
    if (args->columns > 0) return hb_cuda_launch_transpose4(queue, args);
    switch (args->out_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
