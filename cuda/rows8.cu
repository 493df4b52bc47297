// Row-wise int8 (LLM.int8()): quantize and dequantize, the bits of the CPU's kernels.
//
//   scale[r] = max |x[r, :]| below threshold;  code = rint(x * (127 / scale));  x' = (code * scale)
//   * (1/127)
//
// Quantize: a warp, or for long rows a block, takes a row, eight elements a thread and step. What
// fits stays in registers between the maximum and the codes, 8192 elements with 32 registers a
// thread; of longer rows the rest is read again, from the cache. Outliers mark their column on the
// way (every writer writes 1). With more than one row a second kernel sets the marked
// columns to 0: its blocks read the marks, which are few bytes, and touch codes only where one is
// set. So x is read once and nothing waits for the host. With one row its own outliers are all
// there are, and the codes are 0 already.
//
// Source: arXiv:2208.07339. Floor: 3 bytes of traffic an element of bfloat16 both ways; on an H200
// that leaves 23 instructions of a lane an element.
#include "kernels.cuh"
#include "rows8.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / HB_LANES, KEPT = 4, ZERO_ROWS = 16 };

template <int IO, int EACH> HB_DEVICE void get(const void *x, int64_t i, float *value)
{
    if constexpr (EACH == 8)
        load8<IO>(x, i, value);
    else
        value[0] = load_float<IO>(x, i);
}

template <int EACH> HB_DEVICE void put(int8_t *codes, const float *value, float factor)
{
    if constexpr (EACH == 8) {
        uint2 word;
        if (is_plain_factor(factor))
            word = {encode4_int8<true>(value, factor), encode4_int8<true>(value + 4, factor)};
        else
            word = {encode4_int8<false>(value, factor), encode4_int8<false>(value + 4, factor)};
        store_once((uint2 *)codes, word);
    } else {
        store(codes, (int8_t)encode_int8<false>(value[0], factor));
    }
}

// GROUP threads a row: HB_LANES or THREADS. EACH elements a thread and step: 8 (depth % 8 == 0, x
// 16-byte and codes 8-byte aligned) or 1.
template <int IO, int EACH, int GROUP>
HB_KERNEL(THREADS)
quantize_rows8_kernel(HB_ARGS hb_cuda_quantize_rows8 a)
{
    enum { HELD = EACH == 8 ? KEPT : 8 * KEPT, STEP = GROUP * EACH };
    const int me = thread_index() % GROUP;
    const int64_t row = block_index() * (THREADS / GROUP) + thread_index() / GROUP;
    if (row >= a.rows) return; // whole groups
    const int64_t begin = row * a.depth;
    const float threshold = outlier_threshold(a.threshold);

    float held[HELD][EACH];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int64_t k = i * STEP + me * EACH;
        if (k >= a.depth) break;
        get<IO, EACH>(a.x, begin + k, held[i]);
        largest = max_u32(largest, take_outliers<EACH>(held[i], threshold, a.outlier_columns + k));
    }
    for (int64_t k = HELD * STEP + me * EACH; k < a.depth; k += STEP) {
        float value[EACH];
        get<IO, EACH>(a.x, begin + k, value);
        largest = max_u32(largest, take_outliers<EACH>(value, threshold, a.outlier_columns + k));
    }

    float absmax = absmax_of_lanes(largest, HB_LANES);
    if (GROUP == THREADS) {
        float *parts = (float *)shared_memory(); // [WARPS]
        if (lane_index() == 0) shared_store(parts + warp_index(), absmax);
        block_sync();
        largest = 0;
        for (int w = 0; w < WARPS; w++)
            largest = max_u32(largest, float_bits(shared_load(parts + w)));
        absmax = bits_float(largest);
    }
    if (me == 0) store(a.scale + row, absmax);

    const float factor = div_rn(127.0f, absmax);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int64_t k = i * STEP + me * EACH;
        if (k >= a.depth) break;
        put<EACH>(a.codes + begin + k, held[i], factor);
    }
    for (int64_t k = HELD * STEP + me * EACH; k < a.depth; k += STEP) {
        float value[EACH];
        get<IO, EACH>(a.x, begin + k, value);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (is_outlier(value[j], threshold)) value[j] = 0.0f;
        put<EACH>(a.codes + begin + k, value, factor);
    }
}

// Sets the marked columns of ZERO_ROWS rows a block to 0.
HB_KERNEL(THREADS) zero_columns_kernel(HB_ARGS hb_cuda_quantize_rows8 a)
{
    const int64_t first = block_index() * ZERO_ROWS;
    const int64_t last = first + ZERO_ROWS < a.rows ? first + ZERO_ROWS : a.rows;
    const int64_t head = -(uintptr_t)a.outlier_columns & 15; // up to the first aligned 16 marks
    const int64_t words = a.depth > head ? (a.depth - head) / 16 : 0;
    for (int64_t i = thread_index(); i < words; i += THREADS) {
        const uint4 marks = load((const uint4 *)(a.outlier_columns + head) + i);
        if ((marks.x | marks.y | marks.z | marks.w) == 0) continue;
        const uint32_t word[4] = {marks.x, marks.y, marks.z, marks.w};
        for (int j = 0; j < 16; j++)
            if (word[j / 4] >> (8 * (j % 4)) & 255)
                for (int64_t row = first; row < last; row++)
                    store(a.codes + row * a.depth + head + 16 * i + j, (int8_t)0);
    }
    // The ends: at most 15 marks before the aligned ones and 15 behind.
    const int64_t t = thread_index();
    const int64_t k = t < 16 ? t : head + 16 * words + t - 16;
    if (t < 32 && k < a.depth && (t < 16 ? k < head : true) && load(a.outlier_columns + k))
        for (int64_t row = first; row < last; row++) store(a.codes + row * a.depth + k, (int8_t)0);
}

enum { EACH = 16 };

template <int IO, bool ALIGNED>
HB_KERNEL(THREADS)
dequantize_rows8_kernel(HB_ARGS hb_cuda_dequantize_rows8 a)
{
    const int64_t n = a.rows * a.depth;
    const int64_t i = (block_index() * THREADS + thread_index()) * EACH;
    if (i >= n) return;
    int64_t row = i / a.depth;
    if (ALIGNED) { // depth % 16 == 0: one row
        const float scale = load(a.scale + row);
        const uint4 codes = load_once((const uint4 *)(a.codes + i));
        const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
        float value[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const float code = (float)(int8_t)(word[j / 4] >> (8 * (j % 4)) & 255);
            value[j] = mul_rn(mul_rn(code, scale), HB_INT8_STEP);
        }
        store8<IO>(a.out, i, value);
        store8<IO>(a.out, i + 8, value + 8);
        return;
    }
    int64_t left = a.depth - i % a.depth; // of the row
    float scale = load(a.scale + row);
    for (int j = 0; j < EACH && i + j < n; j++) {
        if (left-- == 0) {
            left = a.depth - 1;
            scale = load(a.scale + ++row);
        }
        const float code = (float)load(a.codes + i + j);
        store_float<IO>(a.out, i + j, mul_rn(mul_rn(code, scale), HB_INT8_STEP));
    }
}

template <int IO, int EACH_, int GROUP>
int launch(const hb_cuda_queue *queue, const hb_cuda_quantize_rows8 &a)
{
    return HB_LAUNCH((quantize_rows8_kernel<IO, EACH_, GROUP>),
                     hb_ceil_div(a.rows, (int64_t)(THREADS / GROUP)), THREADS, WARPS * 4,
                     queue->stream, a);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_quantize_rows8 &a)
{
    const bool aligned =
        a.depth % 8 == 0 && ((uintptr_t)a.x & 15) == 0 && ((uintptr_t)a.codes & 7) == 0;
    const bool is_long = a.depth > HB_LANES * 8 * KEPT;
    if (aligned)
        return is_long ? launch<IO, 8, THREADS>(queue, a) : launch<IO, 8, HB_LANES>(queue, a);
    return is_long ? launch<IO, 1, THREADS>(queue, a) : launch<IO, 1, HB_LANES>(queue, a);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_dequantize_rows8 &a)
{
    const int64_t blocks = hb_ceil_div(a.rows * a.depth, (int64_t)THREADS * EACH);
    const bool aligned =
        a.depth % EACH == 0 && ((uintptr_t)a.codes & 15) == 0 && ((uintptr_t)a.out & 15) == 0;
    if (aligned)
        return HB_LAUNCH((dequantize_rows8_kernel<IO, true>), blocks, THREADS, 0, queue->stream, a);
    return HB_LAUNCH((dequantize_rows8_kernel<IO, false>), blocks, THREADS, 0, queue->stream, a);
}

} // namespace

int hb_cuda_launch_quantize_rows8(const hb_cuda_queue *queue, const hb_cuda_quantize_rows8 *args)
{
    int status = 0;
    if (args->outlier_columns != nullptr && args->depth > 0)
        status = hb_cuda_fill(args->outlier_columns, 0, args->depth, queue->stream);
    if (status != 0 || args->rows == 0) return status;
    switch (args->x_dtype) {
    case HB_F32: status = launch<HB_F32>(queue, *args); break;
    case HB_BF16: status = launch<HB_BF16>(queue, *args); break;
    default: status = launch<HB_F16>(queue, *args); break;
    }
    if (status != 0 || args->rows == 1 || args->depth == 0 || !(args->threshold > 0.0f))
        return status;
    return HB_LAUNCH(zero_columns_kernel, hb_ceil_div(args->rows, (int64_t)ZERO_ROWS), THREADS, 0,
                     queue->stream, *args);
}

int hb_cuda_launch_dequantize_rows8(const hb_cuda_queue *queue,
                                    const hb_cuda_dequantize_rows8 *args)
{
    if (args->rows == 0 || args->depth == 0) return 0;
    switch (args->out_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
