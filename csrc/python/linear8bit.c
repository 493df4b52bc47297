// Linear8bit: y = x W^T + b for a row-wise int8 W. owner[0] is the Int8Params, owner[1] what keeps
// the bias alive (NULL without one).
#include "python/object.h"
#include "python/types.h"
#include "python/weights8.h"

typedef struct {
    hb_object base;
    vectorcallfunc vectorcall;
    hb_int8_mode mode;
    float threshold;
    bool has_bias;
    hb_view bias;
} linear8;

static inline linear8 *linear8_of(PyObject *self)
{
    return (linear8 *)self;
}

static inline const hb_int8params *weight_of(PyObject *self)
{
    return (const hb_int8params *)linear8_of(self)->base.owner[0];
}

static PyObject *linear8_vectorcall(PyObject *self, PyObject *const *args, size_t n_args_flag,
                                    PyObject *kwnames);

// ---- making -------------------------------------------------------------------------------------

// Takes the references to `weight` and `bias->owner`, also on failure.
static PyObject *linear8_new(PyTypeObject *type, PyObject *weight, hb_array *bias, float threshold,
                             hb_int8_mode mode)
{
    linear8 *self = (linear8 *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(weight);
        if (bias != NULL) hb_array_release(bias);
        return NULL;
    }
    self->vectorcall = linear8_vectorcall;
    self->threshold = threshold;
    self->mode = mode;
    self->base.owner[0] = weight;
    self->base.origin = ((hb_int8params *)weight)->base.origin;
    if (bias != NULL) {
        self->base.owner[1] = bias->owner;
        self->has_bias = true;
        self->bias = bias->view;
    }
    return (PyObject *)self;
}

// Takes the reference to `weight` (NULL: an exception is set), also on failure.
static PyObject *build(hb_state *state, const char *function, PyTypeObject *type, PyObject *weight,
                       PyObject *bias_object, float threshold, hb_int8_mode mode)
{
    hb_array bias;
    if (weight == NULL) return NULL;
    if (hb_given(bias_object) &&
        hb_bias_get(state, bias_object, function, ((hb_int8params *)weight)->shape[0],
                    &((hb_int8params *)weight)->base.origin.device, HB_TAKE_KEEP | HB_TAKE_FLAT,
                    &bias) < 0) {
        Py_DECREF(weight);
        return NULL;
    }
    return linear8_new(type, weight, hb_given(bias_object) ? &bias : NULL, threshold, mode);
}

static PyObject *linear8_tp_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const hb_signature signature = {
        "Linear8bit", 0, 4, 1, 4, {"weight", "bias", "threshold", "mode"}};
    hb_state *state = PyType_GetModuleState(type);
    PyObject *value[4];
    float threshold = 0.0f;
    int mode = HB_INT8_DYNAMIC;
    if (hb_parse_tuple(&signature, args, kwargs, value) < 0 ||
        hb_arg_threshold(signature.function, value[2], &threshold) < 0 ||
        hb_arg_choice(signature.function, "mode", value[3], hb_mode_names, &mode) < 0)
        return NULL;
    if (!Py_IS_TYPE(value[0], state->int8params_type)) {
        PyErr_Format(PyExc_TypeError, "Linear8bit: weight, expected Int8Params, got %s",
                     Py_TYPE(value[0])->tp_name);
        return NULL;
    }
    return build(state, signature.function, type, Py_NewRef(value[0]), value[1], threshold,
                 (hb_int8_mode)mode);
}

PyDoc_STRVAR(from_float_doc,
             "from_float($type, /, weight, bias=None, threshold=0.0, mode='dynamic')"
             "\n--\n\nQuantize weight [rows, depth] and make a layer of it.");

static PyObject *linear8_from_float(PyObject *type, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {
        "Linear8bit.from_float", 0, 4, 1, 4, {"weight", "bias", "threshold", "mode"}};
    const char *function = signature.function;
    hb_state *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *value[4];
    float threshold = 0.0f;
    int mode = HB_INT8_DYNAMIC;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        hb_arg_threshold(function, value[2], &threshold) < 0 ||
        hb_arg_choice(function, "mode", value[3], hb_mode_names, &mode) < 0)
        return NULL;
    hb_int8params *weight = hb_int8params_quantize(state, function, "weight", value[0], NULL);
    return build(state, function, (PyTypeObject *)type, (PyObject *)weight, value[1], threshold,
                 (hb_int8_mode)mode);
}

static PyObject *linear8_deepcopy(PyObject *op, PyObject *memo)
{
    linear8 *self = linear8_of(op);
    static const char function[] = "Linear8bit.__deepcopy__";
    hb_state *state = hb_state_of(op);
    hb_origin origin;
    if (hb_origin_enter(state, function, &self->base.origin, &origin) < 0) return NULL;
    hb_array bias = {.view = self->bias, .api = origin.api};
    bias.view.device = origin.device;
    if (self->has_bias && hb_array_own(state, function, &bias) < 0) return NULL;
    PyObject *weight = hb_int8params_deepcopy(self->base.owner[0], memo);
    if (weight == NULL) {
        hb_array_release(&bias);
        return NULL;
    }
    return linear8_new(Py_TYPE(op), weight, self->has_bias ? &bias : NULL, self->threshold,
                       self->mode);
}

// ---- calls --------------------------------------------------------------------------------------

static PyObject *linear8_vectorcall(PyObject *op, PyObject *const *args, size_t n_args_flag,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Linear8bit", 1, 2, 1, 2, {"x", "out"}};
    const linear8 *self = linear8_of(op);
    PyObject *value[2] = {NULL, NULL};
    const Py_ssize_t n_args = PyVectorcall_NARGS(n_args_flag);
    if (n_args == 1 && kwnames == NULL)
        value[0] = args[0];
    else if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0)
        return NULL;
    const hb_linear8_call call = {.function = "Linear8bit",
                                  .input_name = "x",
                                  .mode = self->mode,
                                  .threshold = self->threshold,
                                  .bias = self->has_bias ? &self->bias : NULL,
                                  .device = self->base.origin.device};
    const hb_int8params *weight = weight_of(op);
    return hb_linear8_run(hb_state_of(op), &call, weight->codes, weight->scale, weight->shape[0],
                          weight->shape[1], value[0], value[1]);
}

PyDoc_STRVAR(grad_input_doc, "grad_input($self, dy, /, out=None)\n--\n\n"
                             "dx = dy W: [..., rows] -> [..., depth].");

static PyObject *linear8_grad_input(PyObject *op, PyObject *const *args, Py_ssize_t n_args,
                                    PyObject *kwnames)
{
    static const hb_signature signature = {"Linear8bit.grad_input", 1, 2, 1, 2, {"dy", "out"}};
    PyObject *value[2];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    const hb_linear8_call call = {.function = signature.function,
                                  .input_name = "dy",
                                  .backward = true,
                                  .device = linear8_of(op)->base.origin.device};
    const hb_int8params *weight = weight_of(op);
    return hb_linear8_run(hb_state_of(op), &call, weight->codes, weight->scale, weight->shape[0],
                          weight->shape[1], value[0], value[1]);
}

// ---- properties ---------------------------------------------------------------------------------

static PyObject *get_weight(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(linear8_of(op)->base.owner[0]);
}

static PyObject *get_bias(PyObject *op, void *Py_UNUSED(closure))
{
    const linear8 *self = linear8_of(op);
    if (!self->has_bias) Py_RETURN_NONE;
    return hb_wrap(op, &self->base.origin, self->bias.data, self->bias.dtype, 1, self->bias.shape);
}

static PyObject *get_threshold(PyObject *op, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble((double)linear8_of(op)->threshold);
}

static PyObject *get_mode(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(hb_mode_names[linear8_of(op)->mode]);
}

static PyObject *get_in_features(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(weight_of(op)->shape[1]);
}

static PyObject *get_out_features(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(weight_of(op)->shape[0]);
}

static PyObject *linear8_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const linear8 *self = linear8_of(op);
    PyObject *bias = get_bias(op, NULL);
    if (bias == NULL) return NULL;
    return Py_BuildValue("O(ONds)", Py_TYPE(op), self->base.owner[0], bias, (double)self->threshold,
                         hb_mode_names[self->mode]);
}

static PyObject *linear8_repr(PyObject *op)
{
    const linear8 *self = linear8_of(op);
    const int64_t *shape = weight_of(op)->shape;
    char device[HB_DEVICE_SUFFIX];
    hb_device_suffix(&self->base.origin.device, device);
    PyObject *threshold = get_threshold(op, NULL);
    if (threshold == NULL) return NULL;
    PyObject *text = PyUnicode_FromFormat(
        "Linear8bit(in_features=%lld, out_features=%lld, bias=%s, threshold=%R, mode=%s%s)",
        (long long)shape[1], (long long)shape[0], self->has_bias ? "True" : "False", threshold,
        hb_mode_names[self->mode], device);
    Py_DECREF(threshold);
    return text;
}

PyDoc_STRVAR(repr_html_doc, "_repr_html_($self, /)\n--\n\nA table for notebooks.");

static PyObject *linear8_repr_html(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const linear8 *self = linear8_of(op);
    PyObject *weight = self->base.owner[0];
    hb_html_row rows[] = {
        {"in features", get_in_features(op, NULL)},
        {"out features", get_out_features(op, NULL)},
        {"bias", PyUnicode_FromString(self->has_bias ? "yes" : "no")},
        {"mode", get_mode(op, NULL)},
        {"threshold", get_threshold(op, NULL)},
        {"weight", PyObject_Repr(weight)},
        {"bytes of weight", PyObject_GetAttrString(weight, "nbytes")},
    };
    return hb_html_table("Linear8bit", rows, sizeof rows / sizeof *rows);
}

static PyMethodDef methods[] = {
    {"from_float", HB_CLASS_METHOD(linear8_from_float), from_float_doc},
    {"grad_input", HB_METHOD(linear8_grad_input), grad_input_doc},
    {"__copy__", hb_object_copy, METH_NOARGS, hb_copy_doc},
    {"__deepcopy__", linear8_deepcopy, METH_O, hb_deepcopy_doc},
    {"__reduce__", linear8_reduce, METH_NOARGS, hb_reduce_doc},
    {"_repr_html_", linear8_repr_html, METH_NOARGS, repr_html_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"weight", get_weight, NULL, "The Int8Params.", NULL},
    {"bias", get_bias, NULL, "[rows], zero-copy, or None.", NULL},
    {"threshold", get_threshold, NULL, "Outliers of x are |x| >= threshold; 0: none.", NULL},
    {"mode", get_mode, NULL, "\"dynamic\" (LLM.int8()) or \"exact\".", NULL},
    {"in_features", get_in_features, NULL, "depth of the weight.", NULL},
    {"out_features", get_out_features, NULL, "rows of the weight.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", HB_MEMBER_OFFSET, offsetof(hb_object, weakrefs), HB_MEMBER_READONLY,
     NULL},
    {"__vectorcalloffset__", HB_MEMBER_OFFSET, offsetof(linear8, vectorcall), HB_MEMBER_READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(type_doc,
             "Linear8bit(weight, bias=None, threshold=0.0, mode='dynamic')\n--\n\n"
             "y = x W^T + b for a row-wise int8 W [rows, depth]: layer(x) with x [..., depth].");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)type_doc},
    {Py_tp_new, linear8_tp_new},
    {Py_tp_dealloc, hb_object_dealloc},
    {Py_tp_traverse, hb_object_traverse},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, linear8_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec hb_linear8bit_spec = {
    .name = "halfbyte._C.Linear8bit",
    .basicsize = sizeof(linear8),
    .flags = HB_TYPE_FLAGS | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = slots,
};
