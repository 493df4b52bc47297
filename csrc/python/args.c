// Argument parsing. Keyword names are compared by content: they are short, interned by the compiler
// of the caller's code, and there are few of them, which costs less than interning ours would save.
#include "python/args.h"

#include <limits.h>

const char *const hb_scales_names[] = {"absmax", "search", NULL};
const char *const hb_compute_names[] = {"float32", "bfloat16", "int16", "int8", NULL};
const char *const hb_activation_names[] = {"silu", "gelu_tanh", NULL};
const char *const hb_mode_names[] = {"dynamic", "exact", NULL};

static bool name_equals(PyObject *keyword, const char *name)
{
    size_t length = strlen(name);
    return PyUnicode_IS_COMPACT_ASCII(keyword) && (size_t)PyUnicode_GET_LENGTH(keyword) == length &&
           memcmp(PyUnicode_1BYTE_DATA(keyword), name, length) == 0;
}

static int take_positional(const hb_signature *signature, PyObject *const *args, Py_ssize_t n_args,
                           PyObject **values)
{
    for (int i = 0; i < signature->count; i++) values[i] = NULL;
    if (n_args > signature->positional) {
        PyErr_Format(PyExc_TypeError, "%s: positional arguments, expected at most %d, got %zd",
                     signature->function, signature->positional, n_args);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n_args; i++) values[i] = args[i];
    return 0;
}

static int take_keyword(const hb_signature *signature, PyObject *keyword, PyObject *value,
                        PyObject **values)
{
    for (int i = signature->positional_only; i < signature->count; i++) {
        if (!name_equals(keyword, signature->names[i])) continue;
        if (values[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s: %U, expected once, got by position and by name",
                         signature->function, keyword);
            return -1;
        }
        values[i] = value;
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s: got an unexpected keyword argument '%U'",
                 signature->function, keyword);
    return -1;
}

static int check_required(const hb_signature *signature, PyObject **values)
{
    for (int i = 0; i < signature->required; i++) {
        if (values[i] != NULL) continue;
        PyErr_Format(PyExc_TypeError, "%s: %s, expected an argument, got none", signature->function,
                     signature->names[i]);
        return -1;
    }
    return 0;
}

int hb_parse_args(const hb_signature *signature, PyObject *const *args, Py_ssize_t n_args,
                  PyObject *kwnames, PyObject **values)
{
    if (take_positional(signature, args, n_args, values) < 0) return -1;
    Py_ssize_t n_keywords = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    for (Py_ssize_t i = 0; i < n_keywords; i++) {
        PyObject *keyword = PyTuple_GET_ITEM(kwnames, i);
        if (take_keyword(signature, keyword, args[n_args + i], values) < 0) return -1;
    }
    return check_required(signature, values);
}

int hb_parse_tuple(const hb_signature *signature, PyObject *args, PyObject *kwargs,
                   PyObject **values)
{
    if (take_positional(signature, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), values) < 0)
        return -1;
    PyObject *keyword, *value;
    Py_ssize_t position = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &position, &keyword, &value)) {
        if (!PyUnicode_Check(keyword)) {
            PyErr_Format(PyExc_TypeError, "%s: keywords, expected str, got %s", signature->function,
                         Py_TYPE(keyword)->tp_name);
            return -1;
        }
        if (take_keyword(signature, keyword, value, values) < 0) return -1;
    }
    return check_required(signature, values);
}

int hb_arg_int64(const char *function, const char *name, PyObject *value, int64_t *result)
{
    if (value == NULL) return 0;
    if (!PyIndex_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s, expected an int, got %s", function, name,
                     Py_TYPE(value)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(value);
    if (number == NULL) return -1;
    int overflow;
    long long wide = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow != 0)
        PyErr_Format(PyExc_ValueError, "%s: %s, expected an int of 64 bits, got %S", function, name,
                     number);
    Py_DECREF(number);
    if (overflow != 0 || (wide == -1 && PyErr_Occurred())) return -1;
    *result = wide;
    return 0;
}

int hb_arg_double(const char *function, const char *name, PyObject *value, double *result)
{
    if (value == NULL) return 0;
    double wide = PyFloat_AsDouble(value);
    if (wide == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s: %s, expected a float, got %s", function, name,
                         Py_TYPE(value)->tp_name);
        }
        return -1;
    }
    *result = wide;
    return 0;
}

int hb_arg_float(const char *function, const char *name, PyObject *value, float *result)
{
    double wide = (double)*result;
    if (hb_arg_double(function, name, value, &wide) < 0) return -1;
    *result = (float)wide;
    return 0;
}

int hb_arg_bool(const char *function, const char *name, PyObject *value, bool *result)
{
    if (value == NULL) return 0;
    int truth = PyBool_Check(value) ? value == Py_True : -1;
    if (truth < 0) {
        PyErr_Format(PyExc_TypeError, "%s: %s, expected a bool, got %s", function, name,
                     Py_TYPE(value)->tp_name);
        return -1;
    }
    *result = truth;
    return 0;
}

static int raise_choice(const char *function, const char *name, PyObject *value,
                        const char *const *choices)
{
    char list[160];
    size_t used = 0;
    list[0] = '\0';
    for (int i = 0; choices[i] != NULL && used < sizeof list; i++) {
        const char *joint = i == 0 ? "" : choices[i + 1] == NULL ? " or " : ", ";
        used += (size_t)snprintf(list + used, sizeof list - used, "%s'%s'", joint, choices[i]);
    }
    PyErr_Format(PyUnicode_Check(value) ? PyExc_ValueError : PyExc_TypeError,
                 "%s: %s, expected %s, got %R", function, name, list, value);
    return -1;
}

int hb_arg_choice(const char *function, const char *name, PyObject *value,
                  const char *const *choices, int *result)
{
    if (value == NULL) return 0;
    for (int i = 0; PyUnicode_Check(value) && choices[i] != NULL; i++) {
        if (!name_equals(value, choices[i])) continue;
        *result = i;
        return 0;
    }
    return raise_choice(function, name, value, choices);
}

int hb_arg_format4(const char *function, const char *name, PyObject *value, hb_format4 *result)
{
    if (value == NULL) return 0;
    const char *choices[HB_CODEBOOK_COUNT + 1];
    for (int i = 0; i < HB_CODEBOOK_COUNT; i++) choices[i] = hb_codebook4_get((hb_format4)i)->name;
    choices[HB_CODEBOOK_COUNT] = NULL;
    int index = 0;
    if (hb_arg_choice(function, name, value, choices, &index) < 0) return -1;
    *result = (hb_format4)index;
    return 0;
}

// The io dtype whose name ends `text` behind an optional "torch." or similar; -1 when there is
// none.
static int dtype_from_text(const char *text)
{
    const char *point = strrchr(text, '.');
    const char *last = point == NULL ? text : point + 1;
    for (int dtype = 0; dtype < HB_IO_COUNT; dtype++)
        if (strcmp(last, hb_dtype_name((hb_dtype)dtype)) == 0) return dtype;
    return -1;
}

int hb_arg_dtype(const char *function, const char *name, PyObject *value, hb_dtype *result)
{
    if (!hb_given(value)) return 0;
    PyObject *text = NULL;
    if (PyType_Check(value)) // numpy.float32, ml_dtypes.bfloat16
        text = PyObject_GetAttrString(value, "__name__");
    else
        text = PyObject_Str(value);
    if (text == NULL) return -1;
    const char *utf8 = PyUnicode_Check(text) ? PyUnicode_AsUTF8(text) : "";
    int dtype = utf8 == NULL ? -1 : dtype_from_text(utf8);
    if (utf8 != NULL && dtype < 0)
        PyErr_Format(PyUnicode_Check(value) ? PyExc_ValueError : PyExc_TypeError,
                     "%s: %s, expected float32, bfloat16 or float16, got %R", function, name,
                     value);
    Py_DECREF(text);
    if (dtype < 0) return -1;
    *result = (hb_dtype)dtype;
    return 0;
}

int hb_arg_shape(const char *function, const char *name, PyObject *value, int *ndim, int64_t *shape,
                 int64_t *numel)
{
    if (PyUnicode_Check(value) || !PySequence_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s, expected a tuple of ints, got %s", function, name,
                     Py_TYPE(value)->tp_name);
        return -1;
    }
    // A tuple of our own where it can change: __index__ of an item may empty a list.
    PyObject *sizes = PyTuple_Check(value) ? Py_NewRef(value) : PySequence_Tuple(value);
    if (sizes == NULL) return -1;
    int rc = -1;
    Py_ssize_t count = PyTuple_GET_SIZE(sizes);
    *numel = 1;
    if (count > HB_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %s, expected at most %d dimensions, got %zd", function,
                     name, HB_MAX_NDIM, count);
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (hb_arg_int64(function, name, PyTuple_GET_ITEM(sizes, i), &shape[i]) < 0) goto done;
        if (shape[i] < 0 || __builtin_mul_overflow(*numel, shape[i], numel)) {
            PyErr_Format(PyExc_ValueError,
                         "%s: %s, expected sizes >= 0 with a product of 64 bits, got %R", function,
                         name, value);
            goto done;
        }
    }
    *ndim = (int)count;
    rc = 0;
done:
    Py_DECREF(sizes);
    return rc;
}

void hb_shape_text(const int64_t *shape, int ndim, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int d = 0; d < ndim && used < size; d++)
        used += (size_t)snprintf(text + used, size - used, d == 0 ? "%lld" : ", %lld",
                                 (long long)shape[d]);
    if (used < size) snprintf(text + used, size - used, ndim == 1 ? ",)" : ")");
}

PyObject *hb_shape_tuple(const int64_t *shape, int ndim)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int d = 0; tuple != NULL && d < ndim; d++) {
        PyObject *size = PyLong_FromLongLong(shape[d]);
        if (size == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, d, size);
    }
    return tuple;
}
