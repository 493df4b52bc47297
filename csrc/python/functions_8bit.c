// quantize_8bit, dequantize_8bit, quantize_rows_int8, dequantize_rows_int8, matmul_int8,
// linear_8bit, linear_8bit_grad_input, map8.
#include "python/common.h"
#include "python/functions.h"
#include "python/weights8.h"

PyDoc_STRVAR(quantize_8bit_doc,
             "quantize_8bit($module, x, map, /, blocksize, *, dtype=None, codes=None, absmax=None)"
             "\n--\n\n-> (codes uint8, shape of x; absmax float32 [ceil(n / blocksize)]).");

static PyObject *quantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                               PyObject *kwnames)
{
    static const hb_signature signature = {
        "quantize_8bit", 2, 3, 3, 6, {"x", "map", "blocksize", "dtype", "codes", "absmax"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[6];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    int64_t blocksize = 0;
    const float *map = NULL;
    hb_origin origin = {0};
    hb_array x = {0}, map_array = {0}, codes = {0}, absmax = {0};
    PyObject *codes_object = NULL, *absmax_object = NULL, *result = NULL;
    if (hb_arg_blocksize8(function, "blocksize", value[2], &blocksize) < 0 ||
        hb_quantizer_input(state, function, "x", value[0], value[3], &x) < 0 ||
        (origin = hb_origin_of(&x),
         hb_map8_get(state, value[1], function, "map", 0, &origin, &map_array, &map) < 0))
        goto done;
    const int64_t n_blocks = hb_ceil_div(hb_view_numel(&x.view), blocksize);
    codes_object = hb_output_flat(state, value[4], function, "codes", &origin, HB_U8, x.view.ndim,
                                  x.view.shape, &codes);
    if (codes_object == NULL) goto done;
    absmax_object =
        hb_output_flat(state, value[5], function, "absmax", &origin, HB_F32, 1, &n_blocks, &absmax);
    if (absmax_object == NULL) goto done;
    if (hb_given(value[4]) &&
        (hb_check_overlap(function, "codes", &codes, "x", &x) < 0 ||
         hb_check_overlap_bytes(function, "codes", &codes, "map", map, 1024) < 0))
        goto done;
    if (hb_given(value[5]) &&
        (hb_check_overlap(function, "absmax", &absmax, "x", &x) < 0 ||
         hb_check_overlap(function, "absmax", &absmax, "codes", &codes) < 0 ||
         hb_check_overlap_bytes(function, "absmax", &absmax, "map", map, 1024) < 0))
        goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_quantize_8bit(&state->context, &x.view, map, blocksize,
                                            codes.view.data, absmax.view.data, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = PyTuple_Pack(2, codes_object, absmax_object);
done:
    Py_XDECREF(codes_object);
    Py_XDECREF(absmax_object);
    hb_array_release(&codes);
    hb_array_release(&absmax);
    hb_array_release(&map_array);
    hb_array_release(&x);
    return result;
}

PyDoc_STRVAR(dequantize_8bit_doc,
             "dequantize_8bit($module, codes, absmax, map, /, blocksize, dtype=None, *, out=None)"
             "\n--\n\nmap[codes] * absmax of the block, in the shape of codes.");

static PyObject *dequantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                 PyObject *kwnames)
{
    static const hb_signature signature = {
        "dequantize_8bit", 3, 5, 4, 6, {"codes", "absmax", "map", "blocksize", "dtype", "out"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[6];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_dtype dtype;
    hb_tensor8 tensor = {0};
    hb_origin origin = {0};
    hb_array codes = {0}, absmax = {0}, map = {0};
    PyObject *result = NULL;
    if (hb_arg_blocksize8(function, "blocksize", value[3], &tensor.blocksize) < 0 ||
        hb_result_dtype(state, function, value[4], value[5], HB_F32, &dtype) < 0 ||
        hb_array_get(state, value[0], function, "codes", HB_TAKE_U8 | HB_TAKE_FLAT, &codes) < 0 ||
        hb_array_get(state, value[1], function, "absmax", HB_TAKE_F32 | HB_TAKE_FLAT, &absmax) <
            0 ||
        (origin = hb_origin_of(&codes),
         hb_check_device(function, "absmax", &absmax, &origin.device) < 0) ||
        hb_map8_get(state, value[2], function, "map", 0, &origin, &map, &tensor.map) < 0 ||
        hb_check_numel(function, "absmax", &absmax,
                       hb_ceil_div(hb_view_numel(&codes.view), tensor.blocksize)) < 0)
        goto done;
    tensor.codes = codes.view.data;
    tensor.absmax = absmax.view.data;
    result = hb_dequantize8_run(state, function, &tensor, dtype, &origin, codes.view.ndim,
                                codes.view.shape, value[5]);
done:
    hb_array_release(&codes);
    hb_array_release(&absmax);
    hb_array_release(&map);
    return result;
}

PyDoc_STRVAR(
    quantize_rows_int8_doc,
    "quantize_rows_int8($module, x, /, threshold=0.0, *, dtype=None, codes=None, scale=None)"
    "\n--\n\n-> (codes int8, shape of x; scale float32 [rows]; outlier columns bool [depth], "
    "or None when threshold is 0).");

static PyObject *quantize_rows_int8(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {
        "quantize_rows_int8", 1, 2, 1, 5, {"x", "threshold", "dtype", "codes", "scale"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[5];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    float threshold = 0.0f;
    hb_array x = {0}, codes = {0}, scale = {0}, outliers = {0};
    PyObject *codes_object = NULL, *scale_object = NULL, *outliers_object = NULL, *result = NULL;
    if (hb_arg_threshold(function, value[1], &threshold) < 0 ||
        hb_quantizer_input(state, function, "x", value[0], value[2], &x) < 0)
        goto done;
    if (x.view.ndim == 0) {
        PyErr_Format(PyExc_ValueError, "%s: x, expected shape [..., depth], got a scalar",
                     function);
        goto done;
    }
    const int64_t depth = x.view.shape[x.view.ndim - 1];
    int64_t rows = 1;
    for (int d = 0; d < x.view.ndim - 1; d++) rows *= x.view.shape[d];
    const hb_origin origin = hb_origin_of(&x);
    codes_object = hb_output_flat(state, value[3], function, "codes", &origin, HB_I8, x.view.ndim,
                                  x.view.shape, &codes);
    if (codes_object == NULL) goto done;
    scale_object =
        hb_output_flat(state, value[4], function, "scale", &origin, HB_F32, 1, &rows, &scale);
    if (scale_object == NULL) goto done;
    if (threshold > 0.0f)
        outliers_object =
            hb_output(state, NULL, function, "outliers", &origin, HB_BOOL, 1, &depth, 0, &outliers);
    else
        outliers_object = Py_NewRef(Py_None);
    if (outliers_object == NULL) goto done;
    if (hb_given(value[3]) && hb_check_overlap(function, "codes", &codes, "x", &x) < 0) goto done;
    if (hb_given(value[4]) && (hb_check_overlap(function, "scale", &scale, "x", &x) < 0 ||
                               hb_check_overlap(function, "scale", &scale, "codes", &codes) < 0))
        goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_quantize_rows_int8(&state->context, &x.view, threshold, codes.view.data,
                                         scale.view.data,
                                         threshold > 0.0f ? outliers.view.data : NULL, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = PyTuple_Pack(3, codes_object, scale_object, outliers_object);
done:
    Py_XDECREF(codes_object);
    Py_XDECREF(scale_object);
    Py_XDECREF(outliers_object);
    hb_array_release(&codes);
    hb_array_release(&scale);
    hb_array_release(&outliers);
    hb_array_release(&x);
    return result;
}

PyDoc_STRVAR(dequantize_rows_int8_doc,
             "dequantize_rows_int8($module, codes, scale, /, dtype=None, *, out=None)\n--\n\n"
             "codes * scale / 127, in the shape of codes.");

static PyObject *dequantize_rows_int8(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                      PyObject *kwnames)
{
    static const hb_signature signature = {
        "dequantize_rows_int8", 2, 3, 2, 4, {"codes", "scale", "dtype", "out"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_dtype dtype;
    hb_rows8 rows;
    if (hb_result_dtype(state, function, value[2], value[3], HB_F32, &dtype) < 0 ||
        hb_rows8_get(state, function, value[0], value[1], 0, &rows) < 0)
        return NULL;
    const hb_origin origin = hb_origin_of(&rows.codes);
    PyObject *result =
        hb_dequantize_rows8_run(state, function, rows.codes.view.data, rows.scale.view.data, dtype,
                                &origin, rows.codes.view.ndim, rows.codes.view.shape, value[3]);
    hb_rows8_release(&rows);
    return result;
}

PyDoc_STRVAR(matmul_int8_doc,
             "matmul_int8($module, a, b, /, *, out=None)\n--\n\n"
             "a int8 [..., depth], b int8 [rows, depth] -> int32 [..., rows], exact.");

static PyObject *matmul_int8(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const hb_signature signature = {"matmul_int8", 2, 2, 2, 3, {"a", "b", "out"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[3];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_array a = {0}, b = {0}, c = {0};
    PyObject *object = NULL, *result = NULL;
    int64_t shape[HB_MAX_NDIM];
    if (hb_array_get(state, value[0], function, "a", HB_TAKE_I8 | HB_TAKE_FLAT, &a) < 0 ||
        hb_array_get(state, value[1], function, "b", HB_TAKE_I8 | HB_TAKE_FLAT, &b) < 0)
        goto done;
    if (b.view.ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: b, expected shape [rows, depth], got %d dimensions",
                     function, b.view.ndim);
        goto done;
    }
    const int64_t rows = b.view.shape[0], depth = b.view.shape[1];
    const hb_origin origin = hb_origin_of(&a);
    if (hb_layer_shape(function, "a", &a.view, rows, depth, false, shape) < 0 ||
        hb_check_device(function, "b", &b, &origin.device) < 0)
        goto done;
    object = hb_output(state, value[2], function, "out", &origin, HB_I32, a.view.ndim, shape,
                       HB_TAKE_FLAT, &c);
    if (object == NULL) goto done;
    if (hb_given(value[2]) && (hb_check_overlap(function, "out", &c, "a", &a) < 0 ||
                               hb_check_overlap(function, "out", &c, "b", &b) < 0))
        goto done;
    int64_t m = 1;
    for (int d = 0; d < a.view.ndim - 1; d++) m *= shape[d];
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_matmul_int8(&state->context, &origin.device, a.view.data, b.view.data,
                                          m, rows, depth, c.view.data, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = Py_NewRef(object);
done:
    Py_XDECREF(object);
    hb_array_release(&a);
    hb_array_release(&b);
    hb_array_release(&c);
    return result;
}

PyDoc_STRVAR(
    linear_8bit_doc,
    "linear_8bit($module, x, codes, scale, /, bias=None, threshold=0.0, mode='dynamic', *, "
    "out=None)\n--\n\n"
    "y = x W^T + b for a row-wise int8 W: x [..., depth] -> [..., rows].");

static PyObject *linear_8bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const hb_signature signature = {
        "linear_8bit", 3, 6, 3, 7, {"x", "codes", "scale", "bias", "threshold", "mode", "out"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[7];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_linear8_call call = {.function = function, .input_name = "x"};
    int mode = HB_INT8_DYNAMIC;
    hb_rows8 rows;
    hb_array bias = {0};
    if (hb_arg_threshold(function, value[4], &call.threshold) < 0 ||
        hb_arg_choice(function, "mode", value[5], hb_mode_names, &mode) < 0 ||
        hb_rows8_get(state, function, value[1], value[2], 0, &rows) < 0)
        return NULL;
    PyObject *result = NULL;
    call.device = rows.codes.view.device;
    if (hb_rows8_check_matrix(function, &rows) < 0) goto done;
    if (hb_given(value[3])) {
        if (hb_bias_get(state, value[3], function, rows.rows, &call.device, 0, &bias) < 0)
            goto done;
        call.bias = &bias.view;
    }
    call.mode = (hb_int8_mode)mode;
    result = hb_linear8_run(state, &call, rows.codes.view.data, rows.scale.view.data, rows.rows,
                            rows.depth, value[0], value[6]);
done:
    hb_array_release(&bias);
    hb_rows8_release(&rows);
    return result;
}

PyDoc_STRVAR(linear_8bit_grad_input_doc,
             "linear_8bit_grad_input($module, dy, codes, scale, /, *, out=None)\n--\n\n"
             "dx = dy W: dy [..., rows] -> [..., depth].");

static PyObject *linear_8bit_grad_input(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                        PyObject *kwnames)
{
    static const hb_signature signature = {"linear_8bit_grad_input",       3, 3, 3, 4,
                                           {"dy", "codes", "scale", "out"}};
    hb_state *state = hb_state_of_module(module);
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_linear8_call call = {.function = signature.function, .input_name = "dy", .backward = true};
    hb_rows8 rows;
    if (hb_rows8_get(state, signature.function, value[1], value[2], 0, &rows) < 0) return NULL;
    PyObject *result = NULL;
    call.device = rows.codes.view.device;
    if (hb_rows8_check_matrix(signature.function, &rows) == 0)
        result = hb_linear8_run(state, &call, rows.codes.view.data, rows.scale.view.data, rows.rows,
                                rows.depth, value[0], value[3]);
    hb_rows8_release(&rows);
    return result;
}

PyDoc_STRVAR(map8_doc, "map8($module, name, /)\n--\n\nThe 256 values of a named map, ascending.");

static PyObject *map8(PyObject *module, PyObject *name)
{
    if (!PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "map8: name, expected str, got %s", Py_TYPE(name)->tp_name);
        return NULL;
    }
    const float *map = NULL;
    const hb_origin numpy = {.device = {.type = HB_CPU}};
    hb_array unused;
    hb_state *state = hb_state_of_module(module);
    if (hb_map8_get(state, name, "map8", "map", 0, &numpy, &unused, &map) < 0) return NULL;
    const int64_t size = 256;
    void *data;
    PyObject *array = hb_numpy_new(HB_F32, 1, &size, &data);
    if (array != NULL) memcpy(data, map, 256 * sizeof(float));
    return array;
}

PyMethodDef hb_functions_8bit[] = {
    {"quantize_8bit", HB_FASTCALL(quantize_8bit), quantize_8bit_doc},
    {"dequantize_8bit", HB_FASTCALL(dequantize_8bit), dequantize_8bit_doc},
    {"quantize_rows_int8", HB_FASTCALL(quantize_rows_int8), quantize_rows_int8_doc},
    {"dequantize_rows_int8", HB_FASTCALL(dequantize_rows_int8), dequantize_rows_int8_doc},
    {"matmul_int8", HB_FASTCALL(matmul_int8), matmul_int8_doc},
    {"linear_8bit", HB_FASTCALL(linear_8bit), linear_8bit_doc},
    {"linear_8bit_grad_input", HB_FASTCALL(linear_8bit_grad_input), linear_8bit_grad_input_doc},
    {"map8", map8, METH_O, map8_doc},
    {NULL, NULL, 0, NULL},
};
