// linear_dense, linear_dense_rows.
#include "python/common.h"
#include "python/functions.h"

PyDoc_STRVAR(
    linear_dense_doc,
    "linear_dense($module, x, weight, /, bias=None, *, out=None)\n--\n\n"
    "y = x W^T + b for a plain W: x [..., depth], weight [rows, depth] -> [..., rows], all of one\n"
    "dtype, float32, bfloat16 or float16, in memory of the CPU; bias [rows] of any of the three.\n"
    "float32 sums, rounded once. For few rows of x: see linear_dense_rows.");

static PyObject *linear_dense(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                              PyObject *kwnames)
{
    static const hb_signature signature = {
        "linear_dense", 2, 3, 2, 4, {"x", "weight", "bias", "out"}};
    static const hb_device cpu = {.type = HB_CPU};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_array x = {0}, w = {0}, bias = {0}, y = {0};
    PyObject *object = NULL, *result = NULL;
    int64_t shape[HB_MAX_NDIM];
    if (hb_array_get(state, value[0], function, "x", HB_TAKE_IO, &x) < 0 ||
        hb_array_get(state, value[1], function, "weight", HB_TAKE_IO, &w) < 0 ||
        hb_check_device(function, "x", &x, &cpu) < 0 ||
        hb_check_device(function, "weight", &w, &cpu) < 0)
        goto done;
    if (w.view.ndim != 2) {
        PyErr_Format(PyExc_ValueError,
                     "%s: weight, expected shape [rows, depth], got %d dimensions", function,
                     w.view.ndim);
        goto done;
    }
    const int64_t rows = w.view.shape[0];
    const hb_origin origin = hb_origin_of(&x);
    if (hb_layer_shape(function, "x", &x.view, rows, w.view.shape[1], false, shape) < 0 ||
        (hb_given(value[2]) &&
         hb_bias_get(state, value[2], function, rows, &origin.device, 0, &bias) < 0))
        goto done;
    object = hb_output(state, value[3], function, "out", &origin, x.view.dtype, x.view.ndim, shape,
                       0, &y);
    if (object == NULL) goto done;
    if (hb_given(value[3]) &&
        (hb_check_overlap(function, "out", &y, "x", &x) < 0 ||
         hb_check_overlap(function, "out", &y, "weight", &w) < 0 ||
         (hb_given(value[2]) && hb_check_overlap(function, "out", &y, "bias", &bias) < 0)))
        goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_linear_dense(&state->context, &x.view, &w.view,
                                   hb_given(value[2]) ? &bias.view : NULL, &y.view, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = Py_NewRef(object);
done:
    Py_XDECREF(object);
    hb_array_release(&x);
    hb_array_release(&w);
    hb_array_release(&bias);
    hb_array_release(&y);
    return result;
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
    {"linear_dense_rows", linear_dense_rows, METH_O, linear_dense_rows_doc},
    {NULL, NULL, 0, NULL},
};
