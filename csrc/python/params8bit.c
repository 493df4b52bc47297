// Params8bit: a tensor in 8-bit codes, block-wise, with a 256-entry map. owner[0..2] keep codes,
// absmax and map alive; a named map is the module's and needs none, on CUDA a copy.
#include "python/object.h"
#include "python/types.h"
#include "python/weights8.h"

static inline hb_params8 *params8(PyObject *self)
{
    return (hb_params8 *)self;
}

static int64_t n_blocks_of(const hb_params8 *self)
{
    return hb_ceil_div(self->numel, self->blocksize);
}

static hb_params8 *params8_new(PyTypeObject *type, const hb_tensor8 *tensor, hb_dtype dtype,
                               int ndim, const int64_t *shape, const hb_origin *origin)
{
    hb_params8 *self = (hb_params8 *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->base.origin = hb_origin_held(*origin);
    self->codes = tensor->codes;
    self->absmax = tensor->absmax;
    self->map = tensor->map;
    self->blocksize = tensor->blocksize;
    self->dtype = dtype;
    self->ndim = ndim;
    self->numel = 1;
    for (int d = 0; d < ndim; d++) {
        self->shape[d] = shape[d];
        self->numel *= shape[d];
    }
    return self;
}

// ---- making -------------------------------------------------------------------------------------

PyDoc_STRVAR(quantize_doc,
             "quantize($type, x, /, map='dynamic', blocksize=256, *, dtype=None)\n--\n\n"
             "Quantize float32, bfloat16 or float16 of any shape.");

static PyObject *params8_quantize(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                  PyObject *kwnames)
{
    static const hb_signature signature = {
        "Params8bit.quantize", 1, 3, 1, 4, {"x", "map", "blocksize", "dtype"}};
    const char *function = signature.function;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *value[4], *owner = NULL;
    hb_params8 *self = NULL;
    hb_tensor8 tensor = {.blocksize = 256};
    hb_origin origin = {0};
    hb_array x = {0}, map = {0};
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_arg_blocksize8(function, "blocksize", value[2], &tensor.blocksize) < 0 ||
        hb_quantizer_input(state, function, "x", value[0], value[3], &x) < 0 ||
        (origin = hb_origin_of(&x),
         value[1] == NULL
             ? hb_map8_known(state, function, HB_MAP_DYNAMIC, &origin, &map, &tensor.map) < 0
             : hb_map8_get(state, value[1], function, "map", HB_TAKE_KEEP, &origin, &map,
                           &tensor.map) < 0))
        goto done;
    const int64_t numel = hb_view_numel(&x.view);
    const int64_t bytes[2] = {numel, hb_ceil_div(numel, tensor.blocksize) * (int64_t)sizeof(float)};
    void *part[2];
    owner = hb_memory_new(function, &origin, 2, bytes, part);
    if (owner == NULL) goto done;
    tensor.codes = part[0];
    tensor.absmax = part[1];
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_quantize_8bit(&state->context, &x.view, tensor.map, tensor.blocksize,
                                            part[0], part[1], &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        goto done;
    }
    self = params8_new((PyTypeObject *)type, &tensor, x.view.dtype, x.view.ndim, x.view.shape,
                       &origin);
    if (self == NULL) goto done;
    self->base.owner[0] = owner; // references move
    self->base.owner[2] = map.owner;
    owner = map.owner = NULL;
done:
    Py_XDECREF(owner);
    hb_array_release(&map);
    hb_array_release(&x);
    return (PyObject *)self;
}

PyDoc_STRVAR(
    from_parts_doc,
    "from_parts($type, /, codes, absmax, map, *, blocksize, shape, dtype='float32')\n--\n\n"
    "Zero-copy over codes uint8, absmax float32 [blocks] and map float32 [256] (or a name).");

static PyObject *params8_from_parts(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {
        "Params8bit.from_parts",
        0,
        3,
        5,
        6,
        {"codes", "absmax", "map", "blocksize", "shape", "dtype"}};
    const char *function = signature.function;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *value[6];
    hb_params8 *self = NULL;
    hb_tensor8 tensor = {0};
    hb_array codes = {0}, absmax = {0}, map = {0};
    hb_origin origin = {0};
    int ndim = 0;
    int64_t shape[HB_MAX_NDIM], numel = 0;
    hb_dtype dtype = HB_F32;
    const unsigned take = HB_TAKE_FLAT | HB_TAKE_KEEP;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_arg_blocksize8(function, "blocksize", value[3], &tensor.blocksize) < 0 ||
        hb_arg_shape(function, "shape", value[4], &ndim, shape, &numel) < 0 ||
        hb_arg_dtype(function, "dtype", value[5], &dtype) < 0 ||
        hb_array_get(state, value[0], function, "codes", HB_TAKE_U8 | take, &codes) < 0 ||
        hb_array_get(state, value[1], function, "absmax", HB_TAKE_F32 | take, &absmax) < 0 ||
        (origin = hb_origin_of(&codes),
         hb_check_device(function, "absmax", &absmax, &origin.device) < 0) ||
        hb_map8_get(state, value[2], function, "map", HB_TAKE_KEEP, &origin, &map, &tensor.map) <
            0 ||
        hb_check_numel(function, "codes", &codes, numel) < 0 ||
        hb_check_numel(function, "absmax", &absmax, hb_ceil_div(numel, tensor.blocksize)) < 0)
        goto done;
    tensor.codes = codes.view.data;
    tensor.absmax = absmax.view.data;
    self = params8_new((PyTypeObject *)type, &tensor, dtype, ndim, shape, &origin);
    if (self == NULL) goto done;
    self->base.owner[0] = codes.owner; // references move
    self->base.owner[1] = absmax.owner;
    self->base.owner[2] = map.owner;
    codes.owner = absmax.owner = map.owner = NULL;
done:
    hb_array_release(&codes);
    hb_array_release(&absmax);
    hb_array_release(&map);
    return (PyObject *)self;
}

static PyObject *params8_deepcopy(PyObject *op, PyObject *Py_UNUSED(memo))
{
    const hb_params8 *source = params8(op);
    const int64_t bytes[3] = {source->numel, n_blocks_of(source) * (int64_t)sizeof(float),
                              256 * (int64_t)sizeof(float)};
    const void *from[3] = {source->codes, source->absmax, source->map};
    static const char function[] = "Params8bit.__deepcopy__";
    hb_state *state = hb_state_of(op);
    void *part[3];
    hb_origin origin;
    if (hb_origin_enter(state, function, &source->base.origin, &origin) < 0) return NULL;
    PyObject *owner = hb_memory_new(function, &origin, 3, bytes, part);
    if (owner == NULL) return NULL;
    for (int i = 0; i < 3; i++)
        if (hb_memory_copy(state, function, &origin.device, part[i], from[i], bytes[i]) < 0) {
            Py_DECREF(owner);
            return NULL;
        }
    const hb_tensor8 tensor = {
        .codes = part[0], .absmax = part[1], .map = part[2], .blocksize = source->blocksize};
    hb_params8 *self =
        params8_new(Py_TYPE(op), &tensor, source->dtype, source->ndim, source->shape, &origin);
    if (self == NULL)
        Py_DECREF(owner);
    else
        self->base.owner[0] = owner;
    return (PyObject *)self;
}

static Py_ssize_t params8_length(PyObject *op)
{
    if (params8(op)->ndim > 0) return (Py_ssize_t)params8(op)->shape[0];
    PyErr_SetString(PyExc_TypeError,
                    "Params8bit.__len__: expected a tensor with rows, got a scalar");
    return -1;
}

// ---- methods and properties ---------------------------------------------------------------------

PyDoc_STRVAR(dequantize_doc, "dequantize($self, /, dtype=None, out=None)\n--\n\n"
                             "The tensor again, in its own dtype, `dtype`, or `out`'s.");

static PyObject *params8_dequantize(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Params8bit.dequantize", 0, 2, 0, 2, {"dtype", "out"}};
    const hb_params8 *self = params8(op);
    hb_state *state = hb_state_of(op);
    PyObject *value[2];
    hb_dtype dtype;
    hb_origin origin;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_result_dtype(state, signature.function, value[0], value[1], self->dtype, &dtype) < 0 ||
        hb_origin_enter(state, signature.function, &self->base.origin, &origin) < 0)
        return NULL;
    const hb_tensor8 tensor = {self->codes, self->absmax, self->map, self->blocksize};
    return hb_dequantize8_run(state, signature.function, &tensor, dtype, &origin, self->ndim,
                              self->shape, value[1]);
}

static PyObject *get_codes(PyObject *op, void *Py_UNUSED(closure))
{
    const hb_params8 *self = params8(op);
    return hb_wrap(op, &self->base.origin, (void *)(uintptr_t)self->codes, HB_U8, self->ndim,
                   self->shape);
}

static PyObject *get_absmax(PyObject *op, void *Py_UNUSED(closure))
{
    const int64_t size = n_blocks_of(params8(op));
    return hb_wrap(op, &params8(op)->base.origin, (void *)(uintptr_t)params8(op)->absmax, HB_F32, 1,
                   &size);
}

static PyObject *get_map(PyObject *op, void *Py_UNUSED(closure))
{
    const int64_t size = 256;
    return hb_wrap(op, &params8(op)->base.origin, (void *)(uintptr_t)params8(op)->map, HB_F32, 1,
                   &size);
}

static PyObject *get_blocksize(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(params8(op)->blocksize);
}

static PyObject *get_shape(PyObject *op, void *Py_UNUSED(closure))
{
    return hb_shape_tuple(params8(op)->shape, params8(op)->ndim);
}

static PyObject *get_dtype(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_dtype_name(params8(op)->dtype));
}

static int64_t stored_bytes(const hb_params8 *self)
{
    return self->numel + n_blocks_of(self) * 4 + 256 * 4;
}

static double bits_per_param(const hb_params8 *self)
{
    return self->numel == 0 ? 0.0 : 8.0 * (double)stored_bytes(self) / (double)self->numel;
}

static PyObject *get_nbytes(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(stored_bytes(params8(op)));
}

static PyObject *get_bits_per_param(PyObject *op, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble(bits_per_param(params8(op)));
}

PyDoc_STRVAR(parts_doc, "parts($self, /)\n--\n\nWhat from_parts() takes, as a dict.");

static PyObject *params8_parts(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *parts = PyDict_New();
    if (parts == NULL) return NULL;
    if (hb_dict_take(parts, "codes", get_codes(op, NULL)) < 0 ||
        hb_dict_take(parts, "absmax", get_absmax(op, NULL)) < 0 ||
        hb_dict_take(parts, "map", get_map(op, NULL)) < 0 ||
        hb_dict_take(parts, "blocksize", get_blocksize(op, NULL)) < 0 ||
        hb_dict_take(parts, "shape", get_shape(op, NULL)) < 0 ||
        hb_dict_take(parts, "dtype", get_dtype(op, NULL)) < 0)
        Py_CLEAR(parts);
    return parts;
}

PyDoc_STRVAR(dlpack_doc, "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, "
                         "copy=None)\n--\n\nThe codes, uint8 in the tensor's shape, read-only.");

static PyObject *params8_dlpack(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                PyObject *kwnames)
{
    const hb_params8 *self = params8(op);
    return hb_to_dlpack(hb_state_of(op), "Params8bit.__dlpack__", op, &self->base.origin,
                        (void *)(uintptr_t)self->codes, HB_U8, self->ndim, self->shape, args,
                        n_args, kwnames);
}

static PyObject *params8_repr(PyObject *op)
{
    const hb_params8 *self = params8(op);
    char shape[200], device[HB_DEVICE_SUFFIX];
    hb_shape_text(self->shape, self->ndim, shape, sizeof shape);
    hb_device_suffix(&self->base.origin.device, device);
    return PyUnicode_FromFormat("Params8bit(shape=%s, blocksize=%lld, dtype=%s%s)", shape,
                                (long long)self->blocksize, hb_dtype_name(self->dtype), device);
}

PyDoc_STRVAR(repr_html_doc, "_repr_html_($self, /)\n--\n\nA table for notebooks.");

static PyObject *params8_repr_html(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const hb_params8 *self = params8(op);
    const int64_t bytes = stored_bytes(self);
    const double dense = (double)self->numel * (double)hb_dtype_bytes(self->dtype);
    hb_html_row rows[] = {
        {"shape", get_shape(op, NULL)},
        {"quant type", PyUnicode_FromString("8 bits, 256-entry map")},
        {"block size", get_blocksize(op, NULL)},
        {"dtype", get_dtype(op, NULL)},
        {"device", hb_object_device(op, NULL)},
        {"bytes", PyLong_FromLongLong(bytes)},
        {"bits per parameter", hb_text_decimal(bits_per_param(self), "")},
        {"compression", hb_text_decimal(bytes == 0 ? 1.0 : dense / (double)bytes, "x")},
    };
    return hb_html_table("Params8bit", rows, sizeof rows / sizeof *rows);
}

static PyMethodDef methods[] = {
    {"quantize", HB_CLASS_METHOD(params8_quantize), quantize_doc},
    {"from_parts", HB_CLASS_METHOD(params8_from_parts), from_parts_doc},
    {"dequantize", HB_METHOD(params8_dequantize), dequantize_doc},
    {"parts", params8_parts, METH_NOARGS, parts_doc},
    {"__dlpack__", HB_METHOD(params8_dlpack), dlpack_doc},
    {"__dlpack_device__", hb_object_dlpack_device, METH_NOARGS, hb_dlpack_device_doc},
    {"__copy__", hb_object_copy, METH_NOARGS, hb_copy_doc},
    {"__deepcopy__", params8_deepcopy, METH_O, hb_deepcopy_doc},
    {"__reduce__", hb_object_reduce, METH_NOARGS, hb_reduce_doc},
    {"_repr_html_", params8_repr_html, METH_NOARGS, repr_html_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"codes", get_codes, NULL, "uint8 in the tensor's shape, zero-copy.", NULL},
    {"absmax", get_absmax, NULL, "float32 [blocks], zero-copy.", NULL},
    {"map", get_map, NULL, "float32 [256], zero-copy.", NULL},
    {"blocksize", get_blocksize, NULL, "Elements that share a scale.", NULL},
    {"shape", get_shape, NULL, "Shape of the tensor that was quantized.", NULL},
    {"dtype", get_dtype, NULL, "Dtype of the tensor that was quantized.", NULL},
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

PyDoc_STRVAR(type_doc, "A tensor in 8 bits per element, block-wise, with a 256-entry map.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)type_doc},
    {Py_tp_dealloc, hb_object_dealloc},
    {Py_tp_traverse, hb_object_traverse},
    {Py_tp_repr, params8_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {Py_mp_length, params8_length},
    {0, NULL},
};

PyType_Spec hb_params8bit_spec = {
    .name = "halfbyte._C.Params8bit",
    .basicsize = sizeof(hb_params8),
    .flags = HB_TYPE_FLAGS | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
