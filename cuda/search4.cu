// NF4 and FP4 quantize with searched scales (HB_SCALES_SEARCH), the bits of the CPU's: each block
// takes the one of 19 scales absmax * f with the least squared error (core/ops_4bit.c), summed in
// the order that core/kernels_codec.h fixes.
//
//   v = x * (1 / s), q = value of v's code, d = x - q * s, e = d * d        each rounded
//
// The order has 16 partial sums, element i to sum i % 16: half a warp is a block, a lane is a sum.
// A lane carries the sums of all candidates through one pass over its elements, nineteen chains
// that do not wait for each other; four exchanges fold each. Then the block is read a third time
// (from the cache) and encoded, two neighbouring lanes a byte.
//
// Floor: arithmetic, some 19 * 15 instructions a weight. It is chosen where a weight is quantized
// once and used for long.
#include "absmax.cuh"
#include "codebooks.cuh"
#include "kernels.cuh"

#include "core/kernels_codec.h"

namespace
{

enum { THREADS = 256, SUMS = 16, BLOCKS = THREADS / SUMS };

HB_CONSTANT float factors[HB_SEARCH_COUNT] = HB_SEARCH_FACTORS;

struct search4 {
    encoder4 encoder;
    float value[2 * BUCKETS]; // of each entry of encoder.code
};

// The value that v is rounded to.
HB_DEVICE float nearest(const search4 *shared, float v)
{
    const uint32_t offset = encoder4_offset(&shared->encoder, v);
    return shared_load((const float *)((const unsigned char *)shared->value + offset));
}

HB_DEVICE bool candidate_counts(float scale)
{
    const uint32_t bits = float_bits(scale); // positive, or NaN
    return bits != 0 && bits < 0x7f800000u;
}

template <int IO> HB_KERNEL(THREADS) search4_kernel(HB_ARGS hb_cuda_quantize4 a)
{
    search4 *shared = (search4 *)shared_memory();
    encoder4_fill(&shared->encoder, a.format);
    if (thread_index() < 2 * BUCKETS) {
        const uint32_t code = encoders[a.format].code[thread_index()];
        shared_store(&shared->value[thread_index()], codebooks[a.format].value[code]);
    }
    block_sync();

    const int lane = lane_index() % SUMS;
    const int64_t block = block_index() * BLOCKS + thread_index() / SUMS;
    const int64_t begin = block * a.blocksize;
    const int64_t end = a.n - begin < a.blocksize ? a.n : begin + a.blocksize;

    uint32_t largest = 0;
    for (int64_t i = begin + lane; i < end; i += SUMS) {
        const float x = load_float<IO>(a.x, i);
        largest = larger_magnitude<1>(&x, largest);
    }
    float absmax = absmax_of_lanes(largest, SUMS);
    const bool search = candidate_counts(absmax);
    float scale[HB_SEARCH_COUNT], sum[HB_SEARCH_COUNT];
#pragma unroll
    for (int c = 0; c < HB_SEARCH_COUNT; c++) {
        scale[c] = mul_rn(absmax, factors[c]);
        sum[c] = 0.0f;
    }
    if (search) {
        float inverse[HB_SEARCH_COUNT];
#pragma unroll
        for (int c = 0; c < HB_SEARCH_COUNT; c++) inverse[c] = div_rn(1.0f, scale[c]);
        for (int64_t i = begin + lane; i < end; i += SUMS) {
            const float x = load_float<IO>(a.x, i);
#pragma unroll
            for (int c = 0; c < HB_SEARCH_COUNT; c++) {
                const float q = nearest(shared, mul_rn(x, inverse[c]));
                const float d = add_rn(x, -mul_rn(q, scale[c]));
                sum[c] = add_rn(sum[c], mul_rn(d, d));
            }
        }
    }
    // Every lane adds its partner: an addition does not mind the order of its operands, so that all
    // lanes have the sum that the CPU finds in its first.
    float least = 0.0f, best = absmax;
#pragma unroll
    for (int c = 0; c < HB_SEARCH_COUNT; c++) {
#pragma unroll
        for (int half = SUMS / 2; half > 0; half /= 2)
            sum[c] = add_rn(sum[c], bits_float(shuffle_xor(float_bits(sum[c]), half)));
        if (c == 0 || (candidate_counts(scale[c]) && sum[c] < least)) {
            least = sum[c];
            best = scale[c];
        }
    }
    if (search) absmax = best;
    if (begin < a.n && lane == 0) store(a.absmax + block, absmax);

    const float inverse = inverse_scale(absmax);
    for (int64_t i = lane; i < a.blocksize; i += SUMS) {
        const float v = begin + i < a.n ? mul_rn(load_float<IO>(a.x, begin + i), inverse) : 0.0f;
        const uint32_t code = encode4(&shared->encoder, v);
        const uint32_t next = shuffle_xor(code, 1); // the odd element's, in an even lane
        if (lane % 2 == 0 && begin + i < a.n)
            store(a.packed + (begin + i) / 2, (uint8_t)(code << 4 | next));
    }
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_quantize4 &a)
{
    const int64_t blocks = hb_ceil_div(hb_ceil_div(a.n, a.blocksize), (int64_t)BLOCKS);
    return HB_LAUNCH(search4_kernel<IO>, blocks, THREADS, sizeof(search4), queue->stream, a);
}

} // namespace

int hb_cuda_launch_search4(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args)
{
    switch (args->x_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
