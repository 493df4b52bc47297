// rms_norm, gate: the small operations between a model's matrix products (ops_fused.c).
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

PyMethodDef hb_functions_fused[] = {
    {"rms_norm", (PyCFunction)(void (*)(void))rms_norm, METH_FASTCALL, rms_norm_doc},
    {"gate", (PyCFunction)(void (*)(void))gate, METH_FASTCALL, gate_doc},
    {NULL, NULL, 0, NULL},
};
