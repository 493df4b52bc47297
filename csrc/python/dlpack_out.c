// DLPack outwards: arrays of the caller's framework over memory of ours, and capsules.
//
// The managed tensor holds a reference to the Python object that owns the memory; its deleter may
// run on any thread.
#include "python/args.h"
#include "python/device.h"

#include <stdlib.h>

// A managed tensor over memory of ours, with the room for its shape.
typedef struct {
    union {
        DLManagedTensorVersioned versioned;
        DLManagedTensor legacy;
    } managed;
    PyObject *owner; // strong
    int64_t shape[HB_MAX_NDIM], stride[HB_MAX_NDIM];
} export_block;

static void export_free(export_block *block)
{
    if (!Py_IsInitialized()) return; // the interpreter took the owner with it
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(block->owner);
    PyGILState_Release(gil);
    free(block);
}

static void delete_versioned(DLManagedTensorVersioned *managed)
{
    export_free(managed->manager_ctx);
}

static void delete_legacy(DLManagedTensor *managed)
{
    export_free(managed->manager_ctx);
}

static export_block *export_new(PyObject *owner, const hb_device *device, void *data,
                                hb_dtype dtype, int ndim, const int64_t *shape, DLTensor *tensor)
{
    export_block *block = malloc(sizeof *block);
    if (block == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    int64_t stride = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        block->shape[d] = shape[d];
        block->stride[d] = stride;
        stride *= shape[d];
    }
    block->owner = Py_NewRef(owner);
    *tensor = (DLTensor){.data = stride == 0 ? NULL : data, // as the header asks for size zero
                         .device = hb_device_to_dlpack(device),
                         .ndim = ndim,
                         .dtype = hb_dlpack_types[dtype],
                         .shape = block->shape,
                         .strides = block->stride};
    return block;
}

static DLManagedTensorVersioned *export_versioned(PyObject *owner, const hb_device *device,
                                                  void *data, hb_dtype dtype, int ndim,
                                                  const int64_t *shape, uint64_t flags)
{
    DLTensor tensor;
    export_block *block = export_new(owner, device, data, dtype, ndim, shape, &tensor);
    if (block == NULL) return NULL;
    block->managed.versioned =
        (DLManagedTensorVersioned){.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
                                   .manager_ctx = block,
                                   .deleter = delete_versioned,
                                   .flags = flags,
                                   .dl_tensor = tensor};
    return &block->managed.versioned;
}

PyObject *hb_wrap(PyObject *owner, const hb_origin *origin, void *data, hb_dtype dtype, int ndim,
                  const int64_t *shape)
{
    if (origin->api == NULL) {
        if (origin->device.type == HB_CPU) return hb_numpy_wrap(owner, data, dtype, ndim, shape);
        PyErr_Format(PyExc_BufferError,
                     "%s: expected arrays of a framework that can hold its memory on cuda:%d "
                     "(__dlpack_c_exchange_api__), got others; __dlpack__() gives the codes",
                     strrchr(Py_TYPE(owner)->tp_name, '.') + 1, (int)origin->device.index);
        return NULL;
    }
    DLManagedTensorVersioned *managed =
        export_versioned(owner, &origin->device, data, dtype, ndim, shape, 0);
    if (managed == NULL) return NULL;
    return hb_exchange_to_python(origin->api, managed);
}

// Frees a capsule that nobody consumed.
static void drop_versioned(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, HB_CAPSULE_VERSIONED)) return;
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_VERSIONED);
    managed->deleter(managed);
}

static void drop_legacy(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, HB_CAPSULE_LEGACY)) return;
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_LEGACY);
    managed->deleter(managed);
}

// What the keywords of __dlpack__ ask for.
typedef struct {
    bool versioned, copy;
    hb_origin origin; // with the stream that the framework works on now
} export_request;

// The consumer will work on `value`'s stream. What was launched on our framework's current stream
// is in order there; no event of ours could put it in the order of another.
static int check_stream(hb_state *state, const char *function, PyObject *value,
                        const hb_origin *held, export_request *request)
{
    if (held->device.type == HB_CPU) {
        if (!hb_given(value)) return 0;
        PyErr_Format(PyExc_ValueError,
                     "%s: stream, expected None for memory of the processor, got %R", function,
                     value);
        return -1;
    }
    int64_t stream = 1; // None is the legacy default stream
    if (hb_origin_enter(state, function, held, &request->origin) < 0) return -1;
    if (hb_given(value) && hb_arg_int64(function, "stream", value, &stream) < 0) return -1;
    void *const wanted = stream == 1 ? NULL : (void *)(intptr_t)stream;
    if (stream == -1 || (stream != 0 && wanted == request->origin.device.stream)) return 0;
    PyErr_Format(PyExc_BufferError,
                 "%s: stream, expected the stream that the weight's framework works on now (%p; 1 "
                 "is the default stream), or -1 (no order), got %R",
                 function, request->origin.device.stream, hb_given(value) ? value : Py_None);
    return -1;
}

static int check_dl_device(const char *function, PyObject *value, const hb_device *held)
{
    int64_t type = 0, index = 0;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2) {
        PyErr_Format(PyExc_TypeError, "%s: dl_device, expected (type, index), got %R", function,
                     value);
        return -1;
    }
    if (hb_arg_int64(function, "dl_device", PyTuple_GET_ITEM(value, 0), &type) < 0 ||
        hb_arg_int64(function, "dl_device", PyTuple_GET_ITEM(value, 1), &index) < 0)
        return -1;
    const DLDevice own = hb_device_to_dlpack(held);
    if (type == (int64_t)own.device_type && (type == kDLCPU || index == own.device_id)) return 0;
    if (held->type == HB_CPU)
        PyErr_Format(PyExc_BufferError, "%s: dl_device, expected the processor (1, 0), got %R",
                     function, value);
    else
        PyErr_Format(PyExc_BufferError,
                     "%s: dl_device, expected (2, %d), where the memory is, got %R", function,
                     (int)held->index, value);
    return -1;
}

static int read_request(hb_state *state, const char *function, const hb_origin *held,
                        PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames,
                        export_request *request)
{
    const hb_signature signature = {function, 0, 0,
                                    0,        4, {"stream", "max_version", "dl_device", "copy"}};
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return -1;
    request->origin = *held;
    if (check_stream(state, function, value[0], held, request) < 0) return -1;
    request->versioned = false;
    if (hb_given(value[1])) {
        int64_t major = 0;
        if (!PyTuple_Check(value[1]) || PyTuple_GET_SIZE(value[1]) != 2) {
            PyErr_Format(PyExc_TypeError, "%s: max_version, expected (major, minor), got %R",
                         function, value[1]);
            return -1;
        }
        if (hb_arg_int64(function, "max_version", PyTuple_GET_ITEM(value[1], 0), &major) < 0)
            return -1;
        request->versioned = major >= DLPACK_MAJOR_VERSION;
    }
    if (hb_given(value[2]) && check_dl_device(function, value[2], &held->device) < 0) return -1;
    request->copy = false;
    if (hb_given(value[3]) && hb_arg_bool(function, "copy", value[3], &request->copy) < 0)
        return -1;
    if (request->versioned || request->copy) return 0;
    PyErr_Format(PyExc_BufferError,
                 "%s: max_version, expected (1, 0) or newer (the memory is read-only, which older "
                 "capsules cannot say), or copy=True",
                 function);
    return -1;
}

PyObject *hb_bytes_capsule(PyObject *owner, const hb_device *device, void *data, int64_t size)
{
    DLTensor tensor;
    export_block *block = export_new(owner, device, data, HB_U8, 1, &size, &tensor);
    if (block == NULL) return NULL;
    block->managed.legacy =
        (DLManagedTensor){.dl_tensor = tensor, .manager_ctx = block, .deleter = delete_legacy};
    PyObject *capsule = PyCapsule_New(&block->managed.legacy, HB_CAPSULE_LEGACY, drop_legacy);
    if (capsule == NULL) export_free(block);
    return capsule;
}

PyObject *hb_to_dlpack(hb_state *state, const char *function, PyObject *owner,
                       const hb_origin *origin, void *data, hb_dtype dtype, int ndim,
                       const int64_t *shape, PyObject *const *args, Py_ssize_t n_args,
                       PyObject *kwnames)
{
    export_request request;
    if (read_request(state, function, origin, args, n_args, kwnames, &request) < 0) return NULL;
    PyObject *capsule = NULL;
    const hb_device *device = &request.origin.device;
    Py_INCREF(owner);
    if (request.copy) {
        int64_t bytes = (int64_t)hb_dtype_bytes(dtype);
        for (int d = 0; d < ndim; d++) bytes *= shape[d];
        void *copy;
        Py_SETREF(owner, hb_memory_new(function, &request.origin, 1, &bytes, &copy));
        if (owner == NULL) return NULL;
        if (hb_memory_copy(state, function, device, copy, data, bytes) < 0) goto done;
        data = copy;
    }
    if (request.versioned) {
        uint64_t flags =
            request.copy ? DLPACK_FLAG_BITMASK_IS_COPIED : DLPACK_FLAG_BITMASK_READ_ONLY;
        DLManagedTensorVersioned *managed =
            export_versioned(owner, device, data, dtype, ndim, shape, flags);
        if (managed == NULL) goto done;
        capsule = PyCapsule_New(managed, HB_CAPSULE_VERSIONED, drop_versioned);
        if (capsule == NULL) managed->deleter(managed);
    } else {
        DLTensor tensor;
        export_block *block = export_new(owner, device, data, dtype, ndim, shape, &tensor);
        if (block == NULL) goto done;
        block->managed.legacy =
            (DLManagedTensor){.dl_tensor = tensor, .manager_ctx = block, .deleter = delete_legacy};
        capsule = PyCapsule_New(&block->managed.legacy, HB_CAPSULE_LEGACY, drop_legacy);
        if (capsule == NULL) export_free(block);
    }
done:
    Py_DECREF(owner);
    return capsule;
}
