// Linear4bit: y = x W^T + b for a 4-bit W. owner[0] is the Params4bit, owner[1] what keeps the bias
// alive (NULL without one).
#include "python/object.h"
#include "python/types.h"
#include "python/weights4.h"

typedef struct {
    hb_object base;
    vectorcallfunc vectorcall;
    hb_compute compute;
    bool has_bias;
    hb_view bias;
} linear4;

static inline linear4 *linear4_of(PyObject *self)
{
    return (linear4 *)self;
}

static inline const hb_params4 *weight_of(PyObject *self)
{
    return (const hb_params4 *)linear4_of(self)->base.owner[0];
}

static PyObject *linear4_vectorcall(PyObject *self, PyObject *const *args, size_t n_args_flag,
                                    PyObject *kwnames);

// ---- making -------------------------------------------------------------------------------------

// Takes the references to `weight` and `bias->owner`, also on failure.
static PyObject *linear4_new(PyTypeObject *type, PyObject *weight, hb_array *bias,
                             hb_compute compute)
{
    linear4 *self = (linear4 *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(weight);
        if (bias != NULL) hb_array_release(bias);
        return NULL;
    }
    self->vectorcall = linear4_vectorcall;
    self->compute = compute;
    self->base.owner[0] = weight;
    self->base.origin = ((hb_params4 *)weight)->base.origin;
    if (bias != NULL) {
        self->base.owner[1] = bias->owner;
        self->has_bias = true;
        self->bias = bias->view;
    }
    return (PyObject *)self;
}

static int check_weight(const char *function, const hb_params4 *weight)
{
    if (weight->ndim == 2) return 0;
    char shape[200];
    hb_shape_text(weight->shape, weight->ndim, shape, sizeof shape);
    PyErr_Format(PyExc_ValueError, "%s: weight, expected shape [rows, depth], got %s", function,
                 shape);
    return -1;
}

// Takes the reference to `weight` (NULL: an exception is set), also on failure.
static PyObject *build(hb_state *state, const char *function, PyTypeObject *type, PyObject *weight,
                       PyObject *bias_object, hb_compute compute)
{
    hb_array bias;
    if (weight == NULL) return NULL;
    if (((hb_params4 *)weight)->base.origin.device.type == HB_CUDA &&
        (compute == HB_COMPUTE_I16 || compute == HB_COMPUTE_I8)) {
        PyErr_Format(PyExc_ValueError, "%s: compute, expected float32 or bfloat16 on CUDA, got %s",
                     function, hb_compute_names[compute]);
        Py_DECREF(weight);
        return NULL;
    }
    if (check_weight(function, (hb_params4 *)weight) < 0 ||
        (hb_given(bias_object) &&
         hb_bias_get(state, bias_object, function, ((hb_params4 *)weight)->shape[0],
                     &((hb_params4 *)weight)->base.origin.device, HB_TAKE_KEEP | HB_TAKE_FLAT,
                     &bias) < 0)) {
        Py_DECREF(weight);
        return NULL;
    }
    return linear4_new(type, weight, hb_given(bias_object) ? &bias : NULL, compute);
}

static PyObject *linear4_tp_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const hb_signature signature = {"Linear4bit", 0, 3, 1, 3, {"weight", "bias", "compute"}};
    hb_state *state = PyType_GetModuleState(type);
    PyObject *value[3];
    int compute = HB_COMPUTE_F32;
    if (hb_parse_tuple(&signature, args, kwargs, value) < 0 ||
        hb_arg_choice(signature.function, "compute", value[2], hb_compute_names, &compute) < 0)
        return NULL;
    if (!Py_IS_TYPE(value[0], state->params4bit_type)) {
        PyErr_Format(PyExc_TypeError, "Linear4bit: weight, expected Params4bit, got %s",
                     Py_TYPE(value[0])->tp_name);
        return NULL;
    }
    return build(state, signature.function, type, Py_NewRef(value[0]), value[1],
                 (hb_compute)compute);
}

PyDoc_STRVAR(from_float_doc,
             "from_float($type, /, weight, bias=None, quant_type='nf4', blocksize=64, "
             "double_quant=False, scales='absmax', compute='float32')\n--\n\n"
             "Quantize weight [rows, depth] and make a layer of it.");

static PyObject *linear4_from_float(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {
        "Linear4bit.from_float",
        0,
        7,
        1,
        7,
        {"weight", "bias", "quant_type", "blocksize", "double_quant", "scales", "compute"}};
    const char *function = signature.function;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *value[7];
    hb_format4 format = HB_NF4;
    int64_t blocksize = 64;
    bool double_quant = false;
    int scales = HB_SCALES_ABSMAX, compute = HB_COMPUTE_F32;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_arg_format4(function, "quant_type", value[2], &format) < 0 ||
        hb_arg_blocksize4(function, "blocksize", value[3], &blocksize) < 0 ||
        hb_arg_bool(function, "double_quant", value[4], &double_quant) < 0 ||
        hb_arg_choice(function, "scales", value[5], hb_scales_names, &scales) < 0 ||
        hb_arg_choice(function, "compute", value[6], hb_compute_names, &compute) < 0)
        return NULL;
    hb_params4 *weight = hb_params4_quantize(state, function, "weight", value[0], NULL, format,
                                             blocksize, double_quant, (hb_scales)scales);
    return build(state, function, (PyTypeObject *)type, (PyObject *)weight, value[1],
                 (hb_compute)compute);
}

static PyObject *linear4_deepcopy(PyObject *op, PyObject *memo)
{
    linear4 *self = linear4_of(op);
    static const char function[] = "Linear4bit.__deepcopy__";
    hb_state *state = hb_state_of(op);
    hb_origin origin;
    if (hb_origin_enter(state, function, &self->base.origin, &origin) < 0) return NULL;
    hb_array bias = {.view = self->bias, .api = origin.api};
    bias.view.device = origin.device;
    if (self->has_bias && hb_array_own(state, function, &bias) < 0) return NULL;
    PyObject *weight = hb_params4_deepcopy(self->base.owner[0], memo);
    if (weight == NULL) {
        hb_array_release(&bias);
        return NULL;
    }
    return linear4_new(Py_TYPE(op), weight, self->has_bias ? &bias : NULL, self->compute);
}

// ---- calls --------------------------------------------------------------------------------------

static PyObject *linear4_vectorcall(PyObject *op, PyObject *const *args, size_t n_args_flag,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Linear4bit", 1, 2, 1, 2, {"x", "out"}};
    const linear4 *self = linear4_of(op);
    PyObject *value[2] = {NULL, NULL};
    const Py_ssize_t n_args = PyVectorcall_NARGS(n_args_flag);
    if (n_args == 1 && kwnames == NULL)
        value[0] = args[0];
    else if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0)
        return NULL;
    const hb_linear4_call call = {.function = "Linear4bit",
                                  .input_name = "x",
                                  .compute = self->compute,
                                  .bias = self->has_bias ? &self->bias : NULL};
    return hb_linear4_run(hb_state_of(op), &call, &weight_of(op)->tensor, value[0], value[1]);
}

PyDoc_STRVAR(grad_input_doc, "grad_input($self, dy, /, out=None)\n--\n\n"
                             "dx = dy W: [..., rows] -> [..., depth].");

static PyObject *linear4_grad_input(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Linear4bit.grad_input", 1, 2, 1, 2, {"dy", "out"}};
    PyObject *value[2];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_linear4_call call = {.function = signature.function,
                                  .input_name = "dy",
                                  .backward = true,
                                  .compute = linear4_of(op)->compute};
    return hb_linear4_run(hb_state_of(op), &call, &weight_of(op)->tensor, value[0], value[1]);
}

// ---- properties ---------------------------------------------------------------------------------

static PyObject *get_weight(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(linear4_of(op)->base.owner[0]);
}

static PyObject *get_bias(PyObject *op, void *Py_UNUSED(closure))
{
    const linear4 *self = linear4_of(op);
    if (!self->has_bias) Py_RETURN_NONE;
    return hb_wrap(op, &self->base.origin, self->bias.data, self->bias.dtype, 1, self->bias.shape);
}

static PyObject *get_compute(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_compute_names[linear4_of(op)->compute]);
}

static PyObject *get_in_features(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(weight_of(op)->tensor.depth);
}

static PyObject *get_out_features(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(weight_of(op)->tensor.rows);
}

static PyObject *linear4_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const linear4 *self = linear4_of(op);
    PyObject *bias = get_bias(op, NULL);
    if (bias == NULL) return NULL;
    return Py_BuildValue("O(ONs)", Py_TYPE(op), self->base.owner[0], bias,
                         hb_compute_names[self->compute]);
}

static PyObject *linear4_repr(PyObject *op)
{
    const linear4 *self = linear4_of(op);
    const hb_tensor4 *tensor = &weight_of(op)->tensor;
    char device[HB_DEVICE_SUFFIX];
    hb_device_suffix(&self->base.origin.device, device);
    return PyUnicode_FromFormat(
        "Linear4bit(%s, in_features=%lld, out_features=%lld, blocksize=%lld, bias=%s, "
        "compute=%s%s)",
        hb_codebook4_get(tensor->format)->name, (long long)tensor->depth, (long long)tensor->rows,
        (long long)tensor->blocksize, self->has_bias ? "True" : "False",
        hb_compute_names[self->compute], device);
}

PyDoc_STRVAR(repr_html_doc, "_repr_html_($self, /)\n--\n\nA table for notebooks.");

static PyObject *linear4_repr_html(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const linear4 *self = linear4_of(op);
    PyObject *weight = self->base.owner[0];
    hb_html_row rows[] = {
        {"in features", get_in_features(op, NULL)},
        {"out features", get_out_features(op, NULL)},
        {"bias", PyUnicode_FromString(self->has_bias ? "yes" : "no")},
        {"compute", get_compute(op, NULL)},
        {"weight", PyObject_Repr(weight)},
        {"bytes of weight", PyObject_GetAttrString(weight, "nbytes")},
    };
    return hb_html_table("Linear4bit", rows, sizeof rows / sizeof *rows);
}

static PyMethodDef methods[] = {
    {"from_float", HB_CLASS_METHOD(linear4_from_float), from_float_doc},
    {"grad_input", HB_METHOD(linear4_grad_input), grad_input_doc},
    {"__copy__", hb_object_copy, METH_NOARGS, hb_copy_doc},
    {"__deepcopy__", linear4_deepcopy, METH_O, hb_deepcopy_doc},
    {"__reduce__", linear4_reduce, METH_NOARGS, hb_reduce_doc},
    {"_repr_html_", linear4_repr_html, METH_NOARGS, repr_html_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"weight", get_weight, NULL, "The Params4bit.", NULL},
    {"bias", get_bias, NULL, "[rows], zero-copy, or None.", NULL},
    {"compute", get_compute, NULL, "\"float32\", \"bfloat16\", \"int16\" or \"int8\".", NULL},
    {"in_features", get_in_features, NULL, "depth of the weight.", NULL},
    {"out_features", get_out_features, NULL, "rows of the weight.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", HB_MEMBER_OFFSET, offsetof(hb_object, weakrefs), HB_MEMBER_READONLY,
     NULL},
    {"__vectorcalloffset__", HB_MEMBER_OFFSET, offsetof(linear4, vectorcall), HB_MEMBER_READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(type_doc, "Linear4bit(weight, bias=None, compute='float32')\n--\n\n"
                       "y = x W^T + b for a 4-bit W [rows, depth]: layer(x) with x [..., depth]. "
                       "compute: how products are formed. int16 and int8 round x and the codebook "
                       "to integers (on the processor; grad_input is exact).");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)type_doc},
    {Py_tp_new, linear4_tp_new},
    {Py_tp_dealloc, hb_object_dealloc},
    {Py_tp_traverse, hb_object_traverse},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, linear4_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec hb_linear4bit_spec = {
    .name = "halfbyte._C.Linear4bit",
    .basicsize = sizeof(linear4),
    .flags = HB_TYPE_FLAGS | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = slots,
};
