#include "python/common.h"

int hb_result_dtype(hb_state *state, const char *function, PyObject *dtype, PyObject *out,
                    hb_dtype otherwise, hb_dtype *result)
{
    *result = otherwise;
    if (hb_given(dtype)) return hb_arg_dtype(function, "dtype", dtype, result);
    if (!hb_given(out)) return 0;
    hb_array array;
    if (hb_array_get(state, out, function, "out", HB_TAKE_IO | HB_TAKE_WRITABLE, &array) < 0)
        return -1;
    *result = array.view.dtype;
    hb_array_release(&array);
    return 0;
}

int hb_quantizer_input(hb_state *state, const char *function, const char *name, PyObject *x,
                       PyObject *dtype, hb_array *array)
{
    unsigned take = HB_TAKE_IO;
    hb_dtype wanted = HB_DTYPE_COUNT;
    if (hb_arg_dtype(function, "dtype", dtype, &wanted) < 0) return -1;
    if (wanted == HB_BF16) take |= HB_TAKE_U16_AS_BF16;
    if (hb_array_get(state, x, function, name, take, array) < 0) return -1;
    if (wanted == HB_DTYPE_COUNT || wanted == array->view.dtype) return 0;
    PyErr_Format(PyExc_TypeError, "%s: %s, expected dtype %s as `dtype` says, got %s", function,
                 name, hb_dtype_name(wanted), hb_dtype_name(array->view.dtype));
    hb_array_release(array);
    return -1;
}

int hb_check_shape(const char *function, PyObject *shape, const hb_array *array)
{
    int ndim = 0;
    int64_t sizes[HB_MAX_NDIM], numel = 0;
    if (hb_arg_shape(function, "shape", shape, &ndim, sizes, &numel) < 0) return -1;
    const hb_view *view = &array->view;
    bool same = ndim == view->ndim;
    for (int d = 0; same && d < ndim; d++) same = sizes[d] == view->shape[d];
    if (same) return 0;
    char expected[200];
    hb_shape_text(view->shape, view->ndim, expected, sizeof expected);
    PyErr_Format(PyExc_ValueError, "%s: shape, expected %s, got %S", function, expected, shape);
    return -1;
}

int hb_args_count(const char *function, Py_ssize_t n_args, Py_ssize_t expected)
{
    if (n_args == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, expected,
                 n_args);
    return -1;
}

int hb_arrays_get(hb_state *state, const char *function, PyObject *const *args, int n,
                  const char *const *names, hb_array *arrays)
{
    for (int i = 0; i < n; i++)
        if (hb_array_get(state, args[i], function, names[i], HB_TAKE_IO, &arrays[i]) < 0) return -1;
    return 0;
}

int hb_bias_get(hb_state *state, PyObject *object, const char *function, int64_t rows,
                const hb_device *device, unsigned take, hb_array *array)
{
    if (hb_array_get(state, object, function, "bias", HB_TAKE_IO | take, array) < 0) return -1;
    if (array->view.ndim == 1 && array->view.shape[0] == rows) {
        if (hb_check_device(function, "bias", array, device) == 0) return 0;
    } else {
        char got[120];
        hb_shape_text(array->view.shape, array->view.ndim, got, sizeof got);
        PyErr_Format(PyExc_ValueError, "%s: bias, expected shape (%lld,), got %s", function,
                     (long long)rows, got);
    }
    hb_array_release(array);
    return -1;
}

int hb_map8_known(hb_state *state, const char *function, hb_map8 which, const hb_origin *origin,
                  hb_array *array, const float **map)
{
    *array = (hb_array){.view = {.data = state->maps[which],
                                 .dtype = HB_F32,
                                 .device = {.type = HB_CPU},
                                 .ndim = 1,
                                 .shape = {256},
                                 .stride = {1}}};
    *map = state->maps[which];
    if (origin->device.type == HB_CPU) return 0;
    if (hb_table_move(state, function, "map", origin, array) < 0) return -1;
    *map = array->view.data;
    return 0;
}

int hb_map8_get(hb_state *state, PyObject *object, const char *function, const char *name,
                unsigned take, const hb_origin *origin, hb_array *array, const float **map)
{
    array->owner = NULL;
    if (PyUnicode_Check(object)) {
        const char *text = PyUnicode_AsUTF8(object);
        if (text == NULL) return -1;
        int which = hb_map8_from_name(text);
        if (which >= 0) return hb_map8_known(state, function, (hb_map8)which, origin, array, map);
        PyErr_Format(PyExc_ValueError,
                     "%s: %s, expected 'dynamic', 'dynamic_unsigned', 'linear', 'fp8_e4m3', "
                     "'fp8_e5m2', 'normal' or float32 [256], got %R",
                     function, name, object);
        return -1;
    }
    if (hb_array_get(state, object, function, name, HB_TAKE_F32 | HB_TAKE_FLAT | take, array) < 0)
        return -1;
    if (hb_check_numel(function, name, array, 256) < 0 ||
        hb_table_move(state, function, name, origin, array) < 0) {
        hb_array_release(array);
        return -1;
    }
    *map = array->view.data;
    return 0;
}

PyObject *hb_output_flat(hb_state *state, PyObject *out, const char *function, const char *name,
                         const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                         hb_array *array)
{
    if (!hb_given(out))
        return hb_output(state, NULL, function, name, origin, dtype, ndim, shape, 0, array);
    int64_t numel = 1;
    for (int d = 0; d < ndim; d++) numel *= shape[d];
    unsigned take = dtype == HB_U8 ? HB_TAKE_BYTES : 1u << dtype | HB_TAKE_FLAT;
    if (hb_array_get(state, out, function, name, take | HB_TAKE_WRITABLE, array) < 0) return NULL;
    if (hb_check_numel(function, name, array, numel) < 0 ||
        hb_check_device(function, name, array, &origin->device) < 0) {
        hb_array_release(array);
        return NULL;
    }
    return Py_NewRef(out);
}

int hb_arg_blocksize8(const char *function, const char *name, PyObject *value, int64_t *result)
{
    if (hb_arg_int64(function, name, value, result) < 0) return -1;
    if (*result >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s, expected at least 1, got %lld", function, name,
                 (long long)*result);
    return -1;
}

int hb_arg_blocksize4(const char *function, const char *name, PyObject *value, int64_t *result)
{
    if (hb_arg_int64(function, name, value, result) < 0) return -1;
    if (hb_blocksize4_is_valid(*result)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s, expected a power of two from 32 to 4096, got %lld",
                 function, name, (long long)*result);
    return -1;
}

int hb_layer_shape(const char *function, const char *name, const hb_view *input, int64_t rows,
                   int64_t depth, bool backward, int64_t *shape)
{
    const int last = input->ndim - 1;
    const int64_t from = backward ? rows : depth;
    if (last < 0 || input->shape[last] != from) {
        char got[120];
        hb_shape_text(input->shape, input->ndim, got, sizeof got);
        PyErr_Format(
            PyExc_ValueError,
            "%s: %s, expected a last dimension of %lld (weight is [%lld, %lld]), got shape %s",
            function, name, (long long)from, (long long)rows, (long long)depth, got);
        return -1;
    }
    for (int d = 0; d < last; d++) shape[d] = input->shape[d];
    shape[last] = backward ? depth : rows;
    return 0;
}
