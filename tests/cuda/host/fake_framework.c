// A tensor framework for tests: arrays that say they lie on a CUDA device and lie in host memory,
// which the emulator knows. Two types: Tensor has the DLPack exchange API (allocator, current
// stream), Plain only __dlpack__. Knobs make the framework fail.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlpack/dlpack.h>

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static void (*register_memory)(const void *, int64_t, int);
static void (*forget_memory)(const void *);
static int64_t live_blocks, live_bytes, allocations;
static int64_t fail_after = -1; // allocations until one fails; -1: none
static int shift;               // bytes past a multiple of 256 where new memory begins
static bool stream_fails;
static intptr_t current_stream[4];
static PyTypeObject *tensor_type;

// ---- memory -------------------------------------------------------------------------------------

typedef struct {
    DLManagedTensorVersioned managed;
    int64_t shape[8], strides[8];
    char *raw;      // owned memory, or
    PyObject *base; // the tensor that owns it
    int64_t bytes;
} holder;

static void delete_holder(DLManagedTensorVersioned *managed)
{
    holder *h = managed->manager_ctx;
    if (h->raw != NULL) {
        if (forget_memory != NULL) forget_memory(managed->dl_tensor.data);
        memset(h->raw, 0x5A, (size_t)h->bytes + 512); // whoever still reads it notices
        free(h->raw);
        live_blocks--;
        live_bytes -= h->bytes;
    }
    if (h->base != NULL) {
        PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(h->base);
        PyGILState_Release(gil);
    }
    free(h);
}

static holder *holder_new(const DLTensor *like)
{
    holder *h = calloc(1, sizeof *h);
    if (h == NULL) return NULL;
    h->managed.version = (DLPackVersion){DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    h->managed.manager_ctx = h;
    h->managed.deleter = delete_holder;
    h->managed.dl_tensor = *like;
    int64_t stride = 1;
    for (int d = like->ndim - 1; d >= 0; d--) {
        h->shape[d] = like->shape[d];
        h->strides[d] = like->strides != NULL ? like->strides[d] : stride;
        stride *= like->shape[d];
    }
    h->managed.dl_tensor.shape = h->shape;
    h->managed.dl_tensor.strides = h->strides;
    return h;
}

static int allocate(DLTensor *prototype, DLManagedTensorVersioned **out, void *context,
                    void (*set_error)(void *, const char *, const char *))
{
    if (fail_after == 0) {
        set_error(context, "MemoryError", "the fake device is full");
        return -1;
    }
    if (fail_after > 0) fail_after--;
    prototype->strides = NULL;
    prototype->byte_offset = 0;
    holder *h = holder_new(prototype);
    int64_t bytes = (prototype->dtype.bits + 7) / 8;
    for (int d = 0; d < prototype->ndim; d++) bytes *= prototype->shape[d];
    h->bytes = bytes;
    h->raw = malloc((size_t)bytes + 512);
    memset(h->raw, 0xA5, (size_t)bytes + 512);
    char *data = h->raw + (-(uintptr_t)h->raw & 255) + shift;
    h->managed.dl_tensor.data = data;
    if (register_memory != NULL) register_memory(data, bytes, 1);
    live_blocks++;
    live_bytes += bytes;
    allocations++;
    *out = &h->managed;
    return 0;
}

// ---- the types ----------------------------------------------------------------------------------

typedef struct {
    PyObject_HEAD
    DLManagedTensorVersioned *managed; // owned
    PyObject *asked;                   // list: keywords of the calls of __dlpack__
} tensor;

static PyObject *tensor_of(PyTypeObject *type, DLManagedTensorVersioned *managed)
{
    tensor *self = (tensor *)type->tp_alloc(type, 0);
    if (self == NULL) {
        managed->deleter(managed);
        return NULL;
    }
    self->managed = managed;
    self->asked = PyList_New(0);
    return (PyObject *)self;
}

static void tensor_dealloc(PyObject *op)
{
    tensor *self = (tensor *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->managed != NULL && self->managed->deleter != NULL)
        self->managed->deleter(self->managed);
    Py_XDECREF(self->asked);
    type->tp_free(op);
    Py_DECREF(type);
}

static int from_python(void *object, DLManagedTensorVersioned **out)
{
    holder *h = holder_new(&((tensor *)object)->managed->dl_tensor);
    h->managed.flags = ((tensor *)object)->managed->flags;
    h->base = Py_NewRef((PyObject *)object);
    *out = &h->managed;
    return 0;
}

static int borrow(void *object, DLTensor *out)
{
    *out = ((tensor *)object)->managed->dl_tensor;
    return 0;
}

static int to_python(DLManagedTensorVersioned *managed, void **object)
{
    *object = tensor_of(tensor_type, managed);
    return *object == NULL ? -1 : 0;
}

static int work_stream(DLDeviceType type, int32_t index, void **stream)
{
    if (stream_fails) {
        PyErr_SetString(PyExc_RuntimeError, "the fake framework has lost its stream");
        return -1;
    }
    *stream = type == kDLCPU ? NULL : (void *)current_stream[index & 3];
    return 0;
}

static DLPackExchangeAPI exchange = {
    .header = {{DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION}, NULL},
    .managed_tensor_allocator = allocate,
    .managed_tensor_from_py_object_no_sync = from_python,
    .managed_tensor_to_py_object_no_sync = to_python,
    .dltensor_from_py_object_no_sync = borrow,
    .current_work_stream = work_stream,
};

// Tensor(shape, (code, bits), device_type=2, device=0): new memory.
static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"shape", "dtype", "kind", "device", NULL};
    PyObject *sizes;
    int code, bits, kind = kDLCUDA, device = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!(ii)|ii", names, &PyTuple_Type, &sizes, &code,
                                     &bits, &kind, &device))
        return NULL;
    int64_t shape[8];
    DLTensor prototype = {.device = {(DLDeviceType)kind, device},
                          .ndim = (int32_t)PyTuple_GET_SIZE(sizes),
                          .dtype = {(uint8_t)code, (uint8_t)bits, 1},
                          .shape = shape};
    for (int d = 0; d < prototype.ndim; d++)
        shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
    if (PyErr_Occurred()) return NULL;
    DLManagedTensorVersioned *managed;
    const int64_t kept = fail_after;
    fail_after = -1;
    int status = allocate(&prototype, &managed, NULL, NULL);
    fail_after = kept;
    return status == 0 ? tensor_of(type, managed) : NULL;
}

// view(shape, strides, byte_offset): the same memory.
static PyObject *tensor_view(PyObject *op, PyObject *args)
{
    PyObject *sizes, *steps;
    long long offset;
    if (!PyArg_ParseTuple(args, "O!O!L", &PyTuple_Type, &sizes, &PyTuple_Type, &steps, &offset))
        return NULL;
    int64_t shape[8], strides[8];
    DLTensor like = ((tensor *)op)->managed->dl_tensor;
    like.ndim = (int32_t)PyTuple_GET_SIZE(sizes);
    for (int d = 0; d < like.ndim; d++) {
        shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
        strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(steps, d));
    }
    if (PyErr_Occurred()) return NULL;
    like.shape = shape;
    like.strides = strides;
    like.byte_offset += (uint64_t)offset;
    holder *h = holder_new(&like);
    h->base = Py_NewRef(op);
    return tensor_of(Py_TYPE(op), &h->managed);
}

static void drop_capsule(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return;
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    managed->deleter(managed);
}

static PyObject *tensor_dlpack(PyObject *op, PyObject *args, PyObject *kwargs)
{
    PyObject *asked = kwargs == NULL ? PyDict_New() : PyDict_Copy(kwargs);
    if (PyTuple_GET_SIZE(args) > 0)
        PyDict_SetItemString(asked, "stream", PyTuple_GET_ITEM(args, 0));
    PyList_Append(((tensor *)op)->asked, asked);
    Py_DECREF(asked);
    DLManagedTensorVersioned *managed;
    from_python(op, &managed);
    return PyCapsule_New(managed, "dltensor_versioned", drop_capsule);
}

static PyObject *tensor_dlpack_device(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const DLDevice device = ((tensor *)op)->managed->dl_tensor.device;
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

static PyObject *sizes_of(const int64_t *sizes, int ndim)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int d = 0; d < ndim; d++) PyTuple_SET_ITEM(tuple, d, PyLong_FromLongLong(sizes[d]));
    return tuple;
}

static PyObject *tensor_info(PyObject *op, void *Py_UNUSED(closure))
{
    const DLTensor *t = &((tensor *)op)->managed->dl_tensor;
    return Py_BuildValue("{s:K, s:N, s:N, s:(ii), s:(ii)}", "address",
                         (unsigned long long)((uintptr_t)t->data + t->byte_offset), "shape",
                         sizes_of(t->shape, t->ndim), "strides", sizes_of(t->strides, t->ndim),
                         "dtype", t->dtype.code, t->dtype.bits, "device",
                         (int)t->device.device_type, t->device.device_id);
}

static PyObject *tensor_asked(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(((tensor *)op)->asked);
}

static int tensor_set_readonly(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    uint64_t *flags = &((tensor *)op)->managed->flags;
    *flags = value == Py_True ? DLPACK_FLAG_BITMASK_READ_ONLY : 0;
    return 0;
}

// A copy in a new Tensor: what pickling and copying in a real framework do.
static PyObject *tensor_float(PyObject *Py_UNUSED(op))
{
    PyErr_SetString(PyExc_AssertionError, "the host has read a number from the device");
    return NULL;
}

static PyMethodDef methods[] = {
    {"view", tensor_view, METH_VARARGS, NULL},
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef properties[] = {
    {"info", tensor_info, NULL, NULL, NULL},
    {"asked", tensor_asked, NULL, NULL, NULL},
    {"readonly", NULL, tensor_set_readonly, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot slots[] = {{Py_tp_new, tensor_new},     {Py_tp_dealloc, tensor_dealloc},
                              {Py_tp_methods, methods},    {Py_tp_getset, properties},
                              {Py_nb_float, tensor_float}, {0, NULL}};
static PyType_Spec tensor_spec = {"fake_framework.Tensor", sizeof(tensor), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
static PyType_Spec plain_spec = {"fake_framework.Plain", sizeof(tensor), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

// ---- the module ---------------------------------------------------------------------------------

static PyObject *set_hooks(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long add, forget;
    if (!PyArg_ParseTuple(args, "KK", &add, &forget)) return NULL;
    memcpy(&register_memory, &(uintptr_t){(uintptr_t)add}, sizeof(uintptr_t));
    memcpy(&forget_memory, &(uintptr_t){(uintptr_t)forget}, sizeof(uintptr_t));
    Py_RETURN_NONE;
}

static PyObject *set_stream(PyObject *Py_UNUSED(module), PyObject *args)
{
    long long stream;
    int device = 0;
    if (!PyArg_ParseTuple(args, "L|i", &stream, &device)) return NULL;
    current_stream[device & 3] = (intptr_t)stream;
    Py_RETURN_NONE;
}

static PyObject *knobs(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fail_after", "shift", "stream_fails", NULL};
    long long after = -1;
    int moved = 0, fails = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|Lip", names, &after, &moved, &fails))
        return NULL;
    fail_after = after;
    shift = moved;
    stream_fails = fails;
    Py_RETURN_NONE;
}

static PyObject *counts(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue("(LLL)", live_blocks, live_bytes, allocations);
}

static PyMethodDef functions[] = {
    {"set_hooks", set_hooks, METH_VARARGS, NULL},
    {"set_stream", set_stream, METH_VARARGS, "set_stream(stream, device=0)"},
    {"knobs", (PyCFunction)(void (*)(void))knobs, METH_VARARGS | METH_KEYWORDS, NULL},
    {"counts", counts, METH_NOARGS, "(live blocks, live bytes, allocations so far)"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fake_framework", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_fake_framework(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) return NULL;
    tensor_type = (PyTypeObject *)PyType_FromSpec(&tensor_spec);
    PyObject *plain = PyType_FromSpec(&plain_spec);
    PyObject *capsule = PyCapsule_New(&exchange, "dlpack_exchange_api", NULL);
    if (tensor_type == NULL || plain == NULL || capsule == NULL ||
        PyObject_SetAttrString((PyObject *)tensor_type, "__dlpack_c_exchange_api__", capsule) < 0 ||
        PyModule_AddObjectRef(module, "Tensor", (PyObject *)tensor_type) < 0 ||
        PyModule_AddObjectRef(module, "Plain", plain) < 0)
        return NULL;
    return module;
}
