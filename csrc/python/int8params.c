// Int8Params: a matrix in int8 with the absmax of each row: w = codes * scale / 127.
// owner[0], owner[1] keep codes and scale alive (one allocation in owner[0] after quantize()).
#include "python/object.h"
#include "python/types.h"
#include "python/weights8.h"

static inline hb_int8params *int8params(PyObject *self)
{
    return (hb_int8params *)self;
}

static hb_int8params *int8params_new(PyTypeObject *type, const int8_t *codes, const float *scale,
                                     const int64_t *shape, hb_dtype dtype, const hb_origin *origin)
{
    hb_int8params *self = (hb_int8params *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->base.origin = hb_origin_held(*origin);
    self->codes = codes;
    self->scale = scale;
    self->shape[0] = shape[0];
    self->shape[1] = shape[1];
    self->dtype = dtype;
    return self;
}

// A new object with memory of its own, uninitialised; codes and scale go to part[0], part[1].
static hb_int8params *with_memory(const char *function, PyTypeObject *type, const int64_t *shape,
                                  hb_dtype dtype, const hb_origin *origin, void **part)
{
    const int64_t bytes[2] = {shape[0] * shape[1], shape[0] * (int64_t)sizeof(float)};
    PyObject *owner = hb_memory_new(function, origin, 2, bytes, part);
    if (owner == NULL) return NULL;
    hb_int8params *self = int8params_new(type, part[0], part[1], shape, dtype, origin);
    if (self == NULL)
        Py_DECREF(owner);
    else
        self->base.owner[0] = owner;
    return self;
}

hb_int8params *hb_int8params_quantize(hb_state *state, const char *function, const char *name,
                                      PyObject *x, PyObject *dtype)
{
    hb_array in;
    if (hb_quantizer_input(state, function, name, x, dtype, &in) < 0) return NULL;
    hb_int8params *self = NULL;
    void *part[2];
    if (in.view.ndim != 2) {
        char shape[200];
        hb_shape_text(in.view.shape, in.view.ndim, shape, sizeof shape);
        PyErr_Format(PyExc_ValueError, "%s: %s, expected shape [rows, depth], got %s", function,
                     name, shape);
        goto done;
    }
    const hb_origin origin = hb_origin_of(&in);
    self =
        with_memory(function, state->int8params_type, in.view.shape, in.view.dtype, &origin, part);
    if (self == NULL) goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_quantize_rows_int8(&state->context, &in.view, 0.0f, part[0], part[1],
                                                 NULL, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        Py_CLEAR(self);
    }
done:
    hb_array_release(&in);
    return self;
}

PyDoc_STRVAR(quantize_doc, "quantize($type, x, /, *, dtype=None)\n--\n\n"
                           "Quantize float32, bfloat16 or float16 [rows, depth].");

static PyObject *int8params_quantize(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                     PyObject *kwnames)
{
    static const hb_signature signature = {"Int8Params.quantize", 1, 1, 1, 2, {"x", "dtype"}};
    PyObject *value[2];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    return (PyObject *)hb_int8params_quantize(state, signature.function, "x", value[0], value[1]);
}

PyDoc_STRVAR(from_parts_doc,
             "from_parts($type, /, codes, scale, *, dtype='float16', shape=None)\n--\n\n"
             "Zero-copy over codes int8 [rows, depth] and scale float32 [rows]. shape, when given, "
             "is checked.");

static PyObject *int8params_from_parts(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                       PyObject *kwnames)
{
    static const hb_signature signature = {
        "Int8Params.from_parts", 0, 2, 2, 4, {"codes", "scale", "dtype", "shape"}};
    const char *function = signature.function;
    PyObject *value[4];
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    hb_dtype dtype = HB_F16;
    hb_rows8 rows;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_arg_dtype(function, "dtype", value[2], &dtype) < 0 ||
        hb_rows8_get(state, function, value[0], value[1], HB_TAKE_KEEP, &rows) < 0)
        return NULL;
    const int64_t *shape = rows.codes.view.shape;
    const hb_origin origin = hb_origin_of(&rows.codes);
    hb_int8params *self = NULL;
    if (hb_rows8_check_matrix(function, &rows) == 0 &&
        (!hb_given(value[3]) || hb_check_shape(function, value[3], &rows.codes) == 0))
        self = int8params_new((PyTypeObject *)type, rows.codes.view.data, rows.scale.view.data,
                              shape, dtype, &origin);
    if (self == NULL) {
        hb_rows8_release(&rows);
        return NULL;
    }
    self->base.owner[0] = rows.codes.owner; // references move
    self->base.owner[1] = rows.scale.owner;
    return (PyObject *)self;
}

PyObject *hb_int8params_deepcopy(PyObject *op, PyObject *Py_UNUSED(memo))
{
    const hb_int8params *source = int8params(op);
    static const char function[] = "Int8Params.__deepcopy__";
    hb_state *state = hb_state_of(op);
    void *part[2];
    hb_origin origin;
    if (hb_origin_enter(state, function, &source->base.origin, &origin) < 0) return NULL;
    hb_int8params *self =
        with_memory(function, Py_TYPE(op), source->shape, source->dtype, &origin, part);
    if (self == NULL) return NULL;
    if (hb_memory_copy(state, function, &origin.device, part[0], source->codes,
                       source->shape[0] * source->shape[1]) < 0 ||
        hb_memory_copy(state, function, &origin.device, part[1], source->scale,
                       source->shape[0] * (int64_t)sizeof(float)) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *int8params_subscript(PyObject *op, PyObject *slice)
{
    const hb_int8params *source = int8params(op);
    int64_t start = 0, stop = 0;
    if (hb_slice_rows("Int8Params.__getitem__", slice, source->shape[0], &start, &stop) < 0)
        return NULL;
    const int64_t shape[2] = {stop - start, source->shape[1]};
    hb_int8params *self =
        int8params_new(Py_TYPE(op), source->codes + start * shape[1], source->scale + start, shape,
                       source->dtype, &source->base.origin);
    if (self != NULL) self->base.owner[0] = Py_NewRef(op);
    return (PyObject *)self;
}

static Py_ssize_t int8params_length(PyObject *op)
{
    return (Py_ssize_t)int8params(op)->shape[0];
}

// ---- methods and properties ---------------------------------------------------------------------

PyDoc_STRVAR(dequantize_doc, "dequantize($self, /, dtype=None, out=None)\n--\n\n"
                             "codes * scale / 127, in the own dtype, `dtype`, or `out`'s.");

static PyObject *int8params_dequantize(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                       PyObject *kwnames)
{
    static const hb_signature signature = {"Int8Params.dequantize", 0, 2, 0, 2, {"dtype", "out"}};
    const hb_int8params *self = int8params(op);
    hb_state *state = hb_state_of(op);
    PyObject *value[2];
    hb_dtype dtype;
    hb_origin origin;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_result_dtype(state, signature.function, value[0], value[1], self->dtype, &dtype) < 0 ||
        hb_origin_enter(state, signature.function, &self->base.origin, &origin) < 0)
        return NULL;
    return hb_dequantize_rows8_run(state, signature.function, self->codes, self->scale, dtype,
                                   &origin, 2, self->shape, value[1]);
}

static PyObject *get_codes(PyObject *op, void *Py_UNUSED(closure))
{
    const hb_int8params *self = int8params(op);
    return hb_wrap(op, &self->base.origin, (void *)(uintptr_t)self->codes, HB_I8, 2, self->shape);
}

static PyObject *get_scale(PyObject *op, void *Py_UNUSED(closure))
{
    const hb_int8params *self = int8params(op);
    return hb_wrap(op, &self->base.origin, (void *)(uintptr_t)self->scale, HB_F32, 1, self->shape);
}

static PyObject *get_shape(PyObject *op, void *Py_UNUSED(closure))
{
    return hb_shape_tuple(int8params(op)->shape, 2);
}

static PyObject *get_dtype(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_dtype_name(int8params(op)->dtype));
}

static int64_t stored_bytes(const hb_int8params *self)
{
    return self->shape[0] * self->shape[1] + self->shape[0] * 4;
}

static double bits_per_param(const hb_int8params *self)
{
    const int64_t numel = self->shape[0] * self->shape[1];
    return numel == 0 ? 0.0 : 8.0 * (double)stored_bytes(self) / (double)numel;
}

static PyObject *get_nbytes(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(stored_bytes(int8params(op)));
}

static PyObject *get_bits_per_param(PyObject *op, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble(bits_per_param(int8params(op)));
}

PyDoc_STRVAR(parts_doc, "parts($self, /)\n--\n\nWhat from_parts() takes, as a dict.");

static PyObject *int8params_parts(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *parts = PyDict_New();
    if (parts == NULL) return NULL;
    if (hb_dict_take(parts, "codes", get_codes(op, NULL)) < 0 ||
        hb_dict_take(parts, "scale", get_scale(op, NULL)) < 0 ||
        hb_dict_take(parts, "shape", get_shape(op, NULL)) < 0 ||
        hb_dict_take(parts, "dtype", get_dtype(op, NULL)) < 0)
        Py_CLEAR(parts);
    return parts;
}

PyDoc_STRVAR(dlpack_doc, "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, "
                         "copy=None)\n--\n\nThe codes, int8 [rows, depth], read-only.");

static PyObject *int8params_dlpack(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                   PyObject *kwnames)
{
    const hb_int8params *self = int8params(op);
    return hb_to_dlpack(hb_state_of(op), "Int8Params.__dlpack__", op, &self->base.origin,
                        (void *)(uintptr_t)self->codes, HB_I8, 2, self->shape, args, n_args,
                        kwnames);
}

static PyObject *int8params_repr(PyObject *op)
{
    const hb_int8params *self = int8params(op);
    char device[HB_DEVICE_SUFFIX];
    hb_device_suffix(&self->base.origin.device, device);
    return PyUnicode_FromFormat("Int8Params(shape=(%lld, %lld), dtype=%s%s)",
                                (long long)self->shape[0], (long long)self->shape[1],
                                hb_dtype_name(self->dtype), device);
}

PyDoc_STRVAR(repr_html_doc, "_repr_html_($self, /)\n--\n\nA table for notebooks.");

static PyObject *int8params_repr_html(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const hb_int8params *self = int8params(op);
    const int64_t bytes = stored_bytes(self);
    const double dense =
        (double)(self->shape[0] * self->shape[1]) * (double)hb_dtype_bytes(self->dtype);
    hb_html_row rows[] = {
        {"shape", get_shape(op, NULL)},
        {"quant type", PyUnicode_FromString("int8, one scale per row")},
        {"block size", PyLong_FromLongLong(self->shape[1])},
        {"dtype", get_dtype(op, NULL)},
        {"device", hb_object_device(op, NULL)},
        {"bytes", PyLong_FromLongLong(bytes)},
        {"bits per parameter", hb_text_decimal(bits_per_param(self), "")},
        {"compression", hb_text_decimal(bytes == 0 ? 1.0 : dense / (double)bytes, "x")},
    };
    return hb_html_table("Int8Params", rows, sizeof rows / sizeof *rows);
}

static PyMethodDef methods[] = {
    {"quantize", HB_CLASS_METHOD(int8params_quantize), quantize_doc},
    {"from_parts", HB_CLASS_METHOD(int8params_from_parts), from_parts_doc},
    {"dequantize", HB_METHOD(int8params_dequantize), dequantize_doc},
    {"parts", int8params_parts, METH_NOARGS, parts_doc},
    {"__dlpack__", HB_METHOD(int8params_dlpack), dlpack_doc},
    {"__dlpack_device__", hb_object_dlpack_device, METH_NOARGS, hb_dlpack_device_doc},
    {"__copy__", hb_object_copy, METH_NOARGS, hb_copy_doc},
    {"__deepcopy__", hb_int8params_deepcopy, METH_O, hb_deepcopy_doc},
    {"__reduce__", hb_object_reduce, METH_NOARGS, hb_reduce_doc},
    {"_repr_html_", int8params_repr_html, METH_NOARGS, repr_html_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"codes", get_codes, NULL, "int8 [rows, depth], zero-copy.", NULL},
    {"scale", get_scale, NULL, "float32 [rows], zero-copy.", NULL},
    {"shape", get_shape, NULL, "(rows, depth).", NULL},
    {"dtype", get_dtype, NULL, "Dtype of the matrix that was quantized.", NULL},
    {"device", hb_object_device, NULL, "\"cpu\" or \"cuda:0\".", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of all arrays in parts().", NULL},
    {"bits_per_param", get_bits_per_param, NULL, "8 * nbytes / numel.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", HB_MEMBER_OFFSET, offsetof(hb_object, weakrefs), HB_MEMBER_READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(type_doc, "A matrix in int8 with one float32 scale (the absmax) per row: "
                       "w = codes * scale / 127.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)type_doc},
    {Py_tp_dealloc, hb_object_dealloc},
    {Py_tp_traverse, hb_object_traverse},
    {Py_tp_repr, int8params_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {Py_mp_length, int8params_length},
    {Py_mp_subscript, int8params_subscript},
    {0, NULL},
};

PyType_Spec hb_int8params_spec = {
    .name = "halfbyte._C.Int8Params",
    .basicsize = sizeof(hb_int8params),
    .flags = HB_TYPE_FLAGS | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
