// rms_norm, gate, rotate, attend: the small operations between a model's matrix products
// (ops_fused.c, ops_attention.c).
#include "python/common.h"
#include "python/functions.h"

static const char *const activation_names[] = {"silu", "gelu_tanh", NULL};

PyDoc_STRVAR(
    rms_norm_doc,
    "rms_norm($module, x, weight, eps, /)\n--\n\n"
    "y = weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension, rounded where\n"
    "transformers' LlamaRMSNorm rounds: x [..., n] and weight [n] of one dtype, float32, bfloat16\n"
    "or float16, in memory of the CPU, with contiguous rows.");

static PyObject *rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    hb_state *state = hb_state_of_module(module);
    hb_array x = {.owner = NULL}, w = {.owner = NULL}, y = {.owner = NULL};
    PyObject *object = NULL;
    if (n_args != 3)
        return PyErr_Format(PyExc_TypeError, "rms_norm: expected 3 arguments, got %zd", n_args);
    float eps = 0;
    if (hb_arg_float("rms_norm", "eps", args[2], &eps) < 0 ||
        hb_array_get(state, args[0], "rms_norm", "x", HB_TAKE_IO, &x) < 0 ||
        hb_array_get(state, args[1], "rms_norm", "weight", HB_TAKE_IO, &w) < 0)
        goto done;
    const hb_origin origin = hb_origin_of(&x);
    object = hb_output(state, NULL, "rms_norm", "out", &origin, x.view.dtype, x.view.ndim,
                       x.view.shape, 0, &y);
    if (object == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_rms_norm(&state->context, &x.view, &w.view, eps, &y.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(object);
    }
done:
    hb_array_release(&x);
    hb_array_release(&w);
    hb_array_release(&y);
    return object;
}

PyDoc_STRVAR(
    gate_doc,
    "gate($module, gate, up, activation, /)\n--\n\n"
    "round(f(gate)) * up, rounded: two arrays of one shape and dtype, float32, bfloat16 or\n"
    "float16, in memory of the CPU, with contiguous rows. activation: 'silu' or 'gelu_tanh'.");

static PyObject *gate(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    hb_state *state = hb_state_of_module(module);
    hb_array g = {.owner = NULL}, up = {.owner = NULL}, y = {.owner = NULL};
    PyObject *object = NULL;
    if (n_args != 3)
        return PyErr_Format(PyExc_TypeError, "gate: expected 3 arguments, got %zd", n_args);
    int f = HB_SILU;
    if (hb_arg_choice("gate", "activation", args[2], activation_names, &f) < 0 ||
        hb_array_get(state, args[0], "gate", "gate", HB_TAKE_IO, &g) < 0 ||
        hb_array_get(state, args[1], "gate", "up", HB_TAKE_IO, &up) < 0)
        goto done;
    const hb_origin origin = hb_origin_of(&g);
    object = hb_output(state, NULL, "gate", "out", &origin, g.view.dtype, g.view.ndim, g.view.shape,
                       0, &y);
    if (object == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_gate(&state->context, &g.view, &up.view, (hb_activation)f, &y.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(object);
    }
done:
    hb_array_release(&g);
    hb_array_release(&up);
    hb_array_release(&y);
    return object;
}

PyDoc_STRVAR(
    rotate_doc,
    "rotate($module, x, cos, sin, /)\n--\n\n"
    "The rotary embedding of one token: round(x cos) + round((-second half, first half) sin),\n"
    "rounded. x [batch, heads, 1, depth], cos and sin [1 or batch, 1, depth], all of one dtype,\n"
    "float32, bfloat16 or float16, in memory of the CPU, with contiguous rows.");

static PyObject *rotate(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    hb_state *state = hb_state_of_module(module);
    hb_array in[3] = {{.owner = NULL}}, y = {.owner = NULL};
    static const char *const names[3] = {"x", "cos", "sin"};
    PyObject *object = NULL;
    if (n_args != 3)
        return PyErr_Format(PyExc_TypeError, "rotate: expected 3 arguments, got %zd", n_args);
    for (int i = 0; i < 3; i++)
        if (hb_array_get(state, args[i], "rotate", names[i], HB_TAKE_IO, &in[i]) < 0) goto done;
    const hb_view *x = &in[0].view;
    const hb_origin origin = hb_origin_of(&in[0]);
    object = hb_output(state, NULL, "rotate", "out", &origin, x->dtype, x->ndim, x->shape, 0, &y);
    if (object == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_rotate(&state->context, x, &in[1].view, &in[2].view, &y.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(object);
    }
done:
    for (int i = 0; i < 3; i++) hb_array_release(&in[i]);
    hb_array_release(&y);
    return object;
}

PyDoc_STRVAR(
    attend_doc,
    "attend($module, q, k, v, scale, /)\n--\n\n"
    "softmax(scale q k^T) v for one token: q [batch, heads, 1, depth], k and v [batch, groups,\n"
    "length, depth] -> [batch, 1, heads, depth], heads a multiple of groups; all of one dtype,\n"
    "float32, bfloat16 or float16, in memory of the CPU, with contiguous rows.");

static PyObject *attend(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    hb_state *state = hb_state_of_module(module);
    hb_array in[3] = {{.owner = NULL}}, y = {.owner = NULL};
    static const char *const names[3] = {"q", "k", "v"};
    PyObject *object = NULL;
    float scale = 0;
    if (n_args != 4)
        return PyErr_Format(PyExc_TypeError, "attend: expected 4 arguments, got %zd", n_args);
    if (hb_arg_float("attend", "scale", args[3], &scale) < 0) return NULL;
    for (int i = 0; i < 3; i++)
        if (hb_array_get(state, args[i], "attend", names[i], HB_TAKE_IO, &in[i]) < 0) goto done;
    const hb_view *q = &in[0].view;
    if (q->ndim != 4) {
        PyErr_Format(PyExc_ValueError, "attend: q, expected 4 dimensions, got %d", q->ndim);
        goto done;
    }
    const int64_t shape[4] = {q->shape[0], 1, q->shape[1], q->shape[3]};
    const hb_origin origin = hb_origin_of(&in[0]);
    object = hb_output(state, NULL, "attend", "out", &origin, q->dtype, 4, shape, 0, &y);
    if (object == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_attend(&state->context, q, &in[1].view, &in[2].view, scale, &y.view, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(object);
    }
done:
    for (int i = 0; i < 3; i++) hb_array_release(&in[i]);
    hb_array_release(&y);
    return object;
}

PyMethodDef hb_functions_fused[] = {
    {"rotate", (PyCFunction)(void (*)(void))rotate, METH_FASTCALL, rotate_doc},
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
    {"rms_norm", (PyCFunction)(void (*)(void))rms_norm, METH_FASTCALL, rms_norm_doc},
    {"gate", (PyCFunction)(void (*)(void))gate, METH_FASTCALL, gate_doc},
    {NULL, NULL, 0, NULL},
};
