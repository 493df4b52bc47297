// Params4bit: a tensor in 4 bits, bitsandbytes layout (see core/ops.h).
//
// owner[0..4] keep packed, absmax (or its codes), nested_absmax, nested_map and nested_offset
// (where that is CUDA memory) alive. An object made by quantize() has one allocation in owner[0]
// and, when nested, one in owner[1]; on the CPU its nested map is the module's.
#include "python/object.h"
#include "python/types.h"
#include "python/weights4.h"

#include "core/ops_cuda.h"

static inline hb_params4 *params4(PyObject *self)
{
    return (hb_params4 *)self;
}

static inline bool is_nested(const hb_tensor4 *tensor)
{
    return tensor->nested_map != NULL; // the codes of an empty tensor may be NULL
}

static int64_t n_blocks_of(const hb_tensor4 *tensor)
{
    return hb_ceil_div(tensor->numel, tensor->blocksize);
}

static int64_t n_nested_of(const hb_tensor4 *tensor)
{
    return hb_ceil_div(n_blocks_of(tensor), tensor->nested_blocksize);
}

static hb_params4 *params4_new(PyTypeObject *type, const hb_tensor4 *tensor, hb_dtype dtype,
                               int ndim, const int64_t *shape, const hb_origin *origin)
{
    hb_params4 *self = (hb_params4 *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->base.origin = hb_origin_held(*origin);
    self->tensor = *tensor;
    self->tensor.device = self->base.origin.device;
    self->dtype = dtype;
    self->ndim = ndim;
    self->tensor.rows = ndim > 0 ? shape[0] : 1;
    self->tensor.depth = 1;
    for (int d = 1; d < ndim; d++) self->tensor.depth *= shape[d];
    for (int d = 0; d < ndim; d++) self->shape[d] = shape[d];
    return self;
}

// ---- making -------------------------------------------------------------------------------------

// Fills `self` (double quantization) from float32 scales: codes and nested scales into owner[1], on
// CUDA the offset and the map, too.
static int nest(hb_state *state, const char *function, const hb_origin *origin, hb_params4 *self,
                const float *absmax)
{
    hb_tensor4 *tensor = &self->tensor;
    const bool cuda = origin->device.type == HB_CUDA;
    tensor->nested_blocksize = 256;
    const int64_t n_blocks = n_blocks_of(tensor);
    const int64_t bytes[4] = {n_blocks, n_nested_of(tensor) * (int64_t)sizeof(float),
                              cuda ? (int64_t)sizeof(float) : 0, cuda ? 256 * 4 : 0};
    void *part[4], *workspace;
    PyObject *scratch = NULL;
    float *map = state->maps[HB_MAP_DYNAMIC];
    self->base.owner[1] = hb_memory_new(function, origin, 4, bytes, part);
    if (self->base.owner[1] == NULL ||
        hb_workspace_new(function, origin, hb_nest_absmax_workspace(&origin->device, n_blocks, 256),
                         &scratch, &workspace) < 0)
        return -1;
    hb_error error;
    hb_status status = HB_OK;
    if (cuda) {
        HB_WITHOUT_GIL(status,
                       hb_upload_cuda(function, &origin->device, map, 256, part[3], &error));
        map = part[3];
        tensor->nested_offset_at = part[2];
    }
    if (status == HB_OK)
        HB_WITHOUT_GIL(status, hb_nest_absmax(&state->context, &origin->device, absmax, n_blocks,
                                              256, map, part[0], part[1],
                                              cuda ? part[2] : (void *)&tensor->nested_offset,
                                              workspace, &error));
    Py_XDECREF(scratch);
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        return -1;
    }
    tensor->absmax = NULL;
    tensor->absmax_codes = part[0];
    tensor->nested_absmax = part[1];
    tensor->nested_map = map;
    return 0;
}

hb_params4 *hb_params4_quantize(hb_state *state, const char *function, const char *name,
                                PyObject *x, PyObject *dtype, hb_format4 format, int64_t blocksize,
                                bool double_quant, hb_scales scales)
{
    hb_array in;
    if (hb_quantizer_input(state, function, name, x, dtype, &in) < 0) return NULL;
    PyObject *scratch = NULL;
    hb_tensor4 tensor = {.format = format,
                         .blocksize = blocksize,
                         .numel = hb_view_numel(&in.view),
                         .nested_blocksize = 256};
    const int64_t absmax_bytes = n_blocks_of(&tensor) * (int64_t)sizeof(float);
    const int64_t bytes[2] = {hb_packed_bytes(tensor.numel), double_quant ? 0 : absmax_bytes};
    void *part[2], *absmax;
    const hb_origin origin = hb_origin_of(&in);
    hb_params4 *self = params4_new(state->params4bit_type, &tensor, in.view.dtype, in.view.ndim,
                                   in.view.shape, &origin);
    if (self == NULL) goto error;
    self->base.owner[0] = hb_memory_new(function, &origin, 2, bytes, part);
    if (self->base.owner[0] == NULL) goto error;
    absmax = part[1];
    if (double_quant) { // the float32 scales are only needed until they are nested
        scratch = hb_memory_new(function, &origin, 1, &absmax_bytes, &absmax);
        if (scratch == NULL) goto error;
    }
    self->tensor.packed = part[0];
    self->tensor.absmax = absmax;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_quantize_4bit(&state->context, &in.view, format, blocksize, scales,
                                            part[0], absmax, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        goto error;
    }
    if (double_quant && nest(state, function, &origin, self, absmax) < 0) goto error;
    Py_XDECREF(scratch);
    hb_array_release(&in);
    return self;
error:
    Py_XDECREF(scratch);
    hb_array_release(&in);
    Py_XDECREF((PyObject *)self);
    return NULL;
}

PyDoc_STRVAR(quantize_doc, "quantize($type, x, /, quant_type='nf4', blocksize=64, "
                           "double_quant=False, scales='absmax', *, dtype=None)\n--\n\n"
                           "Quantize float32, bfloat16 or float16 of any shape.");

static PyObject *params4_quantize(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                  PyObject *kwnames)
{
    static const hb_signature signature = {
        "Params4bit.quantize",
        1,
        5,
        1,
        6,
        {"x", "quant_type", "blocksize", "double_quant", "scales", "dtype"}};
    const char *function = signature.function;
    PyObject *value[6];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_format4 format = HB_NF4;
    int64_t blocksize = 64;
    bool double_quant = false;
    int scales = HB_SCALES_ABSMAX;
    if (hb_arg_format4(function, "quant_type", value[1], &format) < 0 ||
        hb_arg_blocksize4(function, "blocksize", value[2], &blocksize) < 0 ||
        hb_arg_bool(function, "double_quant", value[3], &double_quant) < 0 ||
        hb_arg_choice(function, "scales", value[4], hb_scales_names, &scales) < 0)
        return NULL;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    return (PyObject *)hb_params4_quantize(state, function, "x", value[0], value[5], format,
                                           blocksize, double_quant, (hb_scales)scales);
}

PyDoc_STRVAR(
    from_parts_doc,
    "from_parts($type, /, packed, absmax, *, quant_type, blocksize, shape, "
    "dtype='float32', nested_absmax=None, nested_map=None, nested_offset=0.0, "
    "nested_blocksize=256)\n--\n\n"
    "Zero-copy over arrays in the bitsandbytes layout. packed: any dtype, its bytes count; "
    "absmax: float32, or uint8 codes beside nested_absmax and nested_map.");

static PyObject *params4_from_parts(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Params4bit.from_parts",
                                           0,
                                           2,
                                           5,
                                           10,
                                           {"packed", "absmax", "quant_type", "blocksize", "shape",
                                            "dtype", "nested_absmax", "nested_map", "nested_offset",
                                            "nested_blocksize"}};
    const char *function = signature.function;
    PyObject *value[10];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_weights4_args weights_args = {value[0], value[1], value[2], value[3],
                                           value[6], value[7], value[8], value[9]};
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    int ndim = 0;
    int64_t shape[HB_MAX_NDIM], numel = 0;
    hb_dtype dtype = HB_F32;
    hb_weights4 weights;
    if (hb_arg_shape(function, "shape", value[4], &ndim, shape, &numel) < 0 ||
        hb_arg_dtype(function, "dtype", value[5], &dtype) < 0 ||
        hb_weights4_get(state, function, &weights_args, HB_TAKE_KEEP, &weights) < 0)
        return NULL;
    hb_params4 *self = NULL;
    const hb_origin origin = hb_origin_of(&weights.packed);
    if (hb_weights4_set_numel(function, &weights, numel) == 0)
        self = params4_new((PyTypeObject *)type, &weights.tensor, dtype, ndim, shape, &origin);
    if (self == NULL) {
        hb_weights4_release(&weights);
        return NULL;
    }
    self->base.owner[0] = weights.packed.owner; // references move
    self->base.owner[1] = weights.absmax.owner;
    self->base.owner[2] = weights.nested_absmax.owner;
    self->base.owner[3] = weights.nested_map.owner;
    self->base.owner[4] = weights.nested_offset.owner;
    return (PyObject *)self;
}

PyObject *hb_params4_deepcopy(PyObject *op, PyObject *Py_UNUSED(memo))
{
    static const char function[] = "Params4bit.__deepcopy__";
    enum { PARTS = 5 };
    hb_state *state = hb_state_of(op);
    const hb_tensor4 *source = &params4(op)->tensor;
    const bool nested = is_nested(source);
    const int64_t bytes[PARTS] = {hb_packed_bytes(source->numel),
                                  n_blocks_of(source) * (nested ? 1 : (int64_t)sizeof(float)),
                                  nested ? n_nested_of(source) * (int64_t)sizeof(float) : 0,
                                  nested ? 256 * (int64_t)sizeof(float) : 0,
                                  source->nested_offset_at ? (int64_t)sizeof(float) : 0};
    const void *from[PARTS] = {source->packed,
                               nested ? (const void *)source->absmax_codes : source->absmax,
                               source->nested_absmax, source->nested_map, source->nested_offset_at};
    void *part[PARTS];
    hb_origin origin;
    if (hb_origin_enter(state, function, &params4(op)->base.origin, &origin) < 0) return NULL;
    PyObject *owner = hb_memory_new(function, &origin, PARTS, bytes, part);
    if (owner == NULL) return NULL;
    for (int i = 0; i < PARTS; i++)
        if (hb_memory_copy(state, function, &origin.device, part[i], from[i], bytes[i]) < 0) {
            Py_DECREF(owner);
            return NULL;
        }
    hb_tensor4 tensor = *source;
    tensor.packed = part[0];
    if (nested) {
        tensor.absmax_codes = part[1];
        tensor.nested_absmax = part[2];
        tensor.nested_map = part[3];
        if (source->nested_offset_at != NULL) tensor.nested_offset_at = part[4];
    } else {
        tensor.absmax = part[1];
    }
    hb_params4 *self = params4_new(Py_TYPE(op), &tensor, params4(op)->dtype, params4(op)->ndim,
                                   params4(op)->shape, &origin);
    if (self == NULL)
        Py_DECREF(owner);
    else
        self->base.owner[0] = owner;
    return (PyObject *)self;
}

// ---- rows ---------------------------------------------------------------------------------------

// Scales of blocks [first, first + n) as float32 of our own, for slices that begin inside a nested
// block.
static int expand_scales(hb_state *state, const char *function, const hb_tensor4 *source,
                         int64_t first, int64_t n, hb_params4 *self)
{
    const int64_t bytes = n * (int64_t)sizeof(float);
    void *part;
    hb_origin origin;
    if (hb_origin_enter(state, function, &self->base.origin, &origin) < 0) return -1;
    self->base.owner[1] = hb_memory_new(function, &origin, 1, &bytes, &part);
    if (self->base.owner[1] == NULL) return -1;
    hb_error error;
    hb_status status = HB_OK;
    Py_BEGIN_ALLOW_THREADS
    if (origin.device.type == HB_CUDA)
        status = hb_expand_absmax_cuda(function, &origin.device, source, first, n, part, &error);
    else
        hb_expand_absmax(&state->context, source, first, n, part);
    Py_END_ALLOW_THREADS
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        return -1;
    }
    self->tensor.absmax = part;
    self->tensor.absmax_codes = NULL;
    self->tensor.nested_absmax = NULL;
    self->tensor.nested_map = NULL;
    self->tensor.nested_offset_at = NULL;
    return 0;
}

static PyObject *params4_subscript(PyObject *op, PyObject *rows)
{
    const char *function = "Params4bit.__getitem__";
    const hb_params4 *source = params4(op);
    hb_tensor4 tensor = source->tensor;
    int64_t start = 0, stop = 0;
    if (source->ndim == 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tensor with rows, got a scalar", function);
        return NULL;
    }
    if (hb_slice_rows(function, rows, source->shape[0], &start, &stop) < 0) return NULL;
    const int64_t depth = tensor.depth;
    if (depth % tensor.blocksize != 0 && (start > 0 || stop < source->shape[0])) {
        PyErr_Format(PyExc_ValueError,
                     "%s: rows, expected rows of whole blocks (depth %% blocksize == 0), got depth "
                     "%lld and blocksize %lld",
                     function, (long long)depth, (long long)tensor.blocksize);
        return NULL;
    }
    const int64_t first =
        start * (depth / tensor.blocksize); // of blocks; 0 when depth is no multiple
    int64_t shape[HB_MAX_NDIM];
    for (int d = 0; d < source->ndim; d++) shape[d] = source->shape[d];
    shape[0] = stop - start;
    tensor.numel = shape[0] * depth;
    tensor.packed += start * depth / 2;
    const bool expand = is_nested(&tensor) && first % tensor.nested_blocksize != 0;
    if (!is_nested(&tensor)) {
        tensor.absmax += first;
    } else if (!expand) {
        tensor.absmax_codes += first;
        tensor.nested_absmax += first / tensor.nested_blocksize;
    }
    hb_params4 *self =
        params4_new(Py_TYPE(op), &tensor, source->dtype, source->ndim, shape, &source->base.origin);
    if (self == NULL) return NULL;
    self->base.owner[0] = Py_NewRef(op);
    if (expand && expand_scales(hb_state_of(op), function, &source->tensor, first,
                                n_blocks_of(&tensor), self) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static Py_ssize_t params4_length(PyObject *op)
{
    if (params4(op)->ndim > 0) return (Py_ssize_t)params4(op)->shape[0];
    PyErr_SetString(PyExc_TypeError,
                    "Params4bit.__len__: expected a tensor with rows, got a scalar");
    return -1;
}

// ---- methods ------------------------------------------------------------------------------------

PyDoc_STRVAR(dequantize_doc, "dequantize($self, /, dtype=None, out=None)\n--\n\n"
                             "The tensor again, in its own dtype, `dtype`, or `out`'s.");

static PyObject *params4_dequantize(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Params4bit.dequantize", 0, 2, 0, 2, {"dtype", "out"}};
    const hb_params4 *self = params4(op);
    hb_state *state = hb_state_of(op);
    PyObject *value[2];
    hb_dtype dtype;
    hb_origin origin;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_result_dtype(state, signature.function, value[0], value[1], self->dtype, &dtype) < 0 ||
        hb_origin_enter(state, signature.function, &self->base.origin, &origin) < 0)
        return NULL;
    return hb_dequantize4_run(state, signature.function, &self->tensor, 0, dtype, &origin,
                              self->ndim, self->shape, value[1]);
}

static PyObject *wrap_part(PyObject *op, const void *data, hb_dtype dtype, int64_t size)
{
    return hb_wrap(op, &params4(op)->base.origin, (void *)(uintptr_t)data, dtype, 1, &size);
}

static PyObject *wrap_offset(PyObject *op)
{
    const hb_tensor4 *tensor = &params4(op)->tensor;
    if (tensor->nested_offset_at != NULL) return wrap_part(op, tensor->nested_offset_at, HB_F32, 1);
    return PyFloat_FromDouble((double)tensor->nested_offset);
}

static PyObject *get_packed(PyObject *op, void *Py_UNUSED(closure))
{
    const hb_tensor4 *tensor = &params4(op)->tensor;
    return wrap_part(op, tensor->packed, HB_U8, hb_packed_bytes(tensor->numel));
}

static PyObject *get_absmax(PyObject *op, void *Py_UNUSED(closure))
{
    const hb_tensor4 *tensor = &params4(op)->tensor;
    if (is_nested(tensor)) return wrap_part(op, tensor->absmax_codes, HB_U8, n_blocks_of(tensor));
    return wrap_part(op, tensor->absmax, HB_F32, n_blocks_of(tensor));
}

PyDoc_STRVAR(parts_doc, "parts($self, /)\n--\n\nWhat from_parts() takes, as a dict.");

static PyObject *params4_parts(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const hb_params4 *self = params4(op);
    const hb_tensor4 *tensor = &self->tensor;
    PyObject *parts = PyDict_New();
    if (parts == NULL) return NULL;
    if (hb_dict_take(parts, "packed", get_packed(op, NULL)) < 0 ||
        hb_dict_take(parts, "absmax", get_absmax(op, NULL)) < 0)
        goto error;
    if (is_nested(tensor)) {
        if (hb_dict_take(parts, "nested_absmax",
                         wrap_part(op, tensor->nested_absmax, HB_F32, n_nested_of(tensor))) < 0 ||
            hb_dict_take(parts, "nested_map", wrap_part(op, tensor->nested_map, HB_F32, 256)) < 0 ||
            hb_dict_take(parts, "nested_offset", wrap_offset(op)) < 0 ||
            hb_dict_take(parts, "nested_blocksize", PyLong_FromLongLong(tensor->nested_blocksize)) <
                0)
            goto error;
    }
    const char *quant_type = hb_codebook4_get(tensor->format)->name;
    if (hb_dict_take(parts, "quant_type", PyUnicode_FromString(quant_type)) < 0 ||
        hb_dict_take(parts, "blocksize", PyLong_FromLongLong(tensor->blocksize)) < 0 ||
        hb_dict_take(parts, "shape", hb_shape_tuple(self->shape, self->ndim)) < 0 ||
        hb_dict_take(parts, "dtype", PyUnicode_FromString(hb_dtype_name(self->dtype))) < 0)
        goto error;
    return parts;
error:
    Py_DECREF(parts);
    return NULL;
}

PyDoc_STRVAR(dlpack_doc,
             "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, "
             "copy=None)\n--\n\nThe packed bytes, uint8 [(numel + 1) // 2], read-only.");

static PyObject *params4_dlpack(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                PyObject *kwnames)
{
    const hb_tensor4 *tensor = &params4(op)->tensor;
    const int64_t size = hb_packed_bytes(tensor->numel);
    return hb_to_dlpack(hb_state_of(op), "Params4bit.__dlpack__", op, &params4(op)->base.origin,
                        (void *)(uintptr_t)tensor->packed, HB_U8, 1, &size, args, n_args, kwnames);
}

// ---- properties ---------------------------------------------------------------------------------

static int64_t stored_bytes(const hb_tensor4 *tensor)
{
    const int64_t packed = hb_packed_bytes(tensor->numel), n_blocks = n_blocks_of(tensor);
    if (!is_nested(tensor)) return packed + n_blocks * 4;
    return packed + n_blocks + n_nested_of(tensor) * 4 + 256 * 4;
}

static double bits_per_param(const hb_tensor4 *tensor)
{
    return tensor->numel == 0 ? 0.0 : 8.0 * (double)stored_bytes(tensor) / (double)tensor->numel;
}

static PyObject *get_quant_type(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_codebook4_get(params4(op)->tensor.format)->name);
}

static PyObject *get_blocksize(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(params4(op)->tensor.blocksize);
}

static PyObject *get_shape(PyObject *op, void *Py_UNUSED(closure))
{
    return hb_shape_tuple(params4(op)->shape, params4(op)->ndim);
}

static PyObject *get_dtype(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_dtype_name(params4(op)->dtype));
}

static PyObject *get_double_quant(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_nested(&params4(op)->tensor));
}

static PyObject *get_nbytes(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(stored_bytes(&params4(op)->tensor));
}

static PyObject *get_bits_per_param(PyObject *op, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble(bits_per_param(&params4(op)->tensor));
}

static PyObject *params4_repr(PyObject *op)
{
    const hb_params4 *self = params4(op);
    char shape[200], device[HB_DEVICE_SUFFIX];
    hb_shape_text(self->shape, self->ndim, shape, sizeof shape);
    hb_device_suffix(&self->base.origin.device, device);
    return PyUnicode_FromFormat("Params4bit(%s, shape=%s, blocksize=%lld, dtype=%s%s%s)",
                                hb_codebook4_get(self->tensor.format)->name, shape,
                                (long long)self->tensor.blocksize, hb_dtype_name(self->dtype),
                                is_nested(&self->tensor) ? ", double_quant=True" : "", device);
}

PyDoc_STRVAR(repr_html_doc, "_repr_html_($self, /)\n--\n\nA table for notebooks.");

static PyObject *params4_repr_html(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const hb_tensor4 *tensor = &params4(op)->tensor;
    const int64_t bytes = stored_bytes(tensor);
    const double dense = (double)tensor->numel * (double)hb_dtype_bytes(params4(op)->dtype);
    hb_html_row rows[] = {
        {"shape", get_shape(op, NULL)},
        {"quant type", get_quant_type(op, NULL)},
        {"block size", get_blocksize(op, NULL)},
        {"dtype", get_dtype(op, NULL)},
        {"double quantization", PyUnicode_FromString(is_nested(tensor) ? "yes" : "no")},
        {"device", hb_object_device(op, NULL)},
        {"bytes", PyLong_FromLongLong(bytes)},
        {"bits per parameter", hb_text_decimal(bits_per_param(tensor), "")},
        {"compression", hb_text_decimal(bytes == 0 ? 1.0 : dense / (double)bytes, "x")},
    };
    return hb_html_table("Params4bit", rows, sizeof rows / sizeof *rows);
}

static PyMethodDef methods[] = {
    {"quantize", HB_CLASS_METHOD(params4_quantize), quantize_doc},
    {"from_parts", HB_CLASS_METHOD(params4_from_parts), from_parts_doc},
    {"dequantize", HB_METHOD(params4_dequantize), dequantize_doc},
    {"parts", params4_parts, METH_NOARGS, parts_doc},
    {"__dlpack__", HB_METHOD(params4_dlpack), dlpack_doc},
    {"__dlpack_device__", hb_object_dlpack_device, METH_NOARGS, hb_dlpack_device_doc},
    {"__copy__", hb_object_copy, METH_NOARGS, hb_copy_doc},
    {"__deepcopy__", hb_params4_deepcopy, METH_O, hb_deepcopy_doc},
    {"__reduce__", hb_object_reduce, METH_NOARGS, hb_reduce_doc},
    {"_repr_html_", params4_repr_html, METH_NOARGS, repr_html_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"packed", get_packed, NULL, "uint8 [(numel + 1) // 2], zero-copy.", NULL},
    {"absmax", get_absmax, NULL, "float32 [blocks], or uint8 codes when nested; zero-copy.", NULL},
    {"quant_type", get_quant_type, NULL, "\"nf4\" or \"fp4\".", NULL},
    {"blocksize", get_blocksize, NULL, "Elements that share a scale.", NULL},
    {"shape", get_shape, NULL, "Shape of the tensor that was quantized.", NULL},
    {"dtype", get_dtype, NULL, "Dtype of the tensor that was quantized.", NULL},
    {"device", hb_object_device, NULL, "\"cpu\" or \"cuda:0\".", NULL},
    {"double_quant", get_double_quant, NULL, "Are the scales nested?", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of all arrays in parts().", NULL},
    {"bits_per_param", get_bits_per_param, NULL, "8 * nbytes / numel.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", HB_MEMBER_OFFSET, offsetof(hb_object, weakrefs), HB_MEMBER_READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(type_doc,
             "A tensor in 4 bits, bitsandbytes layout. Immutable; owns its memory or keeps "
             "its owners alive.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)type_doc},
    {Py_tp_dealloc, hb_object_dealloc},
    {Py_tp_traverse, hb_object_traverse},
    {Py_tp_repr, params4_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {Py_mp_length, params4_length},
    {Py_mp_subscript, params4_subscript},
    {0, NULL},
};

PyType_Spec hb_params4bit_spec = {
    .name = "halfbyte._C.Params4bit",
    .basicsize = sizeof(hb_params4),
    .flags = HB_TYPE_FLAGS | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
