// Quantize and dequantize of the 8-bit block-wise format with any 256-entry map.
//
//   x ~ map[code] * absmax[i / blocksize]           codes uint8 [n], absmax float32 [ceil(n /
//   blocksize)]
//
// Source: arXiv:2110.02861 §2. Accuracy: exact nearest entry of x / absmax as two roundings give
// it, see maps8.c; the same for every thread count and ISA.
#include "core/ops_cuda.h"
#include "core/pieces.h"

typedef struct {
    const hb_kernels_codec *codec;
    const hb_view *x;
    bool contiguous;
    int64_t blocksize, n, blocks_per_chunk;
    hb_search8 search;
    uint8_t *codes;
    float *absmax;
} quantize_job;

// One block that does not fit a piece, piece by piece: the maximum first, then the codes.
static void quantize_long_block(const quantize_job *job, int64_t block)
{
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    const hb_dtype io = job->x->dtype;
    int64_t begin = block * job->blocksize;
    int64_t end = begin + hb_min_i64(job->blocksize, job->n - begin);
    float absmax = 0.0f;
    for (int64_t first = begin; first < end; first += HB_PIECE) {
        int64_t n = hb_min_i64(HB_PIECE, end - first);
        const void *x = hb_piece_in(job->x, job->contiguous, first, n, scratch);
        float largest;
        job->codec->absmax[io](x, n, n, &largest);
        if (!(largest <= absmax)) absmax = largest; // greater, or NaN
        if (absmax != absmax) break;
    }
    job->absmax[block] = absmax;
    for (int64_t first = begin; first < end; first += HB_PIECE) {
        int64_t n = hb_min_i64(HB_PIECE, end - first);
        const void *x = hb_piece_in(job->x, job->contiguous, first, n, scratch);
        job->codec->encode8[io](x, n, &job->search, n, &absmax, job->codes + first);
    }
}

static void quantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const quantize_job *job = arg;
    const hb_dtype io = job->x->dtype;
    const int64_t n_blocks = hb_ceil_div(job->n, job->blocksize);
    const int64_t stop = hb_min_i64(end * job->blocks_per_chunk, n_blocks);
    if (job->blocksize > HB_PIECE) {
        for (int64_t b = begin * job->blocks_per_chunk; b < stop; b++) quantize_long_block(job, b);
        return;
    }
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    const int64_t step = HB_PIECE / job->blocksize;
    for (int64_t b = begin * job->blocks_per_chunk; b < stop; b += step) {
        int64_t first = b * job->blocksize;
        int64_t n = hb_min_i64(hb_min_i64(step, stop - b) * job->blocksize, job->n - first);
        const void *x = hb_piece_in(job->x, job->contiguous, first, n, scratch);
        job->codec->absmax[io](x, n, job->blocksize, job->absmax + b);
        job->codec->encode8[io](x, n, &job->search, job->blocksize, job->absmax + b,
                                job->codes + first);
    }
}

hb_status hb_check_map8(hb_error *error, const char *function, const float *map)
{
    for (int i = 0; i < 256; i++) {
        HB_CHECK(error, map[i] - map[i] == 0.0f, HB_ERR_VALUE,
                 "%s: map[%d] is %g, expected a finite number", function, i, (double)map[i]);
        HB_CHECK(error, i == 0 || map[i - 1] <= map[i], HB_ERR_VALUE,
                 "%s: map[%d] is %g after %g, expected ascending values", function, i,
                 (double)map[i], (double)map[i - 1]);
    }
    return HB_OK;
}

hb_status hb_quantize_8bit(hb_context *context, const hb_view *x, const float *map,
                           int64_t blocksize, uint8_t *codes, float *absmax, hb_error *error)
{
    HB_TRY(hb_check_view(error, "quantize_8bit", "x", x, false));
    HB_CHECK(error, blocksize >= 1, HB_ERR_VALUE,
             "quantize_8bit: blocksize is %lld, expected at least 1", (long long)blocksize);
    if (x->device.type == HB_CPU) HB_TRY(hb_check_map8(error, "quantize_8bit", map));
    int64_t n = hb_view_numel(x);
    if (n == 0) return HB_OK;
    blocksize = hb_min_i64(blocksize, n); // the only block is as long as x: products stay in range
    if (x->device.type == HB_CUDA)
        return hb_quantize_8bit_cuda(x, map, blocksize, codes, absmax, error);
    quantize_job job = {.codec = &context->kernels.codec,
                        .x = x,
                        .contiguous = hb_view_is_contiguous(x),
                        .blocksize = blocksize,
                        .n = n,
                        .blocks_per_chunk = hb_ceil_div(HB_CHUNK, blocksize),
                        .codes = codes,
                        .absmax = absmax};
    hb_search8_init(&job.search, map);
    int64_t n_blocks = hb_ceil_div(n, blocksize);
    hb_parallel_for(context->pool, hb_ceil_div(n_blocks, job.blocks_per_chunk), quantize_chunks,
                    &job);
    return HB_OK;
}

typedef struct {
    const hb_kernels_codec *codec;
    const uint8_t *codes;
    const float *absmax;
    const float *map;
    int64_t blocksize, n;
    const hb_view *out;
    bool contiguous, stream;
} dequantize_job;

static void dequantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const dequantize_job *job = arg;
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    const int64_t stop = hb_min_i64(end * HB_CHUNK, job->n);
    int64_t first = begin * HB_CHUNK;
    while (first < stop) {
        // Up to a piece: whole blocks from a block's beginning, or a part of one block.
        int64_t block = first / job->blocksize;
        int64_t inside = first - block * job->blocksize;
        int64_t n = hb_min_i64(HB_PIECE, stop - first);
        if (inside > 0 || job->blocksize >= HB_PIECE) n = hb_min_i64(n, job->blocksize - inside);
        void *out = hb_piece_out(job->out, job->contiguous, first, scratch);
        job->codec->decode8[job->out->dtype](job->codes + first, n, job->map, job->blocksize,
                                             job->absmax + block, out, job->stream);
        hb_piece_out_done(job->out, job->contiguous, first, n, scratch);
        first += n;
    }
}

hb_status hb_dequantize_8bit(hb_context *context, const uint8_t *codes, const float *absmax,
                             const float *map, int64_t blocksize, const hb_view *out,
                             hb_error *error)
{
    HB_TRY(hb_check_view(error, "dequantize_8bit", "out", out, true));
    HB_CHECK(error, blocksize >= 1, HB_ERR_VALUE,
             "dequantize_8bit: blocksize is %lld, expected at least 1", (long long)blocksize);
    int64_t n = hb_view_numel(out);
    if (out->device.type == HB_CUDA)
        return hb_dequantize_8bit_cuda(codes, absmax, map,
                                       hb_min_i64(blocksize, n > 0 ? n : blocksize), out, error);
    bool contiguous = hb_view_is_contiguous(out);
    bool stream = contiguous && hb_wants_streaming(n * (int64_t)hb_dtype_bytes(out->dtype));
    dequantize_job job = {
        &context->kernels.codec, codes, absmax, map, blocksize, n, out, contiguous, stream};
    hb_parallel_for(context->pool, hb_ceil_div(n, HB_CHUNK), dequantize_chunks, &job);
    return HB_OK;
}
