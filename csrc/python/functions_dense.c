// linear_dense, linear_dense_few, linear_dense_rows.
#include "python/common.h"
#include "python/functions.h"

PyDoc_STRVAR(
    linear_dense_doc,
    "linear_dense($module, x, weight, /, bias=None, *, out=None)\n--\n\n"
    "y = x W^T + b for a plain W: x [..., depth], weight [rows, depth] -> [..., rows], all of one\n"
    "dtype, float32, bfloat16 or float16, in memory of the CPU; bias [rows] of any of the three.\n"
    "float32 sums, rounded once. For few rows of x: see linear_dense_rows.");

typedef struct {
    hb_array x, w, bias, y;
} operands;

// Whether a product is one of few rows that linear_dense is faster for; its shape fits.
static bool is_worth_it(const hb_state *state, const hb_view *x, const hb_view *w,
                        const hb_view *bias)
{
    if (w->ndim != 2 || x->ndim == 0 || x->dtype != w->dtype || x->device.type != HB_CPU ||
        w->device.type != HB_CPU || (w->stride[1] != 1 && w->shape[1] > 1) ||
        x->shape[x->ndim - 1] != w->shape[1])
        return false;
    if (bias != NULL && (bias->ndim != 1 || bias->shape[0] != w->shape[0] ||
                         bias->dtype != w->dtype || bias->device.type != HB_CPU))
        return false;
    int64_t rows = 1;
    for (int d = 0; d < x->ndim - 1; d++) rows *= x->shape[d];
    return rows > 0 && rows <= state->context.kernels.dense.until[w->dtype];
}

// value: x, weight, bias, out. The result; or NULL with an exception, or None when `few` and the
// product is not worth it. All of `held` is released by the caller.
static PyObject *run(hb_state *state, const char *function, PyObject *const *value, bool few,
                     operands *held)
{
    static const hb_device cpu = {.type = HB_CPU};
    const hb_view *bias = NULL;
    int64_t shape[HB_MAX_NDIM];
    if (hb_array_get(state, value[0], function, "x", HB_TAKE_IO, &held->x) < 0 ||
        hb_array_get(state, value[1], function, "weight", HB_TAKE_IO, &held->w) < 0)
        return NULL;
    const hb_view *x = &held->x.view, *w = &held->w.view;
    if (hb_given(value[2])) {
        if (hb_array_get(state, value[2], function, "bias", HB_TAKE_IO, &held->bias) < 0)
            return NULL;
        bias = &held->bias.view;
    }
    if (few && !is_worth_it(state, x, w, bias)) Py_RETURN_NONE;
    if (hb_check_device(function, "x", &held->x, &cpu) < 0 ||
        hb_check_device(function, "weight", &held->w, &cpu) < 0 ||
        (bias != NULL && hb_check_device(function, "bias", &held->bias, &cpu) < 0))
        return NULL;
    if (w->ndim != 2) {
        PyErr_Format(PyExc_ValueError,
                     "%s: weight, expected shape [rows, depth], got %d dimensions", function,
                     w->ndim);
        return NULL;
    }
    if (hb_layer_shape(function, "x", x, w->shape[0], w->shape[1], false, shape) < 0) return NULL;
    const hb_origin origin = hb_origin_of(&held->x);
    PyObject *object =
        hb_output(state, value[3], function, "out", &origin, x->dtype, x->ndim, shape, 0, &held->y);
    if (object == NULL) return NULL;
    if (hb_given(value[3]) &&
        (hb_check_overlap(function, "out", &held->y, "x", &held->x) < 0 ||
         hb_check_overlap(function, "out", &held->y, "weight", &held->w) < 0 ||
         (bias != NULL && hb_check_overlap(function, "out", &held->y, "bias", &held->bias) < 0)))
        goto error;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_linear_dense(&state->context, x, w, bias, &held->y.view, &error));
    if (status == HB_OK) return object;
    hb_raise(state, status, &error);
error:
    Py_DECREF(object);
    return NULL;
}

static PyObject *run_and_release(PyObject *module, const char *function, PyObject *const *value,
                                 bool few)
{
    operands held = {.x = {.owner = NULL}};
    PyObject *result = run(hb_state_of_module(module), function, value, few, &held);
    hb_array_release(&held.x);
    hb_array_release(&held.w);
    hb_array_release(&held.bias);
    hb_array_release(&held.y);
    return result;
}

static PyObject *linear_dense(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                              PyObject *kwnames)
{
    static const hb_signature signature = {
        "linear_dense", 2, 3, 2, 4, {"x", "weight", "bias", "out"}};
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    return run_and_release(module, signature.function, value, false);
}

PyDoc_STRVAR(
    linear_dense_few_doc,
    "linear_dense_few($module, x, weight, bias, /)\n--\n\n"
    "linear_dense, or None where the caller's own product is the one to use: more rows of\n"
    "x than linear_dense_rows, or operands that do not fit together.");

static PyObject *linear_dense_few(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    if (hb_args_count("linear_dense_few", n_args, 3) < 0) return NULL;
    PyObject *value[4] = {args[0], args[1], args[2], NULL};
    return run_and_release(module, "linear_dense", value, true);
}

PyDoc_STRVAR(linear_dense_rows_doc,
             "linear_dense_rows($module, dtype, /)\n--\n\n"
             "Rows of x up to which linear_dense was measured to be no slower than torch's dense\n"
             "product on processors with the instruction set in use; 0 where nobody measured.");

static PyObject *linear_dense_rows(PyObject *module, PyObject *value)
{
    hb_dtype dtype = HB_F32;
    if (hb_arg_dtype("linear_dense_rows", "dtype", value, &dtype) < 0) return NULL;
    return PyLong_FromLong(hb_state_of_module(module)->context.kernels.dense.until[dtype]);
}

PyMethodDef hb_functions_dense[] = {
    {"linear_dense", HB_FASTCALL(linear_dense), linear_dense_doc},
    {"linear_dense_few", (PyCFunction)(void (*)(void))linear_dense_few, METH_FASTCALL,
     linear_dense_few_doc},
    {"linear_dense_rows", linear_dense_rows, METH_O, linear_dense_rows_doc},
    {NULL, NULL, 0, NULL},
};
