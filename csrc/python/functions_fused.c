// rms_norm, gate, rotate, attend: the small operations between a model's matrix products
// (ops_fused.c, ops_attention.c).
#include "python/common.h"
#include "python/functions.h"

// A call: up to three arrays in, one out.
typedef struct {
    hb_state *state;
    const char *function;
    hb_array in[3], y;
    PyObject *result; // NULL unless call_output has made it
    hb_status status;
    hb_error error;
} fused_call;

// `expected` arguments, the first `arrays` of which are arrays called names[i]. call_end is due
// also on failure.
static int call_begin(fused_call *call, PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                      Py_ssize_t expected, int arrays, const char *const *names)
{
    call->state = hb_state_of_module(module);
    if (hb_args_count(call->function, n_args, expected) < 0) return -1;
    return hb_arrays_get(call->state, call->function, args, arrays, names, call->in);
}

// y of `shape` beside the first array, with its dtype.
static int call_output(fused_call *call, int ndim, const int64_t *shape)
{
    const hb_origin origin = hb_origin_of(&call->in[0]);
    call->result = hb_output(call->state, NULL, call->function, "out", &origin,
                             call->in[0].view.dtype, ndim, shape, 0, &call->y);
    return call->result == NULL ? -1 : 0;
}

static PyObject *call_end(fused_call *call)
{
    if (call->status != HB_OK) {
        hb_raise(call->state, call->status, &call->error);
        Py_CLEAR(call->result);
    }
    for (int i = 0; i < 3; i++) hb_array_release(&call->in[i]);
    hb_array_release(&call->y);
    return call->result;
}

PyDoc_STRVAR(
    rms_norm_doc,
    "rms_norm($module, x, weight, eps, /)\n--\n\n"
    "y = weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension, rounded where\n"
    "transformers' LlamaRMSNorm rounds: x [..., n] and weight [n] of one dtype, float32, bfloat16\n"
    "or float16, in memory of the CPU, with contiguous rows.");

static PyObject *rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const names[] = {"x", "weight"};
    fused_call call = {.function = "rms_norm"};
    const hb_view *x = &call.in[0].view, *w = &call.in[1].view;
    float eps = 0;
    if (call_begin(&call, module, args, n_args, 3, 2, names) == 0 &&
        hb_arg_float("rms_norm", "eps", args[2], &eps) == 0 &&
        call_output(&call, x->ndim, x->shape) == 0)
        HB_WITHOUT_GIL(call.status,
                       hb_rms_norm(&call.state->context, x, w, eps, &call.y.view, &call.error));
    return call_end(&call);
}

PyDoc_STRVAR(
    gate_doc,
    "gate($module, gate, up, activation, /)\n--\n\n"
    "round(f(gate)) * up, rounded: two arrays of one shape and dtype, float32, bfloat16 or\n"
    "float16, in memory of the CPU, with contiguous rows. activation: 'silu' or 'gelu_tanh'.");

static PyObject *gate(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const names[] = {"gate", "up"};
    fused_call call = {.function = "gate"};
    const hb_view *g = &call.in[0].view, *up = &call.in[1].view;
    int f = HB_SILU;
    if (call_begin(&call, module, args, n_args, 3, 2, names) == 0 &&
        hb_arg_choice("gate", "activation", args[2], hb_activation_names, &f) == 0 &&
        call_output(&call, g->ndim, g->shape) == 0)
        HB_WITHOUT_GIL(call.status, hb_gate(&call.state->context, g, up, (hb_activation)f,
                                            &call.y.view, &call.error));
    return call_end(&call);
}

PyDoc_STRVAR(
    rotate_doc,
    "rotate($module, x, cos, sin, /)\n--\n\n"
    "The rotary embedding of one token: round(x cos) + round((-second half, first half) sin),\n"
    "rounded. x [batch, heads, 1, depth], cos and sin [1 or batch, 1, depth], all of one dtype,\n"
    "float32, bfloat16 or float16, in memory of the CPU, with contiguous rows.");

static PyObject *rotate(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const names[] = {"x", "cos", "sin"};
    fused_call call = {.function = "rotate"};
    const hb_view *x = &call.in[0].view;
    if (call_begin(&call, module, args, n_args, 3, 3, names) == 0 &&
        call_output(&call, x->ndim, x->shape) == 0)
        HB_WITHOUT_GIL(call.status, hb_rotate(&call.state->context, x, &call.in[1].view,
                                              &call.in[2].view, &call.y.view, &call.error));
    return call_end(&call);
}

PyDoc_STRVAR(
    attend_doc,
    "attend($module, q, k, v, scale, /)\n--\n\n"
    "softmax(scale q k^T) v for one token: q [batch, heads, 1, depth], k and v [batch, groups,\n"
    "length, depth] -> [batch, 1, heads, depth], heads a multiple of groups; all of one dtype,\n"
    "float32, bfloat16 or float16, in memory of the CPU, with contiguous rows.");

static int attend_output(fused_call *call)
{
    const hb_view *q = &call->in[0].view;
    if (q->ndim != 4) {
        PyErr_Format(PyExc_ValueError, "attend: q, expected 4 dimensions, got %d", q->ndim);
        return -1;
    }
    const int64_t shape[4] = {q->shape[0], 1, q->shape[1], q->shape[3]};
    return call_output(call, 4, shape);
}

static PyObject *attend(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const names[] = {"q", "k", "v"};
    fused_call call = {.function = "attend"};
    const hb_view *q = &call.in[0].view;
    float scale = 0;
    if (call_begin(&call, module, args, n_args, 4, 3, names) == 0 &&
        hb_arg_float("attend", "scale", args[3], &scale) == 0 && attend_output(&call) == 0)
        HB_WITHOUT_GIL(call.status, hb_attend(&call.state->context, q, &call.in[1].view,
                                              &call.in[2].view, scale, &call.y.view, &call.error));
    return call_end(&call);
}

PyMethodDef hb_functions_fused[] = {
    {"rotate", (PyCFunction)(void (*)(void))rotate, METH_FASTCALL, rotate_doc},
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
    {"rms_norm", (PyCFunction)(void (*)(void))rms_norm, METH_FASTCALL, rms_norm_doc},
    {"gate", (PyCFunction)(void (*)(void))gate, METH_FASTCALL, gate_doc},
    {NULL, NULL, 0, NULL},
};
