// quantize_4bit, dequantize_4bit, nest_absmax, linear_4bit, linear_4bit_grad_input, codebook.
#include "python/common.h"
#include "python/functions.h"
#include "python/weights4.h"

#include "core/ops_cuda.h"

PyDoc_STRVAR(quantize_4bit_doc,
             "quantize_4bit($module, x, /, quant_type='nf4', blocksize=64, scales='absmax', *, "
             "dtype=None, packed=None, absmax=None)\n--\n\n"
             "-> (packed uint8 [(n + 1) // 2], absmax float32 [ceil(n / blocksize)]).");

static PyObject *quantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                               PyObject *kwnames)
{
    static const hb_signature signature = {
        "quantize_4bit",
        1,
        4,
        1,
        7,
        {"x", "quant_type", "blocksize", "scales", "dtype", "packed", "absmax"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[7];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;

    hb_format4 format = HB_NF4;
    int64_t blocksize = 64;
    int scales = HB_SCALES_ABSMAX;
    hb_array x = {0}, packed = {0}, absmax = {0};
    PyObject *packed_object = NULL, *absmax_object = NULL, *result = NULL;
    if (hb_arg_format4(function, "quant_type", value[1], &format) < 0 ||
        hb_arg_blocksize4(function, "blocksize", value[2], &blocksize) < 0 ||
        hb_arg_choice(function, "scales", value[3], hb_scales_names, &scales) < 0 ||
        hb_quantizer_input(state, function, "x", value[0], value[4], &x) < 0)
        goto done;
    const int64_t numel = hb_view_numel(&x.view);
    const int64_t bytes = hb_packed_bytes(numel), n_blocks = hb_ceil_div(numel, blocksize);
    const hb_origin origin = hb_origin_of(&x);
    packed_object =
        hb_output_flat(state, value[5], function, "packed", &origin, HB_U8, 1, &bytes, &packed);
    if (packed_object == NULL) goto done;
    absmax_object =
        hb_output_flat(state, value[6], function, "absmax", &origin, HB_F32, 1, &n_blocks, &absmax);
    if (absmax_object == NULL) goto done;
    if (hb_given(value[5]) && hb_check_overlap(function, "packed", &packed, "x", &x) < 0) goto done;
    if (hb_given(value[6]) && hb_check_overlap(function, "absmax", &absmax, "x", &x) < 0) goto done;
    if (hb_given(value[5]) && hb_given(value[6]) &&
        hb_check_overlap(function, "packed", &packed, "absmax", &absmax) < 0)
        goto done;

    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_quantize_4bit(&state->context, &x.view, format, blocksize, (hb_scales)scales,
                                    packed.view.data, absmax.view.data, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = PyTuple_Pack(2, packed_object, absmax_object);
done:
    Py_XDECREF(packed_object);
    Py_XDECREF(absmax_object);
    hb_array_release(&packed);
    hb_array_release(&absmax);
    hb_array_release(&x);
    return result;
}

PyDoc_STRVAR(
    dequantize_4bit_doc,
    "dequantize_4bit($module, packed, absmax, /, quant_type, blocksize, shape, dtype=None, *, "
    "start=0, out=None, nested_absmax=None, nested_map=None, nested_offset=0.0, "
    "nested_blocksize=256)\n--\n\n"
    "Elements [start, start + prod(shape)) of the flattened tensor, in `shape`.");

static PyObject *dequantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                 PyObject *kwnames)
{
    static const hb_signature signature = {"dequantize_4bit",
                                           2,
                                           6,
                                           5,
                                           12,
                                           {"packed", "absmax", "quant_type", "blocksize", "shape",
                                            "dtype", "start", "out", "nested_absmax", "nested_map",
                                            "nested_offset", "nested_blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[12];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[0], value[1], value[2],  value[3],
                                           value[8], value[9], value[10], value[11]};
    int ndim = 0;
    int64_t shape[HB_MAX_NDIM], count = 0, start = 0;
    hb_dtype dtype;
    hb_weights4 weights;
    if (hb_arg_shape(function, "shape", value[4], &ndim, shape, &count) < 0 ||
        hb_arg_int64(function, "start", value[6], &start) < 0 ||
        hb_result_dtype(state, function, value[5], value[7], HB_F32, &dtype) < 0 ||
        hb_weights4_get(state, function, &weights_args, 0, &weights) < 0)
        return NULL;
    PyObject *result = NULL;
    // The tensor's length is only known up to the last, maybe unused, nibble.
    const int64_t bytes = hb_view_numel(&weights.packed.view);
    int64_t numel = bytes * 2, end = 0;
    if (start < 0 || __builtin_add_overflow(start, count, &end) || end > numel) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: packed, expected the elements [%lld, %lld + %lld), got %lld bytes for %lld",
            function, (long long)start, (long long)start, (long long)count, (long long)bytes,
            (long long)numel);
        goto done;
    }
    if (end == numel - 1) numel = end;
    if (hb_weights4_set_numel(function, &weights, numel) < 0) goto done;
    weights.tensor.rows = 1;
    weights.tensor.depth = numel;
    const hb_origin origin = hb_origin_of(&weights.packed);
    result = hb_dequantize4_run(state, function, &weights.tensor, start, dtype, &origin, ndim,
                                shape, value[7]);
done:
    hb_weights4_release(&weights);
    return result;
}

PyDoc_STRVAR(nest_absmax_doc,
             "nest_absmax($module, absmax, /, blocksize=256)\n--\n\n"
             "-> (codes uint8 [n], nested_absmax float32 [ceil(n / blocksize)], offset). The "
             "offset is a float; of a CUDA absmax, float32 [1] on its device.");

static PyObject *nest_absmax(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const hb_signature signature = {"nest_absmax", 1, 2, 1, 2, {"absmax", "blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[2];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    int64_t blocksize = 256;
    hb_array absmax = {0}, codes = {0}, nested = {0}, offset = {0}, map_array = {0};
    const float *map;
    void *workspace = NULL;
    PyObject *codes_object = NULL, *nested_object = NULL, *offset_object = NULL, *scratch = NULL,
             *result = NULL;
    if (hb_arg_blocksize8(function, "blocksize", value[1], &blocksize) < 0 ||
        hb_array_get(state, value[0], function, "absmax", HB_TAKE_F32 | HB_TAKE_FLAT, &absmax) < 0)
        goto done;
    const int64_t n = hb_view_numel(&absmax.view), n_blocks = hb_ceil_div(n, blocksize);
    const hb_origin origin = hb_origin_of(&absmax);
    const bool cuda = origin.device.type == HB_CUDA;
    const int64_t one = 1;
    float mean = 0.0f;
    codes_object = hb_output(state, NULL, function, "codes", &origin, HB_U8, 1, &n, 0, &codes);
    if (codes_object == NULL) goto done;
    nested_object = hb_output(state, NULL, function, "nested_absmax", &origin, HB_F32, 1, &n_blocks,
                              0, &nested);
    if (nested_object == NULL) goto done;
    if (hb_map8_known(state, function, HB_MAP_DYNAMIC, &origin, &map_array, &map) < 0) goto done;
    if (cuda) {
        offset_object =
            hb_output(state, NULL, function, "offset", &origin, HB_F32, 1, &one, 0, &offset);
        if (offset_object == NULL ||
            hb_workspace_new(function, &origin,
                             hb_nest_absmax_workspace(&origin.device, n, blocksize), &scratch,
                             &workspace) < 0)
            goto done;
    }
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_nest_absmax(&state->context, &origin.device, absmax.view.data, n,
                                          blocksize, map, codes.view.data, nested.view.data,
                                          cuda ? offset.view.data : &mean, workspace, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else if (cuda)
        result = PyTuple_Pack(3, codes_object, nested_object, offset_object);
    else
        result = Py_BuildValue("OOd", codes_object, nested_object, (double)mean);
done:
    Py_XDECREF(codes_object);
    Py_XDECREF(nested_object);
    Py_XDECREF(offset_object);
    Py_XDECREF(scratch);
    hb_array_release(&offset);
    hb_array_release(&map_array);
    hb_array_release(&codes);
    hb_array_release(&nested);
    hb_array_release(&absmax);
    return result;
}

PyDoc_STRVAR(linear_4bit_doc,
             "linear_4bit($module, x, packed, absmax, /, quant_type, blocksize, shape, bias=None, "
             "compute='float32', *, out=None, nested_absmax=None, nested_map=None, "
             "nested_offset=0.0, nested_blocksize=256)\n--\n\n"
             "y = x W^T + b: x [..., depth] -> [..., rows]. On CUDA x's dtype decides how products "
             "are formed, not `compute`, of which int16 and int8 are for the processor only.");

static PyObject *linear_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const hb_signature signature = {"linear_4bit",
                                           3,
                                           8,
                                           6,
                                           13,
                                           {"x", "packed", "absmax", "quant_type", "blocksize",
                                            "shape", "bias", "compute", "out", "nested_absmax",
                                            "nested_map", "nested_offset", "nested_blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[13];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[1], value[2],  value[3],  value[4],
                                           value[9], value[10], value[11], value[12]};
    int compute = HB_COMPUTE_F32;
    hb_array bias = {0};
    hb_weights4 weights;
    if (hb_arg_choice(function, "compute", value[7], hb_compute_names, &compute) < 0 ||
        hb_weights4_matrix(state, function, &weights_args, value[5], &weights) < 0)
        return NULL;
    PyObject *result = NULL;
    if (hb_given(value[6]) && hb_bias_get(state, value[6], function, weights.tensor.rows,
                                          &weights.tensor.device, 0, &bias) < 0)
        goto done;
    const hb_linear4_call call = {.function = function,
                                  .input_name = "x",
                                  .compute = (hb_compute)compute,
                                  .bias = hb_given(value[6]) ? &bias.view : NULL};
    result = hb_linear4_run(state, &call, &weights.tensor, value[0], value[8]);
done:
    hb_array_release(&bias);
    hb_weights4_release(&weights);
    return result;
}

PyDoc_STRVAR(linear_4bit_grad_input_doc,
             "linear_4bit_grad_input($module, dy, packed, absmax, /, quant_type, blocksize, shape, "
             "compute='float32', *, out=None, nested_absmax=None, nested_map=None, "
             "nested_offset=0.0, nested_blocksize=256)\n--\n\n"
             "dx = dy W: dy [..., rows] -> [..., depth].");

static PyObject *linear_4bit_grad_input(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                        PyObject *kwnames)
{
    static const hb_signature signature = {"linear_4bit_grad_input",
                                           3,
                                           7,
                                           6,
                                           12,
                                           {"dy", "packed", "absmax", "quant_type", "blocksize",
                                            "shape", "compute", "out", "nested_absmax",
                                            "nested_map", "nested_offset", "nested_blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[12];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[1], value[2], value[3],  value[4],
                                           value[8], value[9], value[10], value[11]};
    int compute = HB_COMPUTE_F32;
    hb_weights4 weights;
    if (hb_arg_choice(function, "compute", value[6], hb_compute_names, &compute) < 0 ||
        hb_weights4_matrix(state, function, &weights_args, value[5], &weights) < 0)
        return NULL;
    const hb_linear4_call call = {
        .function = function, .input_name = "dy", .backward = true, .compute = (hb_compute)compute};
    PyObject *result = hb_linear4_run(state, &call, &weights.tensor, value[0], value[7]);
    hb_weights4_release(&weights);
    return result;
}

PyDoc_STRVAR(codebook_doc, "codebook($module, quant_type, /)\n--\n\n"
                           "The 16 values of a format by code, float32.");

static PyObject *codebook(PyObject *module, PyObject *quant_type)
{
    (void)module;
    hb_format4 format = HB_NF4;
    if (hb_arg_format4("codebook", "quant_type", quant_type, &format) < 0) return NULL;
    const int64_t size = 16;
    void *data;
    PyObject *array = hb_numpy_new(HB_F32, 1, &size, &data);
    if (array != NULL) memcpy(data, hb_codebook4_get(format)->value, 16 * sizeof(float));
    return array;
}

PyMethodDef hb_functions_4bit[] = {
    {"quantize_4bit", HB_FASTCALL(quantize_4bit), quantize_4bit_doc},
    {"dequantize_4bit", HB_FASTCALL(dequantize_4bit), dequantize_4bit_doc},
    {"nest_absmax", HB_FASTCALL(nest_absmax), nest_absmax_doc},
    {"linear_4bit", HB_FASTCALL(linear_4bit), linear_4bit_doc},
    {"linear_4bit_grad_input", HB_FASTCALL(linear_4bit_grad_input), linear_4bit_grad_input_doc},
    {"codebook", codebook, METH_O, codebook_doc},
    {NULL, NULL, 0, NULL},
};
