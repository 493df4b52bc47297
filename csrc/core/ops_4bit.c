// Quantize and dequantize of the 4-bit codebook formats, and the nesting of their scales.
//
//   x ~ value[code] * absmax[b]                     absmax[b] = max |x| over block b, float32
//   absmax[b] ~ map[q[b]] * absmax2[b / 256] + offset           ("double quantization", nested)
//
// Layout: ops.h. Source: QLoRA (arXiv:2305.14314) §3. Accuracy: exact functions of the bits, the
// same for every thread count and ISA. Scale search (HB_SCALES_SEARCH) stores, instead of absmax,
// the one of 19 candidates absmax * f, f = 0.70, 0.72, ..., 1.06, with the least squared error of
// the block (kernels_codec.h fixes the order of summation; f = 1 wins ties). A searched scale below
// absmax clips the largest elements to the end codes; any reader of the layout decodes it.
#include "core/ops_cuda.h"
#include "core/pieces.h"
#include "core/sums.h"

static const float search_factors[HB_SEARCH_COUNT] = HB_SEARCH_FACTORS;

typedef struct {
    const hb_kernels_codec *codec;
    const hb_view *x;
    bool contiguous;
    hb_format4 format;
    int64_t blocksize, n;
    hb_scales scales;
    uint8_t *packed;
    float *absmax;
} quantize_job;

// Replaces the scale of one block by a better one. Blocks that are all zero or hold NaN or infinity
// keep absmax, and so does one whose errors all overflow or vanish.
static float search_scale(const quantize_job *job, const void *x, int64_t first, int64_t n,
                          float absmax)
{
    if (!(absmax > 0.0f && absmax <= 0x1.fffffep127f)) return absmax;
    float widened[HB_PIECE];
    const float *values = (const float *)x + first;
    if (job->x->dtype != HB_F32) {
        for (int64_t i = 0; i < n; i++) widened[i] = hb_load_f32(x, first + i, job->x->dtype);
        values = widened;
    }
    float candidates[HB_SEARCH_COUNT];
    int count = 0;
    for (int c = 0; c < HB_SEARCH_COUNT; c++) {
        float candidate = absmax * search_factors[c];
        if (candidate > 0.0f && candidate <= 0x1.fffffep127f) candidates[count++] = candidate;
    }
    return candidates[job->codec->search4(values, NULL, n, job->format, candidates, count)];
}

static void quantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const quantize_job *job = arg;
    const hb_dtype io = job->x->dtype;
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    int64_t stop = hb_min_i64(end * HB_CHUNK, job->n);
    const bool search = job->scales == HB_SCALES_SEARCH;
    const int64_t step = job->contiguous && !search ? HB_CHUNK : HB_PIECE;
    for (int64_t first = begin * HB_CHUNK; first < stop; first += step) {
        int64_t n = hb_min_i64(step, stop - first);
        const void *x = hb_piece_in(job->x, job->contiguous, first, n, scratch);
        float *absmax = job->absmax + first / job->blocksize;
        uint8_t *packed = job->packed + first / 2;
        if (!search) {
            job->codec->quantize4[io](x, n, job->format, job->blocksize, absmax, packed);
            continue;
        }
        job->codec->absmax[io](x, n, job->blocksize, absmax);
        for (int64_t i = 0; i < n; i += job->blocksize) {
            float *scale = absmax + i / job->blocksize;
            *scale = search_scale(job, x, i, hb_min_i64(job->blocksize, n - i), *scale);
        }
        job->codec->encode4[io](x, n, job->format, job->blocksize, absmax, packed);
    }
}

hb_status hb_quantize_4bit(hb_context *context, const hb_view *x, hb_format4 format,
                           int64_t blocksize, hb_scales scales, uint8_t *packed, float *absmax,
                           hb_error *error)
{
    HB_TRY(hb_check_view(error, "quantize_4bit", "x", x, false));
    HB_CHECK(error, (unsigned)format < HB_CODEBOOK_COUNT, HB_ERR_VALUE,
             "quantize_4bit: format is %d, expected 0 (nf4) or 1 (fp4)", (int)format);
    HB_CHECK(error, hb_blocksize4_is_valid(blocksize), HB_ERR_VALUE,
             "quantize_4bit: blocksize is %lld, expected a power of two from 32 to 4096",
             (long long)blocksize);
    HB_CHECK(error, scales == HB_SCALES_ABSMAX || scales == HB_SCALES_SEARCH, HB_ERR_VALUE,
             "quantize_4bit: scales is %d, expected 0 (absmax) or 1 (search)", (int)scales);
    if (x->device.type == HB_CUDA)
        return hb_quantize_4bit_cuda(x, format, blocksize, scales, packed, absmax, error);
    quantize_job job = {&context->kernels.codec,
                        x,
                        hb_view_is_contiguous(x),
                        format,
                        blocksize,
                        hb_view_numel(x),
                        scales,
                        packed,
                        absmax};
    hb_parallel_for(context->pool, hb_ceil_div(job.n, HB_CHUNK), quantize_chunks, &job);
    return HB_OK;
}

typedef struct {
    const hb_context *context;
    const hb_tensor4 *w;
    int64_t start, n;
    const hb_view *out;
    bool contiguous, stream;
} dequantize_job;

static void dequantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const dequantize_job *job = arg;
    const hb_tensor4 *w = job->w;
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    float expanded[HB_PIECE / 32 + 1];
    int64_t stop = hb_min_i64(end * HB_CHUNK, job->n);
    for (int64_t first = begin * HB_CHUNK; first < stop; first += HB_PIECE) {
        int64_t n = hb_min_i64(HB_PIECE, stop - first);
        int64_t element = job->start + first;
        int64_t block = element / w->blocksize;
        const float *absmax = expanded;
        if (w->absmax != NULL)
            absmax = w->absmax + block;
        else
            hb_expand_absmax(job->context, w, block, (element + n - 1) / w->blocksize - block + 1,
                             expanded);
        // The kernel counts elements and blocks from the beginning of this block.
        void *out = hb_piece_out(job->out, job->contiguous, first, scratch);
        job->context->kernels.codec.decode4[job->out->dtype](
            w->packed + block * (w->blocksize / 2), element - block * w->blocksize, n, w->format,
            w->blocksize, absmax, out, job->stream);
        hb_piece_out_done(job->out, job->contiguous, first, n, scratch);
    }
}

hb_status hb_dequantize_4bit(hb_context *context, const hb_tensor4 *w, int64_t start,
                             const hb_view *out, hb_error *error)
{
    HB_TRY(hb_check_view(error, "dequantize_4bit", "out", out, true));
    HB_CHECK(error, (unsigned)w->format < HB_CODEBOOK_COUNT, HB_ERR_VALUE,
             "dequantize_4bit: format is %d, expected 0 (nf4) or 1 (fp4)", (int)w->format);
    HB_CHECK(error, hb_blocksize4_is_valid(w->blocksize), HB_ERR_VALUE,
             "dequantize_4bit: blocksize is %lld, expected a power of two from 32 to 4096",
             (long long)w->blocksize);
    HB_CHECK(error, w->absmax != NULL || w->nested_blocksize >= 1, HB_ERR_VALUE,
             "dequantize_4bit: nested_blocksize is %lld, expected at least 1",
             (long long)w->nested_blocksize);
    int64_t n = hb_view_numel(out);
    HB_CHECK(error, start >= 0 && start <= w->numel && n <= w->numel - start, HB_ERR_VALUE,
             "dequantize_4bit: out covers elements %lld to %lld, expected within the tensor's %lld",
             (long long)start, (long long)(start + n), (long long)w->numel);
    if (out->device.type == HB_CUDA) return hb_dequantize_4bit_cuda(w, start, out, error);
    bool contiguous = hb_view_is_contiguous(out);
    bool stream = contiguous && hb_wants_streaming(n * (int64_t)hb_dtype_bytes(out->dtype));
    dequantize_job job = {context, w, start, n, out, contiguous, stream};
    hb_parallel_for(context->pool, hb_ceil_div(n, HB_CHUNK), dequantize_chunks, &job);
    return HB_OK;
}

typedef struct {
    const hb_kernels_codec *codec;
    const float *absmax;
    int64_t n, blocksize;
    float offset;
    hb_search8 search;
    uint8_t *codes;
    float *nested_absmax;
} nest_job;

static void nest_blocks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const nest_job *job = arg;
    float centred[HB_PIECE];
    for (int64_t b = begin; b < end; b++) {
        int64_t first = b * job->blocksize;
        int64_t n = hb_min_i64(job->blocksize, job->n - first);
        for (int64_t i = 0; i < n; i++) centred[i] = job->absmax[first + i] - job->offset;
        job->codec->absmax[HB_F32](centred, n, n, job->nested_absmax + b);
        job->codec->encode8[HB_F32](centred, n, &job->search, n, job->nested_absmax + b,
                                    job->codes + first);
    }
}

static double sum_of_chunk(const float *x, int64_t n)
{
    double sum[HB_MEAN_LANES];
    const int64_t whole = n / HB_MEAN_LANES * HB_MEAN_LANES;
    // Eight lanes at a time, whose sums stay in registers on every machine.
    for (int first = 0; first < HB_MEAN_LANES; first += 8) {
        double part[8] = {0};
        for (int64_t i = first; i < whole; i += HB_MEAN_LANES)
            for (int l = 0; l < 8; l++) part[l] += (double)x[i + l];
        memcpy(sum + first, part, sizeof part);
    }
    for (int64_t i = whole; i < n; i++) sum[i % HB_MEAN_LANES] += (double)x[i];
    return hb_fold(sum, HB_MEAN_LANES);
}

// The mean in float64, in the order that sums.h fixes, rounded once. A NaN is HB_NAN_BITS.
static float mean_of_scales(const float *x, int64_t n)
{
    if (n == 0) return 0.0f;
    double sum[HB_SUM_LANES] = {0};
    for (int64_t c = 0; c * HB_MEAN_CHUNK < n; c++) {
        const int64_t first = c * HB_MEAN_CHUNK;
        sum[c % HB_SUM_LANES] += sum_of_chunk(x + first, hb_min_i64(HB_MEAN_CHUNK, n - first));
    }
    const float mean = (float)(hb_fold(sum, HB_SUM_LANES) / (double)n);
    return mean != mean ? hb_f32_from_bits(HB_NAN_BITS) : mean;
}

hb_status hb_nest_absmax(hb_context *context, const hb_device *device, const float *absmax,
                         int64_t n, int64_t nested_blocksize, const float *map, uint8_t *codes,
                         float *nested_absmax, float *offset, void *workspace, hb_error *error)
{
    HB_CHECK(error, nested_blocksize >= 1 && nested_blocksize <= HB_PIECE, HB_ERR_VALUE,
             "nest_absmax: nested_blocksize is %lld, expected 1 to %d", (long long)nested_blocksize,
             (int)HB_PIECE);
    if (device->type == HB_CUDA)
        return hb_nest_absmax_cuda(device, absmax, n, nested_blocksize, map, codes, nested_absmax,
                                   offset, workspace, error);
    nest_job job = {.codec = &context->kernels.codec,
                    .absmax = absmax,
                    .n = n,
                    .blocksize = nested_blocksize,
                    .offset = mean_of_scales(absmax, n),
                    .codes = codes,
                    .nested_absmax = nested_absmax};
    hb_search8_init(&job.search, map);
    *offset = job.offset;
    hb_parallel_for(context->pool, hb_ceil_div(n, nested_blocksize), nest_blocks, &job);
    return HB_OK;
}

void hb_expand_absmax(const hb_context *context, const hb_tensor4 *w, int64_t first, int64_t n,
                      float *absmax)
{
    if (n <= 0) return;
    if (w->absmax != NULL) {
        memcpy(absmax, w->absmax + first, (size_t)n * sizeof *absmax);
        return;
    }
    // Up to the next nested block, then the rest in one call.
    const int64_t inside = first % w->nested_blocksize;
    const int64_t head = inside == 0 ? 0 : hb_min_i64(w->nested_blocksize - inside, n);
    const float *nested = w->nested_absmax + first / w->nested_blocksize;
    const uint8_t *codes = w->absmax_codes + first;
    hb_decode8_fn *decode = context->kernels.codec.decode8[HB_F32];
    if (head > 0) decode(codes, head, w->nested_map, w->nested_blocksize, nested, absmax, false);
    if (n > head)
        decode(codes + head, n - head, w->nested_map, w->nested_blocksize, nested + (head > 0),
               absmax + head, false);
    for (int64_t i = 0; i < n; i++) absmax[i] += w->nested_offset; // rounded apart from the product
}
