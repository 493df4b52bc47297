// mlp_4bit, qkv_4bit, attend_4bit: parts of a transformer block (ops_block.c).
//
// A layer is a tuple (packed, absmax, quant_type, blocksize, shape, bias), with nested scales four
// more: nested_absmax, nested_map, nested_offset, nested_blocksize; all as linear_4bit takes them.
#include "python/common.h"
#include "python/functions.h"
#include "python/weights4.h"

enum { LAYER_ITEMS = 6, NESTED_ITEMS = 10 };

typedef struct {
    hb_weights4 weights;
    hb_array bias;
} layer4;

static int get_layer(hb_state *state, const char *function, const char *name, PyObject *tuple,
                     layer4 *result)
{
    static const hb_device cpu = {.type = HB_CPU};
    const Py_ssize_t n = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0;
    if (n != LAYER_ITEMS && n != NESTED_ITEMS) {
        PyErr_Format(PyExc_TypeError, "%s: %s, expected a tuple of %d or %d, got %s of %zd",
                     function, name, LAYER_ITEMS, NESTED_ITEMS, Py_TYPE(tuple)->tp_name, n);
        return -1;
    }
    PyObject *item[NESTED_ITEMS] = {NULL};
    for (Py_ssize_t i = 0; i < n; i++) item[i] = PyTuple_GET_ITEM(tuple, i);
    const hb_weights4_args args = {item[0], item[1], item[2], item[3],
                                   item[6], item[7], item[8], item[9]};
    if (hb_weights4_matrix(state, function, &args, item[4], &result->weights) < 0) return -1;
    if (hb_check_device(function, name, &result->weights.packed, &cpu) < 0) return -1;
    if (!hb_given(item[5])) return 0;
    return hb_bias_get(state, item[5], function, result->weights.tensor.rows,
                       &result->weights.tensor.device, 0, &result->bias);
}

static hb_linear4_item item_of(const layer4 *layer, const hb_view *y)
{
    return (hb_linear4_item){&layer->weights.tensor,
                             layer->bias.view.data == NULL ? NULL : &layer->bias.view, y};
}

// A call: up to three arrays and three layers in, up to three arrays out.
typedef struct {
    hb_state *state;
    const char *function;
    hb_array in[3], out[3];
    layer4 layers[3];
    PyObject *results[3]; // NULL until made
    int compute;
    hb_status status;
    hb_error error;
} block_call;

static void call_open(block_call *call, PyObject *module, const char *function)
{
    memset(call, 0, sizeof *call);
    call->state = hb_state_of_module(module);
    call->function = function;
    call->status = HB_OK;
}

static int get_layers(block_call *call, PyObject *const *args, int n, const char *const *names)
{
    for (int i = 0; i < n; i++)
        if (get_layer(call->state, call->function, names[i], args[i], &call->layers[i]) < 0)
            return -1;
    return 0;
}

static int get_compute(block_call *call, PyObject *value)
{
    return hb_arg_choice(call->function, "compute", value, hb_compute_names, &call->compute);
}

// Result i beside the first array, with its dtype.
static int make_output(block_call *call, int i, int ndim, const int64_t *shape)
{
    const hb_origin origin = hb_origin_of(&call->in[0]);
    call->results[i] = hb_output(call->state, NULL, call->function, "out", &origin,
                                 call->in[0].view.dtype, ndim, shape, 0, &call->out[i]);
    return call->results[i] == NULL ? -1 : 0;
}

// Releases everything but the results, which are NULL after a failure.
static void call_close(block_call *call)
{
    if (call->status != HB_OK) {
        hb_raise(call->state, call->status, &call->error);
        for (int i = 0; i < 3; i++) Py_CLEAR(call->results[i]);
    }
    for (int i = 0; i < 3; i++) {
        hb_array_release(&call->in[i]);
        hb_array_release(&call->out[i]);
        hb_weights4_release(&call->layers[i].weights);
        hb_array_release(&call->layers[i].bias);
    }
}

PyDoc_STRVAR(
    mlp_4bit_doc,
    "mlp_4bit($module, x, gate, up, down, activation, compute, /)\n--\n\n"
    "down(round(f(gate(x))) * up(x)) with three layers of 4 bits, to the bit what linear_4bit\n"
    "and gate give one after the other. A layer is a tuple (packed, absmax, quant_type,\n"
    "blocksize, shape, bias), and where scales are nested (..., nested_absmax, nested_map,\n"
    "nested_offset, nested_blocksize). In memory of the CPU, for few rows of x.");

static PyObject *mlp_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const arrays[] = {"x"}, *const layers[] = {"gate", "up", "down"};
    block_call call;
    call_open(&call, module, "mlp_4bit");
    int f = HB_SILU;
    int64_t shape[HB_MAX_NDIM];
    const hb_view *x = &call.in[0].view;
    const hb_tensor4 *up = &call.layers[1].weights.tensor, *down = &call.layers[2].weights.tensor;
    if (hb_args_count(call.function, n_args, 6) < 0 ||
        hb_arrays_get(call.state, call.function, args, 1, arrays, call.in) < 0 ||
        get_layers(&call, args + 1, 3, layers) < 0 ||
        hb_arg_choice("mlp_4bit", "activation", args[4], hb_activation_names, &f) < 0 ||
        get_compute(&call, args[5]) < 0 ||
        hb_layer_shape("mlp_4bit", "x", x, up->rows, up->depth, false, shape) < 0)
        goto done;
    shape[x->ndim - 1] = down->rows;
    if (make_output(&call, 0, x->ndim, shape) < 0) goto done;
    hb_linear4_item items[3];
    for (int i = 0; i < 3; i++) items[i] = item_of(&call.layers[i], NULL);
    HB_WITHOUT_GIL(call.status, hb_mlp_4bit(&call.state->context, x, &items[0], &items[1],
                                            &items[2], (hb_activation)f, (hb_compute)call.compute,
                                            &call.out[0].view, &call.error));
done:
    call_close(&call);
    return call.results[0];
}

PyDoc_STRVAR(
    qkv_4bit_doc,
    "qkv_4bit($module, x, q, k, v, cos, sin, depth, compute, /)\n--\n\n"
    "-> (q(x), k(x), v(x)), each [batch, heads, 1, depth], q and k rotated, for x [batch, 1, n]\n"
    "and three layers as mlp_4bit takes them, of heads * depth rows: to the bit what linear_4bit\n"
    "and rotate give. In memory of the CPU.");

static int qkv_outputs(block_call *call, int64_t depth)
{
    static const char *const layers[] = {"q", "k", "v"};
    const hb_view *x = &call->in[0].view;
    if (x->ndim != 3) {
        PyErr_Format(PyExc_ValueError, "qkv_4bit: x, expected 3 dimensions, got %d", x->ndim);
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        const int64_t rows = call->layers[i].weights.tensor.rows;
        if (depth < 1 || rows % depth != 0) {
            PyErr_Format(PyExc_ValueError,
                         "qkv_4bit: %s, expected a multiple of depth %lld rows, got %lld",
                         layers[i], (long long)depth, (long long)rows);
            return -1;
        }
        const int64_t shape[4] = {x->shape[0], rows / depth, 1, depth};
        if (make_output(call, i, 4, shape) < 0) return -1;
    }
    return 0;
}

static PyObject *qkv_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const arrays[] = {"x", "cos", "sin"}, *const layers[] = {"q", "k", "v"};
    block_call call;
    call_open(&call, module, "qkv_4bit");
    int64_t depth = 0;
    PyObject *result = NULL;
    if (hb_args_count(call.function, n_args, 8) < 0) goto done;
    PyObject *const in[3] = {args[0], args[4], args[5]};
    if (hb_arrays_get(call.state, call.function, in, 3, arrays, call.in) < 0 ||
        get_layers(&call, args + 1, 3, layers) < 0 ||
        hb_arg_int64("qkv_4bit", "depth", args[6], &depth) < 0 || get_compute(&call, args[7]) < 0 ||
        qkv_outputs(&call, depth) < 0)
        goto done;
    hb_linear4_item items[3];
    for (int i = 0; i < 3; i++) items[i] = item_of(&call.layers[i], &call.out[i].view);
    HB_WITHOUT_GIL(call.status,
                   hb_qkv_4bit(&call.state->context, &call.in[0].view, items, &call.in[1].view,
                               &call.in[2].view, (hb_compute)call.compute, &call.error));
    if (call.status == HB_OK)
        result = PyTuple_Pack(3, call.results[0], call.results[1], call.results[2]);
done:
    call_close(&call);
    for (int i = 0; i < 3; i++) Py_XDECREF(call.results[i]);
    return result;
}

PyDoc_STRVAR(
    attend_4bit_doc,
    "attend_4bit($module, q, k, v, scale, out, compute, /)\n--\n\n"
    "out(attend(q, k, v, scale)) with a layer as mlp_4bit takes them, of heads * depth columns:\n"
    "[batch, 1, rows], to the bit what attend and linear_4bit give. In memory of the CPU.");

static PyObject *attend_4bit(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const arrays[] = {"q", "k", "v"}, *const layers[] = {"out"};
    block_call call;
    call_open(&call, module, "attend_4bit");
    float scale = 0;
    if (hb_args_count(call.function, n_args, 6) < 0 ||
        hb_arrays_get(call.state, call.function, args, 3, arrays, call.in) < 0 ||
        hb_arg_float("attend_4bit", "scale", args[3], &scale) < 0 ||
        get_layers(&call, args + 4, 1, layers) < 0 || get_compute(&call, args[5]) < 0)
        goto done;
    const hb_view *in[3] = {&call.in[0].view, &call.in[1].view, &call.in[2].view};
    const int64_t shape[3] = {in[0]->ndim > 0 ? in[0]->shape[0] : 0, 1,
                              call.layers[0].weights.tensor.rows};
    if (make_output(&call, 0, 3, shape) < 0) goto done;
    const hb_linear4_item out = item_of(&call.layers[0], &call.out[0].view);
    HB_WITHOUT_GIL(call.status,
                   hb_attend_4bit(&call.state->context, in[0], in[1], in[2], scale, &out,
                                  (hb_compute)call.compute, &call.out[0].view, &call.error));
done:
    call_close(&call);
    return call.results[0];
}

PyMethodDef hb_functions_block[] = {
    {"mlp_4bit", (PyCFunction)(void (*)(void))mlp_4bit, METH_FASTCALL, mlp_4bit_doc},
    {"qkv_4bit", (PyCFunction)(void (*)(void))qkv_4bit, METH_FASTCALL, qkv_4bit_doc},
    {"attend_4bit", (PyCFunction)(void (*)(void))attend_4bit, METH_FASTCALL, attend_4bit_doc},
    {NULL, NULL, 0, NULL},
};
