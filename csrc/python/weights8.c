// Checks and calls of the 8-bit operations; see weights8.h.
#include "python/weights8.h"
#include "python/common.h"

#include "core/ops_cuda.h"

#include <math.h>

int hb_rows8_get(hb_state *state, const char *function, PyObject *codes, PyObject *scale,
                 unsigned take, hb_rows8 *rows)
{
    rows->codes.owner = rows->scale.owner = NULL;
    if (hb_array_get(state, codes, function, "codes", HB_TAKE_I8 | HB_TAKE_FLAT | take,
                     &rows->codes) < 0 ||
        hb_array_get(state, scale, function, "scale", HB_TAKE_F32 | HB_TAKE_FLAT | take,
                     &rows->scale) < 0)
        goto error;
    const hb_view *view = &rows->codes.view;
    if (view->ndim == 0) {
        PyErr_Format(PyExc_ValueError, "%s: codes, expected shape [..., depth], got a scalar",
                     function);
        goto error;
    }
    rows->rows = 1;
    for (int d = 0; d < view->ndim - 1; d++) rows->rows *= view->shape[d];
    rows->depth = view->shape[view->ndim - 1];
    if (hb_check_numel(function, "scale", &rows->scale, rows->rows) < 0 ||
        hb_check_device(function, "scale", &rows->scale, &view->device) < 0)
        goto error;
    return 0;
error:
    hb_rows8_release(rows);
    return -1;
}

void hb_rows8_release(hb_rows8 *rows)
{
    hb_array_release(&rows->codes);
    hb_array_release(&rows->scale);
}

int hb_rows8_check_matrix(const char *function, const hb_rows8 *rows)
{
    if (rows->codes.view.ndim == 2) return 0;
    PyErr_Format(PyExc_ValueError, "%s: codes, expected shape [rows, depth], got %d dimensions",
                 function, rows->codes.view.ndim);
    return -1;
}

int hb_arg_threshold(const char *function, PyObject *value, float *result)
{
    if (hb_arg_float(function, "threshold", value, result) < 0) return -1;
    if (isfinite(*result) && *result >= 0.0f) return 0;
    PyErr_Format(PyExc_ValueError, "%s: threshold, expected a finite number >= 0, got %S", function,
                 value == NULL ? Py_None : value);
    return -1;
}

PyObject *hb_dequantize_rows8_run(hb_state *state, const char *function, const int8_t *codes,
                                  const float *scale, hb_dtype dtype, const hb_origin *origin,
                                  int ndim, const int64_t *shape, PyObject *out)
{
    hb_array result;
    hb_view strided;
    unsigned take = dtype == HB_BF16 ? HB_TAKE_U16_AS_BF16 : 0;
    PyObject *object =
        hb_output(state, out, function, "out", origin, dtype, ndim, shape, take, &result);
    if (object == NULL) return NULL;
    int64_t rows = 1;
    for (int d = 0; d < ndim - 1; d++) rows *= shape[d];
    if (hb_given(out) &&
        (hb_check_overlap_bytes(function, "out", &result, "codes", codes, rows * shape[ndim - 1]) <
             0 ||
         hb_check_overlap_bytes(function, "out", &result, "scale", scale, rows * 4) < 0))
        goto error;
    const int staged = hb_stage_begin(function, &result, &strided);
    if (staged < 0) goto error;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_dequantize_rows_int8(&state->context, codes, scale, &result.view, &error));
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

PyObject *hb_dequantize8_run(hb_state *state, const char *function, const hb_tensor8 *tensor,
                             hb_dtype dtype, const hb_origin *origin, int ndim,
                             const int64_t *shape, PyObject *out)
{
    hb_array result;
    hb_view strided;
    unsigned take = dtype == HB_BF16 ? HB_TAKE_U16_AS_BF16 : 0;
    PyObject *object =
        hb_output(state, out, function, "out", origin, dtype, ndim, shape, take, &result);
    if (object == NULL) return NULL;
    const int64_t numel = hb_view_numel(&result.view);
    if (hb_given(out) &&
        (hb_check_overlap_bytes(function, "out", &result, "codes", tensor->codes, numel) < 0 ||
         hb_check_overlap_bytes(function, "out", &result, "absmax", tensor->absmax,
                                hb_ceil_div(numel, tensor->blocksize) * 4) < 0 ||
         hb_check_overlap_bytes(function, "out", &result, "map", tensor->map, 1024) < 0))
        goto error;
    const int staged = hb_stage_begin(function, &result, &strided);
    if (staged < 0) goto error;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_dequantize_8bit(&state->context, tensor->codes, tensor->absmax, tensor->map,
                                      tensor->blocksize, &result.view, &error));
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

PyObject *hb_linear8_run(hb_state *state, const hb_linear8_call *call, const int8_t *codes,
                         const float *scale, int64_t rows, int64_t depth, PyObject *input,
                         PyObject *out)
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
    if (hb_layer_shape(call->function, call->input_name, &in.view, rows, depth, call->backward,
                       shape) < 0 ||
        hb_check_device(call->function, call->input_name, &in, &call->device) < 0)
        goto error;
    const hb_origin origin = hb_origin_of(&in);
    object = hb_output(state, out, call->function, "out", &origin, in.view.dtype, in.view.ndim,
                       shape, 0, &result);
    if (object == NULL) goto error;
    if (hb_given(out) &&
        (hb_check_overlap(call->function, "out", &result, call->input_name, &in) < 0 ||
         hb_check_overlap_bytes(call->function, "out", &result, "codes", codes, rows * depth) < 0 ||
         hb_check_overlap_bytes(call->function, "out", &result, "scale", scale, rows * 4) < 0))
        goto error;
    const int staged = hb_stage_begin(call->function, &result, &strided);
    if (staged < 0) goto error;
    if (origin.device.type == HB_CUDA &&
        hb_workspace_new(call->function, &origin,
                         hb_linear_8bit_workspace(&in.view, codes, scale, rows, depth, call->mode,
                                                  call->threshold, call->backward),
                         &scratch, &workspace) < 0)
        goto error;
    hb_error error;
    hb_status status;
    if (call->backward)
        HB_WITHOUT_GIL(status,
                       hb_linear_8bit_grad_input(&state->context, &in.view, codes, scale, rows,
                                                 depth, &result.view, workspace, &error));
    else
        HB_WITHOUT_GIL(status, hb_linear_8bit(&state->context, &in.view, codes, scale, rows, depth,
                                              call->bias, call->mode, call->threshold, &result.view,
                                              workspace, &error));
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
