#include "core/ops_cuda.h"

#include "core/cuda_load.h"

// Returns the status of one entry of the library's table, which may be missing there.
#define LAUNCH(function, entry, device, args)                                                      \
    do {                                                                                           \
        const hb_cuda_api *api = NULL;                                                             \
        HB_TRY(ready(function, &api, error));                                                      \
        HB_CHECK(error, api->entry != NULL, HB_ERR_CUDA,                                           \
                 "%s: this halfbyte's CUDA library has no kernel for it", function);               \
        const hb_cuda_queue queue = {(device)->index, (device)->stream};                           \
        return hb_cuda_check(api, function, api->entry(&queue, &(args)), error);                   \
    } while (0)

// The bytes that entry_workspace asks for; 0 also where the operation itself is going to fail.
#define WORKSPACE(entry, device, args)                                                             \
    do {                                                                                           \
        const hb_cuda_api *api = NULL;                                                             \
        if ((device)->type != HB_CUDA || hb_cuda_ready(&api, NULL) != HB_OK) return 0;             \
        if (api->entry == NULL) return 0;                                                          \
        const hb_cuda_queue queue = {(device)->index, (device)->stream};                           \
        return api->entry(&queue, &(args));                                                        \
    } while (0)

static hb_status ready(const char *function, const hb_cuda_api **api, hb_error *error)
{
    hb_error reason;
    hb_status status = hb_cuda_ready(api, &reason);
    HB_CHECK(error, status == HB_OK, status, "%s: %.230s", function, reason.text);
    return HB_OK;
}

// ---- moving data --------------------------------------------------------------------------------

hb_status hb_copy_cuda(const char *function, const hb_view *source, const hb_view *target,
                       hb_error *error)
{
    if (hb_view_numel(target) == 0) return HB_OK;
    hb_cuda_copy args = {.source = source->data,
                         .target = target->data,
                         .item_bytes = (int32_t)hb_dtype_bytes(target->dtype),
                         .ndim = target->ndim};
    for (int d = 0; d < target->ndim; d++) {
        args.shape[d] = target->shape[d];
        args.source_stride[d] = source->stride[d];
        args.target_stride[d] = target->stride[d];
    }
    LAUNCH(function, copy, &target->device, args);
}

hb_status hb_upload_cuda(const char *function, const hb_device *device, const float *values,
                         int count, float *target, hb_error *error)
{
    hb_cuda_upload args = {.target = target, .count = count};
    memcpy(args.values, values, (size_t)count * sizeof *values);
    LAUNCH(function, upload, device, args);
}

static hb_cuda_scales4 scales_of(const hb_tensor4 *w)
{
    return (hb_cuda_scales4){.absmax = w->absmax,
                             .absmax_codes = w->absmax_codes,
                             .nested_absmax = w->nested_absmax,
                             .nested_map = w->nested_map,
                             .nested_offset = w->nested_offset_at,
                             .nested_offset_value = w->nested_offset,
                             .nested_blocksize = w->nested_blocksize};
}

hb_status hb_expand_absmax_cuda(const char *function, const hb_device *device, const hb_tensor4 *w,
                                int64_t first, int64_t n, float *absmax, hb_error *error)
{
    if (n <= 0) return HB_OK;
    const hb_cuda_expand4 args = {.scales = scales_of(w), .first = first, .n = n, .absmax = absmax};
    LAUNCH(function, expand4, device, args);
}

hb_status hb_memory_on_cuda(const char *function, const hb_device *device, const void *memory,
                            bool *readable, hb_error *error)
{
    const hb_cuda_api *api = NULL;
    HB_TRY(ready(function, &api, error));
    int32_t answer = 0;
    if (api->memory_on_device != NULL)
        HB_TRY(hb_cuda_check(api, function, api->memory_on_device(device->index, memory, &answer),
                             error));
    *readable = answer != 0;
    return HB_OK;
}

hb_status hb_managed_new(const char *function, int32_t device, int64_t bytes, void **memory,
                         hb_error *error)
{
    const hb_cuda_api *api = NULL;
    HB_TRY(ready(function, &api, error));
    return hb_cuda_check(api, function, api->managed_new(device, bytes, memory), error);
}

void hb_managed_free(void *memory)
{
    const hb_cuda_api *api = NULL;
    if (hb_cuda_ready(&api, NULL) == HB_OK) (void)api->managed_free(memory);
}

hb_status hb_managed_prefetch(const char *function, const hb_device *device, void *memory,
                              int64_t bytes, hb_error *error)
{
    const hb_cuda_api *api = NULL;
    HB_TRY(ready(function, &api, error));
    const hb_cuda_queue queue = {device->index, device->stream};
    return hb_cuda_check(api, function, api->managed_prefetch(&queue, memory, bytes), error);
}

// ---- 4 bits -------------------------------------------------------------------------------------

hb_status hb_quantize_4bit_cuda(const hb_view *x, hb_format4 format, int64_t blocksize,
                                hb_scales scales, uint8_t *packed, float *absmax, hb_error *error)
{
    const hb_cuda_quantize4 args = {.x = x->data,
                                    .x_dtype = (int32_t)x->dtype,
                                    .format = (int32_t)format,
                                    .search = (int32_t)scales,
                                    .blocksize = blocksize,
                                    .n = hb_view_numel(x),
                                    .packed = packed,
                                    .absmax = absmax};
    if (args.n == 0) return HB_OK;
    LAUNCH("quantize_4bit", quantize4, &x->device, args);
}

hb_status hb_dequantize_4bit_cuda(const hb_tensor4 *w, int64_t start, const hb_view *out,
                                  hb_error *error)
{
    const hb_cuda_dequantize4 args = {.packed = w->packed,
                                      .scales = scales_of(w),
                                      .format = (int32_t)w->format,
                                      .out_dtype = (int32_t)out->dtype,
                                      .blocksize = w->blocksize,
                                      .start = start,
                                      .n = hb_view_numel(out),
                                      .out = out->data};
    if (args.n == 0) return HB_OK;
    LAUNCH("dequantize_4bit", dequantize4, &out->device, args);
}

int64_t hb_nest_absmax_workspace(const hb_device *device, int64_t n, int64_t nested_blocksize)
{
    const hb_cuda_nest4 args = {.n = n, .blocksize = nested_blocksize};
    WORKSPACE(nest4_workspace, device, args);
}

hb_status hb_nest_absmax_cuda(const hb_device *device, const float *absmax, int64_t n,
                              int64_t nested_blocksize, const float *map, uint8_t *codes,
                              float *nested_absmax, float *offset, void *workspace, hb_error *error)
{
    static const char function[] = "nest_absmax";
    const hb_cuda_nest4 args = {.absmax = absmax,
                                .n = n,
                                .blocksize = nested_blocksize,
                                .map = map,
                                .codes = codes,
                                .nested_absmax = nested_absmax,
                                .offset = offset,
                                .workspace = workspace};
    if (n == 0) { // the mean of nothing is 0 here
        const float zero = 0.0f;
        return hb_upload_cuda(function, device, &zero, 1, offset, error);
    }
    LAUNCH(function, nest4, device, args);
}

// x [..., from] -> y [..., to].
static hb_cuda_linear4 linear4_args(const hb_view *x, const hb_tensor4 *w, bool backward)
{
    int64_t m = 1;
    for (int d = 0; d < x->ndim - 1; d++) m *= x->shape[d];
    return (hb_cuda_linear4){.x = x->data,
                             .packed = w->packed,
                             .scales = scales_of(w),
                             .io_dtype = (int32_t)x->dtype,
                             .format = (int32_t)w->format,
                             .transposed = backward,
                             .path = HB_CUDA_AUTO,
                             .blocksize = w->blocksize,
                             .m = m,
                             .rows = w->rows,
                             .depth = w->depth};
}

int64_t hb_linear_4bit_workspace(const hb_view *x, const hb_tensor4 *w, bool backward)
{
    if (x->device.type != HB_CUDA) return 0;
    const hb_cuda_linear4 args = linear4_args(x, w, backward);
    WORKSPACE(linear4_workspace, &x->device, args);
}

hb_status hb_linear_4bit_cuda(const char *function, const hb_view *x, const hb_tensor4 *w,
                              const hb_view *bias, bool backward, const hb_view *y, void *workspace,
                              hb_error *error)
{
    hb_cuda_linear4 args = linear4_args(x, w, backward);
    args.y = y->data;
    args.workspace = workspace;
    if (bias != NULL) {
        args.bias = bias->data;
        args.bias_dtype = (int32_t)bias->dtype;
    }
    // Without elements there are no scales either; NULL would mean that they are nested.
    if (w->numel == 0) args.scales = (hb_cuda_scales4){.absmax = (const float *)y->data};
    if (hb_view_numel(y) == 0) return HB_OK;
    LAUNCH(function, linear4, &x->device, args);
}

static hb_cuda_linear4 grouped4_args(const hb_view *x, const hb_view *offsets, const hb_tensor4 *w,
                                     bool transposed)
{
    hb_cuda_linear4 args = linear4_args(x, w, transposed);
    args.offsets = offsets->data;
    args.offsets_dtype = (int32_t)offsets->dtype;
    args.experts = hb_view_numel(offsets);
    return args;
}

int64_t hb_grouped_linear_4bit_workspace(const hb_view *x, const hb_view *offsets,
                                         const hb_tensor4 *w, bool transposed)
{
    const hb_cuda_linear4 args = grouped4_args(x, offsets, w, transposed);
    WORKSPACE(linear4_workspace, &x->device, args);
}

hb_status hb_grouped_linear_4bit_cuda(const hb_view *x, const hb_view *offsets, const hb_tensor4 *w,
                                      bool transposed, const hb_view *y, void *workspace,
                                      hb_error *error)
{
    hb_cuda_linear4 args = grouped4_args(x, offsets, w, transposed);
    args.y = y->data;
    args.workspace = workspace;
    if (w->numel == 0) args.scales = (hb_cuda_scales4){.absmax = (const float *)y->data};
    if (hb_view_numel(y) == 0) return HB_OK;
    LAUNCH("grouped_linear_4bit", linear4, &x->device, args);
}

hb_status hb_gather_4bit_cuda(const int64_t *index, const hb_tensor4 *w, const hb_view *out,
                              hb_error *error)
{
    const hb_cuda_gather4 args = {.index = index,
                                  .packed = w->packed,
                                  .scales = scales_of(w),
                                  .out = out->data,
                                  .format = (int32_t)w->format,
                                  .out_dtype = (int32_t)out->dtype,
                                  .blocksize = w->blocksize,
                                  .n = w->depth == 0 ? 0 : hb_view_numel(out) / w->depth,
                                  .rows = w->rows,
                                  .depth = w->depth};
    if (args.n == 0) return HB_OK;
    LAUNCH("gather_4bit", gather4, &out->device, args);
}

// ---- 8 bits -------------------------------------------------------------------------------------

hb_status hb_quantize_8bit_cuda(const hb_view *x, const float *map, int64_t blocksize,
                                uint8_t *codes, float *absmax, hb_error *error)
{
    const hb_cuda_quantize8 args = {.x = x->data,
                                    .map = map,
                                    .x_dtype = (int32_t)x->dtype,
                                    .blocksize = blocksize,
                                    .n = hb_view_numel(x),
                                    .codes = codes,
                                    .absmax = absmax};
    if (args.n == 0) return HB_OK;
    LAUNCH("quantize_8bit", quantize8, &x->device, args);
}

hb_status hb_dequantize_8bit_cuda(const uint8_t *codes, const float *absmax, const float *map,
                                  int64_t blocksize, const hb_view *out, hb_error *error)
{
    const hb_cuda_dequantize8 args = {.codes = codes,
                                      .absmax = absmax,
                                      .map = map,
                                      .out_dtype = (int32_t)out->dtype,
                                      .blocksize = blocksize,
                                      .n = hb_view_numel(out),
                                      .out = out->data};
    if (args.n == 0) return HB_OK;
    LAUNCH("dequantize_8bit", dequantize8, &out->device, args);
}

hb_status hb_quantize_rows_int8_cuda(const hb_view *x, int64_t rows, int64_t depth, float threshold,
                                     int8_t *codes, float *scale, uint8_t *outlier_columns,
                                     hb_error *error)
{
    const hb_cuda_quantize_rows8 args = {.x = x->data,
                                         .x_dtype = (int32_t)x->dtype,
                                         .threshold = threshold,
                                         .rows = rows,
                                         .depth = depth,
                                         .codes = codes,
                                         .scale = scale,
                                         .outlier_columns = outlier_columns};
    LAUNCH("quantize_rows_int8", quantize_rows8, &x->device, args);
}

hb_status hb_dequantize_rows_int8_cuda(const int8_t *codes, const float *scale, int64_t rows,
                                       int64_t depth, const hb_view *out, hb_error *error)
{
    const hb_cuda_dequantize_rows8 args = {.codes = codes,
                                           .scale = scale,
                                           .out_dtype = (int32_t)out->dtype,
                                           .rows = rows,
                                           .depth = depth,
                                           .out = out->data};
    if (rows == 0 || depth == 0) return HB_OK;
    LAUNCH("dequantize_rows_int8", dequantize_rows8, &out->device, args);
}

hb_status hb_matmul_int8_cuda(const hb_device *device, const int8_t *a, const int8_t *b, int64_t m,
                              int64_t n, int64_t depth, int32_t *c, hb_error *error)
{
    hb_cuda_matmul8 args = {.a = a, .b = b, .m = m, .n = n, .depth = depth, .c = c};
    if (m == 0 || n == 0) return HB_OK;
    // Arrays without elements may be NULL, which the kernels take for "x is not in codes".
    if (depth == 0) args.a = args.b = (const int8_t *)c;
    LAUNCH("matmul_int8", matmul8, device, args);
}

static hb_cuda_linear8 linear8_args(const hb_view *x, const int8_t *codes, const float *scale,
                                    int64_t rows, int64_t depth, hb_int8_mode mode, float threshold,
                                    bool backward)
{
    int64_t m = 1;
    for (int d = 0; d < x->ndim - 1; d++) m *= x->shape[d];
    return (hb_cuda_linear8){.x = x->data,
                             .codes = codes,
                             .scale = scale,
                             .io_dtype = (int32_t)x->dtype,
                             .mode = (int32_t)mode,
                             .transposed = backward,
                             .threshold = threshold,
                             .m = m,
                             .rows = rows,
                             .depth = depth};
}

int64_t hb_linear_8bit_workspace(const hb_view *x, const int8_t *codes, const float *scale,
                                 int64_t rows, int64_t depth, hb_int8_mode mode, float threshold,
                                 bool backward)
{
    if (x->device.type != HB_CUDA) return 0;
    const hb_cuda_linear8 args =
        linear8_args(x, codes, scale, rows, depth, mode, threshold, backward);
    WORKSPACE(linear8_workspace, &x->device, args);
}

hb_status hb_linear_8bit_cuda(const char *function, const hb_view *x, const int8_t *codes,
                              const float *scale, int64_t rows, int64_t depth, const hb_view *bias,
                              hb_int8_mode mode, float threshold, bool backward, const hb_view *y,
                              void *workspace, hb_error *error)
{
    hb_cuda_linear8 args = linear8_args(x, codes, scale, rows, depth, mode, threshold, backward);
    args.y = y->data;
    args.workspace = workspace;
    if (bias != NULL) {
        args.bias = bias->data;
        args.bias_dtype = (int32_t)bias->dtype;
    }
    if (hb_view_numel(y) == 0) return HB_OK;
    LAUNCH(function, linear8, &x->device, args);
}

static hb_cuda_linear8 grouped8_args(const hb_view *x, const hb_view *offsets, const hb_stack8 *w,
                                     bool transposed)
{
    hb_cuda_linear8 args =
        linear8_args(x, w->codes, w->scale, w->rows, w->depth, w->mode, w->threshold, transposed);
    args.offsets = offsets->data;
    args.offsets_dtype = (int32_t)offsets->dtype;
    args.experts = w->experts;
    return args;
}

int64_t hb_grouped_linear_8bit_workspace(const hb_view *x, const hb_view *offsets,
                                         const hb_stack8 *w, bool transposed)
{
    const hb_cuda_linear8 args = grouped8_args(x, offsets, w, transposed);
    WORKSPACE(linear8_workspace, &x->device, args);
}

hb_status hb_grouped_linear_8bit_cuda(const hb_view *x, const hb_view *offsets, const hb_stack8 *w,
                                      bool transposed, const hb_view *y, void *workspace,
                                      hb_error *error)
{
    hb_cuda_linear8 args = grouped8_args(x, offsets, w, transposed);
    args.y = y->data;
    args.workspace = workspace;
    if (hb_view_numel(y) == 0) return HB_OK;
    LAUNCH("grouped_linear_8bit", linear8, &x->device, args);
}

// ---- optimizers ---------------------------------------------------------------------------------

int64_t hb_optimizer_workspace(const hb_device *device, hb_optimizer optimizer,
                               const hb_optim_tensor *tensors, int64_t count,
                               const hb_optim_settings *settings)
{
    const hb_cuda_optimizer args = {
        .tensors = tensors, .settings = settings, .optimizer = (int32_t)optimizer, .count = count};
    WORKSPACE(optimizer_workspace, device, args);
}

hb_status hb_optimizer_step_cuda(const hb_device *device, hb_optimizer optimizer,
                                 const hb_optim_tensor *tensors, int64_t count,
                                 const hb_optim_settings *settings, const float *map1,
                                 const float *map2, void *workspace, hb_error *error)
{
    const hb_cuda_optimizer args = {.tensors = tensors,
                                    .settings = settings,
                                    .optimizer = (int32_t)optimizer,
                                    .count = count,
                                    .map1 = map1,
                                    .map2 = map2,
                                    .workspace = workspace};
    LAUNCH("optimizer_step", optimizer, device, args);
}
