// Checks that a call's 4-bit arrays have the dtypes and sizes that their shape and block size ask
// for. The core gets plain pointers, so this is where a buffer's length is compared for the last
// time.
#include "python/weights4.h"
#include "python/common.h"

#include "core/ops_cuda.h"

// 1: `value` is a float32 tensor of one element here, read into *result; 0: it is something else.
static int get_scalar(hb_state *state, const char *function, const char *name, PyObject *value,
                      float *result)
{
    hb_exchange_entry entry;
    hb_array array = {0};
    const int found = hb_exchange_find(state, Py_TYPE(value), &entry);
    if (found <= 0) return found;
    if (hb_array_get(state, value, function, name, HB_TAKE_BYTES, &array) < 0) return -1;
    const bool fits = array.view.device.type == HB_CPU && array.type.code == kDLFloat &&
                      array.type.bits == 32 && hb_view_numel(&array.view) == sizeof *result;
    if (fits) memcpy(result, array.view.data, sizeof *result);
    hb_array_release(&array);
    return fits;
}

// The offset: a number, or float32 [1]. On CUDA the latter stays where it is: nobody waits for it.
static int get_offset(hb_state *state, const char *function, PyObject *value, unsigned take,
                      hb_weights4 *weights)
{
    static const char name[] = "nested_offset";
    hb_tensor4 *tensor = &weights->tensor;
    hb_array *array = &weights->nested_offset;
    if (value == NULL || PyFloat_Check(value) || PyLong_Check(value))
        return hb_arg_float(function, name, value, &tensor->nested_offset);
    if (weights->packed.view.device.type == HB_CPU) {
        const int read = get_scalar(state, function, name, value, &tensor->nested_offset);
        if (read != 0) return read < 0 ? -1 : 0;
        return hb_arg_float(function, name, value, &tensor->nested_offset);
    }
    if (hb_array_get(state, value, function, name, HB_TAKE_F32 | HB_TAKE_FLAT | take, array) < 0 ||
        hb_check_numel(function, name, array, 1) < 0)
        return -1;
    if (array->view.device.type == HB_CPU) {
        tensor->nested_offset = *(const float *)array->view.data;
        hb_array_release(array);
        return 0;
    }
    tensor->nested_offset_at = array->view.data;
    return hb_check_device(function, name, array, &tensor->device);
}

static int get_nested(hb_state *state, const char *function, const hb_weights4_args *args,
                      unsigned take, hb_weights4 *weights)
{
    hb_tensor4 *tensor = &weights->tensor;
    const hb_origin from = hb_origin_of(&weights->packed), *origin = &from;
    if (!hb_given(args->nested_absmax) || !hb_given(args->nested_map)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: absmax, expected float32 (or uint8 with nested_absmax and nested_map), "
                     "got uint8 without %s",
                     function, hb_given(args->nested_absmax) ? "nested_map" : "nested_absmax");
        return -1;
    }
    if (hb_array_get(state, args->nested_absmax, function, "nested_absmax",
                     HB_TAKE_F32 | HB_TAKE_FLAT | take, &weights->nested_absmax) < 0 ||
        hb_array_get(state, args->nested_map, function, "nested_map",
                     HB_TAKE_F32 | HB_TAKE_FLAT | take, &weights->nested_map) < 0 ||
        hb_check_numel(function, "nested_map", &weights->nested_map, 256) < 0 ||
        hb_check_device(function, "nested_absmax", &weights->nested_absmax, &tensor->device) < 0 ||
        hb_table_move(state, function, "nested_map", origin, &weights->nested_map) < 0 ||
        get_offset(state, function, args->nested_offset, take, weights) < 0 ||
        hb_arg_int64(function, "nested_blocksize", args->nested_blocksize,
                     &tensor->nested_blocksize) < 0)
        return -1;
    if (tensor->nested_blocksize < 1) {
        PyErr_Format(PyExc_ValueError, "%s: nested_blocksize, expected at least 1, got %lld",
                     function, (long long)tensor->nested_blocksize);
        return -1;
    }
    tensor->absmax_codes = weights->absmax.view.data;
    tensor->nested_absmax = weights->nested_absmax.view.data;
    tensor->nested_map = weights->nested_map.view.data;
    return 0;
}

int hb_weights4_get(hb_state *state, const char *function, const hb_weights4_args *args,
                    unsigned take, hb_weights4 *weights)
{
    *weights = (hb_weights4){.tensor = {.nested_blocksize = 256}};
    hb_tensor4 *tensor = &weights->tensor;
    if (hb_arg_format4(function, "quant_type", args->quant_type, &tensor->format) < 0 ||
        hb_arg_blocksize4(function, "blocksize", args->blocksize, &tensor->blocksize) < 0 ||
        hb_array_get(state, args->packed, function, "packed", HB_TAKE_BYTES | take,
                     &weights->packed) < 0 ||
        hb_array_get(state, args->absmax, function, "absmax",
                     HB_TAKE_F32 | HB_TAKE_U8 | HB_TAKE_FLAT | take, &weights->absmax) < 0)
        goto error;
    tensor->packed = weights->packed.view.data;
    tensor->device = weights->packed.view.device;
    if (hb_check_device(function, "absmax", &weights->absmax, &tensor->device) < 0) goto error;
    if (weights->absmax.view.dtype == HB_U8) {
        if (get_nested(state, function, args, take, weights) < 0) goto error;
    } else {
        if (hb_given(args->nested_absmax) || hb_given(args->nested_map)) {
            PyErr_Format(
                PyExc_TypeError,
                "%s: absmax, expected uint8 beside nested_absmax and nested_map, got float32",
                function);
            goto error;
        }
        tensor->absmax = weights->absmax.view.data;
    }
    return 0;
error:
    hb_weights4_release(weights);
    return -1;
}

void hb_weights4_release(hb_weights4 *weights)
{
    hb_array_release(&weights->packed);
    hb_array_release(&weights->absmax);
    hb_array_release(&weights->nested_absmax);
    hb_array_release(&weights->nested_map);
    hb_array_release(&weights->nested_offset);
}

int hb_weights4_set_numel(const char *function, hb_weights4 *weights, int64_t numel)
{
    hb_tensor4 *tensor = &weights->tensor;
    const int64_t n_blocks = hb_ceil_div(numel, tensor->blocksize);
    tensor->numel = numel;
    int64_t bytes = hb_view_numel(&weights->packed.view);
    if (bytes != hb_packed_bytes(numel)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: packed, expected %lld bytes for %lld elements, got %lld", function,
                     (long long)hb_packed_bytes(numel), (long long)numel, (long long)bytes);
        return -1;
    }
    if (hb_check_numel(function, "absmax", &weights->absmax, n_blocks) < 0) return -1;
    if (tensor->absmax != NULL || weights->absmax.view.dtype == HB_F32) return 0;
    return hb_check_numel(function, "nested_absmax", &weights->nested_absmax,
                          hb_ceil_div(n_blocks, tensor->nested_blocksize));
}

int hb_weights4_matrix(hb_state *state, const char *function, const hb_weights4_args *args,
                       PyObject *shape_object, hb_weights4 *weights)
{
    int ndim = 0;
    int64_t shape[HB_MAX_NDIM], numel = 0;
    if (hb_arg_shape(function, "shape", shape_object, &ndim, shape, &numel) < 0) return -1;
    if (ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: shape, expected (rows, depth), got %R", function,
                     shape_object);
        return -1;
    }
    if (hb_weights4_get(state, function, args, 0, weights) < 0) return -1;
    if (hb_weights4_set_numel(function, weights, numel) < 0) {
        hb_weights4_release(weights);
        return -1;
    }
    weights->tensor.rows = shape[0];
    weights->tensor.depth = shape[1];
    return 0;
}

static int check_tensor_overlap(const char *function, const hb_array *out, const hb_tensor4 *tensor)
{
    const int64_t n_blocks = hb_ceil_div(tensor->numel, tensor->blocksize);
    if (hb_check_overlap_bytes(function, "out", out, "packed", tensor->packed,
                               hb_packed_bytes(tensor->numel)) < 0)
        return -1;
    if (tensor->nested_map == NULL)
        return hb_check_overlap_bytes(function, "out", out, "absmax", tensor->absmax, n_blocks * 4);
    const int64_t n_nested = hb_ceil_div(n_blocks, tensor->nested_blocksize);
    if (hb_check_overlap_bytes(function, "out", out, "absmax", tensor->absmax_codes, n_blocks) <
            0 ||
        hb_check_overlap_bytes(function, "out", out, "nested_absmax", tensor->nested_absmax,
                               n_nested * 4) < 0 ||
        hb_check_overlap_bytes(function, "out", out, "nested_map", tensor->nested_map, 1024) < 0)
        return -1;
    return 0;
}

PyObject *hb_dequantize4_run(hb_state *state, const char *function, const hb_tensor4 *tensor,
                             int64_t start, hb_dtype dtype, const hb_origin *origin, int ndim,
                             const int64_t *shape, PyObject *out)
{
    hb_array result;
    hb_view strided;
    unsigned take = dtype == HB_BF16 ? HB_TAKE_U16_AS_BF16 : 0;
    PyObject *object =
        hb_output(state, out, function, "out", origin, dtype, ndim, shape, take, &result);
    if (object == NULL) return NULL;
    if (hb_given(out) && check_tensor_overlap(function, &result, tensor) < 0) goto error;
    const int staged = hb_stage_begin(function, &result, &strided);
    if (staged < 0) goto error;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_dequantize_4bit(&state->context, tensor, start, &result.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        goto error;
    }
    if (staged > 0 && hb_stage_end(state, function, &result, &strided) < 0) goto error;
    hb_array_release(&result);
    return object;
error:
    hb_array_release(&result);
    Py_DECREF(object);
    return NULL;
}

PyObject *hb_linear4_run(hb_state *state, const hb_linear4_call *call, const hb_tensor4 *tensor,
                         PyObject *input, PyObject *out)
{
    hb_array in, result;
    hb_view strided;
    PyObject *scratch = NULL;
    void *workspace = NULL;
    result.owner = NULL;
    if (hb_array_get(state, input, call->function, call->input_name, HB_TAKE_IO, &in) < 0)
        return NULL;
    PyObject *object = NULL;
    int64_t shape[HB_MAX_NDIM];
    if (hb_layer_shape(call->function, call->input_name, &in.view, tensor->rows, tensor->depth,
                       call->backward, shape) < 0 ||
        hb_check_device(call->function, call->input_name, &in, &tensor->device) < 0)
        goto error;
    const hb_origin origin = hb_origin_of(&in);
    object = hb_output(state, out, call->function, "out", &origin, in.view.dtype, in.view.ndim,
                       shape, 0, &result);
    if (object == NULL) goto error;
    if (hb_given(out)) {
        if (hb_check_overlap(call->function, "out", &result, call->input_name, &in) < 0 ||
            check_tensor_overlap(call->function, &result, tensor) < 0)
            goto error;
    }
    const int staged = hb_stage_begin(call->function, &result, &strided);
    if (staged < 0) goto error;
    if (origin.device.type == HB_CUDA &&
        hb_workspace_new(call->function, &origin,
                         hb_linear_4bit_workspace(&in.view, tensor, call->backward), &scratch,
                         &workspace) < 0)
        goto error;
    hb_error error;
    hb_status status;
    if (call->backward)
        HB_WITHOUT_GIL(status,
                       hb_linear_4bit_grad_input(&state->context, &in.view, tensor, call->compute,
                                                 &result.view, workspace, &error));
    else
        HB_WITHOUT_GIL(status, hb_linear_4bit(&state->context, &in.view, tensor, call->bias,
                                              call->compute, &result.view, workspace, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        goto error;
    }
    if (staged > 0 && hb_stage_end(state, call->function, &result, &strided) < 0) goto error;
    Py_XDECREF(scratch);
    hb_array_release(&in);
    hb_array_release(&result);
    return object;
error:
    Py_XDECREF(scratch);
    hb_array_release(&in);
    hb_array_release(&result);
    Py_XDECREF(object);
    return NULL;
}
