// grouped_linear_4bit, grouped_linear_8bit, gather_4bit: products with a stack of weights, one for
// each expert, and rows of a table. On CUDA only: on the CPU the loop over experts is the caller's,
// who knows the offsets there.
#include "python/common.h"
#include "python/functions.h"
#include "python/weights4.h"
#include "python/weights8.h"

#include "core/ops_cuda.h"

static int check_cuda(const char *function, const hb_array *array, const char *name)
{
    if (array->view.device.type == HB_CUDA) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s, expected an array on a CUDA device, got one on cpu",
                 function, name);
    return -1;
}

// The stack's shape, (experts, rows, depth), and its weights.
static int get_stack(hb_state *state, const char *function, const hb_weights4_args *args,
                     PyObject *shape_object, int expected_ndim, int64_t *shape,
                     hb_weights4 *weights)
{
    int ndim = 0;
    int64_t numel = 0;
    if (hb_arg_shape(function, "shape", shape_object, &ndim, shape, &numel) < 0) return -1;
    if (ndim != expected_ndim) {
        PyErr_Format(PyExc_ValueError, "%s: shape, expected %d sizes, got %R", function,
                     expected_ndim, shape_object);
        return -1;
    }
    if (hb_weights4_get(state, function, args, 0, weights) < 0) return -1;
    if (hb_weights4_set_numel(function, weights, numel) < 0 ||
        check_cuda(function, &weights->packed, "packed") < 0) {
        hb_weights4_release(weights);
        return -1;
    }
    weights->tensor.rows = shape[ndim - 2];
    weights->tensor.depth = shape[ndim - 1];
    return 0;
}

// What both products share: x, offsets, and y, which is made here.
typedef struct {
    const char *function;
    bool transposed;
    hb_array x, offsets, y;
    PyObject *result, *scratch;
    void *workspace;
    hb_status status;
    hb_error error;
} grouped_call;

static int call_begin(hb_state *state, grouped_call *call, PyObject *x, PyObject *offsets,
                      const hb_device *device, const int64_t *shape)
{
    const char *function = call->function;
    if (hb_array_get(state, x, function, "x", HB_TAKE_IO | HB_TAKE_FLAT, &call->x) < 0 ||
        hb_array_get(state, offsets, function, "offsets", HB_TAKE_I32 | HB_TAKE_I64 | HB_TAKE_FLAT,
                     &call->offsets) < 0 ||
        hb_check_device(function, "x", &call->x, device) < 0 ||
        hb_check_device(function, "offsets", &call->offsets, device) < 0 ||
        hb_check_numel(function, "offsets", &call->offsets, shape[0]) < 0)
        return -1;
    if (call->x.view.ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: x, expected 2 dimensions, got %d", function,
                     call->x.view.ndim);
        return -1;
    }
    int64_t sizes[HB_MAX_NDIM];
    if (hb_layer_shape(function, "x", &call->x.view, shape[1], shape[2], call->transposed, sizes) <
        0)
        return -1;
    const hb_origin origin = hb_origin_of(&call->x);
    call->result =
        hb_output(state, NULL, function, "y", &origin, call->x.view.dtype, 2, sizes, 0, &call->y);
    return call->result == NULL ? -1 : 0;
}

static int call_workspace(grouped_call *call, int64_t bytes)
{
    const hb_origin origin = hb_origin_of(&call->x);
    return hb_workspace_new(call->function, &origin, bytes, &call->scratch, &call->workspace);
}

// `failed`: an exception is set.
static PyObject *call_end(hb_state *state, grouped_call *call, bool failed)
{
    if (!failed && call->status != HB_OK) hb_raise(state, call->status, &call->error);
    if (failed || call->status != HB_OK) Py_CLEAR(call->result);
    hb_array_release(&call->x);
    hb_array_release(&call->offsets);
    hb_array_release(&call->y);
    Py_CLEAR(call->scratch);
    return call->result;
}

PyDoc_STRVAR(grouped_linear_4bit_doc,
             "grouped_linear_4bit($module, x, offsets, packed, absmax, /, quant_type, blocksize, "
             "shape, transposed=False, *, nested_absmax=None, nested_map=None, nested_offset=0.0, "
             "nested_blocksize=256)\n--\n\n"
             "Rows [offsets[e-1], offsets[e]) of x times expert e's matrix of a stack (experts, "
             "rows, depth): x W[e]^T, transposed: x W[e]. CUDA only.");

static PyObject *grouped_linear_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                     PyObject *kwnames)
{
    static const hb_signature signature = {"grouped_linear_4bit",
                                           4,
                                           8,
                                           7,
                                           12,
                                           {"x", "offsets", "packed", "absmax", "quant_type",
                                            "blocksize", "shape", "transposed", "nested_absmax",
                                            "nested_map", "nested_offset", "nested_blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[12];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[2], value[3], value[4],  value[5],
                                           value[8], value[9], value[10], value[11]};
    grouped_call call = {.function = function};
    int64_t shape[HB_MAX_NDIM];
    hb_weights4 weights;
    if (hb_arg_bool(function, "transposed", value[7], &call.transposed) < 0 ||
        get_stack(state, function, &weights_args, value[6], 3, shape, &weights) < 0)
        return NULL;
    const bool failed =
        call_begin(state, &call, value[0], value[1], &weights.tensor.device, shape) < 0 ||
        call_workspace(&call, hb_grouped_linear_4bit_workspace(&call.x.view, &call.offsets.view,
                                                               &weights.tensor, call.transposed)) <
            0;
    if (!failed)
        HB_WITHOUT_GIL(call.status,
                       hb_grouped_linear_4bit_cuda(&call.x.view, &call.offsets.view,
                                                   &weights.tensor, call.transposed, &call.y.view,
                                                   call.workspace, &call.error));
    PyObject *result = call_end(state, &call, failed);
    hb_weights4_release(&weights);
    return result;
}

PyDoc_STRVAR(grouped_linear_8bit_doc,
             "grouped_linear_8bit($module, x, offsets, codes, scale, /, transposed=False, "
             "threshold=0.0, mode='dynamic')\n--\n\n"
             "The same with codes int8 [experts, rows, depth] and scale [experts, rows]. Outlier "
             "columns are those of all rows of x together. CUDA only.");

static PyObject *grouped_linear_8bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                     PyObject *kwnames)
{
    static const hb_signature signature = {
        "grouped_linear_8bit",
        4,
        7,
        4,
        7,
        {"x", "offsets", "codes", "scale", "transposed", "threshold", "mode"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[7];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    grouped_call call = {.function = function};
    int mode = HB_INT8_DYNAMIC;
    float threshold = 0.0f;
    hb_rows8 weights;
    if (hb_arg_bool(function, "transposed", value[4], &call.transposed) < 0 ||
        hb_arg_threshold(function, value[5], &threshold) < 0 ||
        hb_arg_choice(function, "mode", value[6], hb_mode_names, &mode) < 0 ||
        hb_rows8_get(state, function, value[2], value[3], 0, &weights) < 0)
        return NULL;
    const hb_view *codes = &weights.codes.view;
    bool failed = check_cuda(function, &weights.codes, "codes") < 0;
    if (!failed && codes->ndim != 3) {
        PyErr_Format(PyExc_ValueError, "%s: codes, expected 3 dimensions, got %d", function,
                     codes->ndim);
        failed = true;
    }
    failed = failed || call_begin(state, &call, value[0], value[1], &codes->device, codes->shape);
    if (!failed) {
        const hb_stack8 stack = {.codes = codes->data,
                                 .scale = weights.scale.view.data,
                                 .experts = codes->shape[0],
                                 .rows = codes->shape[1],
                                 .depth = codes->shape[2],
                                 .mode = (hb_int8_mode)mode,
                                 .threshold = threshold};
        failed =
            call_workspace(&call, hb_grouped_linear_8bit_workspace(&call.x.view, &call.offsets.view,
                                                                   &stack, call.transposed)) < 0;
        if (!failed)
            HB_WITHOUT_GIL(call.status,
                           hb_grouped_linear_8bit_cuda(&call.x.view, &call.offsets.view, &stack,
                                                       call.transposed, &call.y.view,
                                                       call.workspace, &call.error));
    }
    PyObject *result = call_end(state, &call, failed);
    hb_rows8_release(&weights);
    return result;
}

PyDoc_STRVAR(gather_4bit_doc,
             "gather_4bit($module, index, packed, absmax, /, quant_type, blocksize, shape, "
             "dtype=None, *, nested_absmax=None, nested_map=None, nested_offset=0.0, "
             "nested_blocksize=256)\n--\n\n"
             "Rows of a table (rows, depth): index int64 [...] -> [..., depth]. An index counts "
             "from the end where negative; one outside gives a row of NaN. CUDA only.");

static PyObject *gather_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const hb_signature signature = {"gather_4bit",
                                           3,
                                           7,
                                           6,
                                           11,
                                           {"index", "packed", "absmax", "quant_type", "blocksize",
                                            "shape", "dtype", "nested_absmax", "nested_map",
                                            "nested_offset", "nested_blocksize"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[11];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[1], value[2], value[3], value[4],
                                           value[7], value[8], value[9], value[10]};
    hb_dtype dtype = HB_F32;
    int64_t shape[HB_MAX_NDIM], sizes[HB_MAX_NDIM];
    hb_array index = {0}, out = {0};
    hb_weights4 weights;
    if (hb_arg_dtype(function, "dtype", value[6], &dtype) < 0 ||
        get_stack(state, function, &weights_args, value[5], 2, shape, &weights) < 0)
        return NULL;
    PyObject *result = NULL;
    if (hb_array_get(state, value[0], function, "index", HB_TAKE_I64 | HB_TAKE_FLAT, &index) < 0 ||
        hb_check_device(function, "index", &index, &weights.tensor.device) < 0)
        goto done;
    if (index.view.ndim >= HB_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: index, expected at most %d dimensions, got %d",
                     function, HB_MAX_NDIM - 1, index.view.ndim);
        goto done;
    }
    for (int d = 0; d < index.view.ndim; d++) sizes[d] = index.view.shape[d];
    sizes[index.view.ndim] = shape[1];
    const hb_origin origin = hb_origin_of(&index);
    result = hb_output(state, NULL, function, "out", &origin, dtype, index.view.ndim + 1, sizes, 0,
                       &out);
    if (result == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_gather_4bit_cuda(index.view.data, &weights.tensor, &out.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(result);
    }
done:
    hb_array_release(&out);
    hb_array_release(&index);
    hb_weights4_release(&weights);
    return result;
}

PyMethodDef hb_functions_grouped[] = {
    {"grouped_linear_4bit", HB_FASTCALL(grouped_linear_4bit), grouped_linear_4bit_doc},
    {"grouped_linear_8bit", HB_FASTCALL(grouped_linear_8bit), grouped_linear_8bit_doc},
    {"gather_4bit", HB_FASTCALL(gather_4bit), gather_4bit_doc},
    {NULL, NULL, 0, NULL},
};
