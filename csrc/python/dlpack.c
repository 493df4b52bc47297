// DLPack both ways: the exchange API (1.3), versioned and legacy capsules in, capsules and tensors
// out.
//
// Who owns what: a DLManagedTensor is freed by its deleter, exactly once. Coming in, a capsule of
// ours takes that duty before the producer's capsule is marked as used, so that no failure can fall
// between the two. Going out, the managed tensor holds a reference to the Python object that owns
// the memory; its deleter may run on any thread.
#include "python/tensor.h"
#include "python/args.h"

#include <stdlib.h>

#define CAPSULE_VERSIONED      "dltensor_versioned"
#define CAPSULE_VERSIONED_USED "used_dltensor_versioned"
#define CAPSULE_LEGACY         "dltensor"
#define CAPSULE_LEGACY_USED    "used_dltensor"

// ---- the exchange table of a type ---------------------------------------------------------------

static const DLPackExchangeAPI *look_up(hb_state *state, PyTypeObject *type, bool *failed)
{
    PyObject *capsule = PyObject_GetAttr((PyObject *)type, state->str_exchange_api);
    if (capsule == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Clear();
        else
            *failed = true;
        return NULL;
    }
    const DLPackExchangeAPIHeader *header = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule); // the table outlives the capsule by contract
    while (header != NULL && header->version.major != DLPACK_MAJOR_VERSION)
        header = header->prev_api;
    return (const DLPackExchangeAPI *)header;
}

static void remember(hb_state *state, const hb_exchange_entry *found)
{
    hb_exchange_entry *entry = malloc(sizeof *entry);
    if (entry == NULL) return; // the next call looks it up again
    *entry = *found;
    Py_INCREF((PyObject *)entry->type);
    for (int i = 0; i < HB_EXCHANGE_SLOTS; i++) {
        hb_exchange_entry *expected = NULL;
        if (atomic_compare_exchange_strong(&state->exchange[i], &expected, entry)) return;
        if (expected->type == entry->type) break; // another thread was first
    }
    Py_DECREF((PyObject *)entry->type);
    free(entry);
}

int hb_exchange_find(hb_state *state, PyTypeObject *type, hb_exchange_entry *entry)
{
    for (int i = 0; i < HB_EXCHANGE_SLOTS; i++) {
        const hb_exchange_entry *known =
            atomic_load_explicit(&state->exchange[i], memory_order_acquire);
        if (known == NULL) break;
        if (known->type != type) continue;
        *entry = *known;
        return 1;
    }
    bool failed = false;
    *entry = (hb_exchange_entry){.type = type, .api = look_up(state, type, &failed)};
    if (failed) return -1;
    if (entry->api == NULL) return 0;
    PyObject *method = PyObject_GetAttr((PyObject *)type, state->str_is_neg);
    if (method == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    if (method == NULL) PyErr_Clear();
    entry->lazy_negation = method != NULL;
    Py_XDECREF(method);
    remember(state, entry);
    return 1;
}

int hb_exchange_traverse(hb_state *state, visitproc visit, void *arg)
{
    for (int i = 0; i < HB_EXCHANGE_SLOTS; i++) {
        hb_exchange_entry *entry = atomic_load(&state->exchange[i]);
        if (entry != NULL) Py_VISIT(entry->type);
    }
    return 0;
}

void hb_exchange_clear(hb_state *state)
{
    for (int i = 0; i < HB_EXCHANGE_SLOTS; i++) {
        hb_exchange_entry *entry = atomic_exchange(&state->exchange[i], NULL);
        if (entry == NULL) continue;
        Py_DECREF((PyObject *)entry->type);
        free(entry);
    }
}

// ---- in -----------------------------------------------------------------------------------------

// A framework's RuntimeError (no storage, sparse layout, ...) becomes a BufferError that names the
// argument and keeps the first line: torch appends its C++ stack. Other exceptions pass.
static void name_producer_error(const char *function, const char *name)
{
    if (!PyErr_Occurred()) // a broken producer
        PyErr_SetString(PyExc_RuntimeError, "its producer failed without an exception");
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return;
    PyObject *type, *exception, *traceback;
    PyErr_Fetch(&type, &exception, &traceback);
    PyErr_NormalizeException(&type, &exception, &traceback);
    PyObject *text = exception == NULL ? NULL : PyObject_Str(exception);
    const char *utf8 = text == NULL ? NULL : PyUnicode_AsUTF8(text);
    if (utf8 == NULL) PyErr_Clear();
    char line[200] = "";
    if (utf8 != NULL) snprintf(line, sizeof line, "%.*s", (int)strcspn(utf8, "\n"), utf8);
    PyErr_Format(PyExc_BufferError, "%s: %s, expected a dense tensor with memory, got: %s",
                 function, name, line);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(exception);
    Py_XDECREF(traceback);
}

// A deleter may be Python code, and this may run while an exception is on its way.
static void free_versioned(PyObject *capsule)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, CAPSULE_VERSIONED_USED);
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
    PyErr_Restore(type, value, traceback);
}

static void free_legacy(PyObject *capsule)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, CAPSULE_LEGACY_USED);
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
    PyErr_Restore(type, value, traceback);
}

static int exchange_view(const DLPackExchangeAPI *api, PyObject *object, const char *function,
                         const char *name, unsigned take, hb_array *array)
{
    if (!(take & HB_TAKE_KEEP) && api->dltensor_from_py_object_no_sync != NULL) {
        DLTensor tensor;
        if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
            name_producer_error(function, name);
            return -1;
        }
        return hb_array_fill(&tensor, false, function, name, array);
    }
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(object, &managed) != 0) {
        name_producer_error(function, name);
        return -1;
    }
    array->owner = PyCapsule_New(managed, CAPSULE_VERSIONED_USED, free_versioned);
    if (array->owner == NULL) {
        if (managed->deleter != NULL) managed->deleter(managed);
        return -1;
    }
    bool readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    return hb_array_fill(&managed->dl_tensor, readonly, function, name, array);
}

// Replaces the view of a tensor with a pending negation by one of a tensor that has it carried out.
static int resolve_negation(hb_state *state, const DLPackExchangeAPI *api, PyObject *object,
                            const char *function, const char *name, unsigned take, hb_array *array)
{
    if (take & HB_TAKE_WRITABLE) {
        PyErr_Format(PyExc_BufferError,
                     "%s: %s, expected writable memory, got a negated view (is_neg)", function,
                     name);
        return -1;
    }
    PyObject *resolved = PyObject_CallMethodNoArgs(object, state->str_resolve_neg);
    if (resolved == NULL) return -1;
    hb_array_release(array);
    int rc = exchange_view(api, resolved, function, name, take, array);
    if (array->owner == NULL)
        array->owner = resolved; // a borrowed view lives as long as its tensor
    else
        Py_DECREF(resolved); // the managed tensor holds it
    return rc;
}

// torch has views whose numbers are the negatives of what is stored (x.is_neg(): the imaginary part
// of a conjugate), and its exchange table says nothing of it. Arguments that take float dtypes are
// asked; the bytes and scales that a quantizer made are not, a call costs 0.05 us.
int hb_exchange_get(hb_state *state, const hb_exchange_entry *entry, PyObject *object,
                    const char *function, const char *name, unsigned take, hb_array *array)
{
    array->api = entry->api;
    if (exchange_view(entry->api, object, function, name, take, array) < 0) return -1;
    if (!entry->lazy_negation || (take & HB_TAKE_IO) != HB_TAKE_IO) return 0;
    PyObject *answer = PyObject_CallMethodNoArgs(object, state->str_is_neg);
    if (answer == NULL) return -1;
    int negated = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (negated <= 0) return negated;
    return resolve_negation(state, entry->api, object, function, name, take, array);
}

// Takes the duty to delete from `capsule` to array->owner.
static int adopt(PyObject *capsule, void *managed, const char *used_name,
                 PyCapsule_Destructor free_managed, hb_array *array)
{
    PyObject *owner = PyCapsule_New(managed, used_name, NULL); // no duty yet
    if (owner == NULL) return -1;
    if (PyCapsule_SetName(capsule, used_name) < 0) {
        Py_DECREF(owner);
        return -1;
    }
    PyCapsule_SetDestructor(owner, free_managed); // cannot fail on a valid capsule
    array->owner = owner;
    return 0;
}

static int consume(PyObject *capsule, const char *function, const char *name, hb_array *array)
{
    if (PyCapsule_IsValid(capsule, CAPSULE_VERSIONED)) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, CAPSULE_VERSIONED);
        if (managed->version.major != DLPACK_MAJOR_VERSION) {
            PyErr_Format(PyExc_BufferError, "%s: %s, expected DLPack version %d, got %u.%u",
                         function, name, DLPACK_MAJOR_VERSION, managed->version.major,
                         managed->version.minor);
            return -1;
        }
        if (adopt(capsule, managed, CAPSULE_VERSIONED_USED, free_versioned, array) < 0) return -1;
        bool readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
        return hb_array_fill(&managed->dl_tensor, readonly, function, name, array);
    }
    if (PyCapsule_IsValid(capsule, CAPSULE_LEGACY)) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, CAPSULE_LEGACY);
        if (adopt(capsule, managed, CAPSULE_LEGACY_USED, free_legacy, array) < 0) return -1;
        return hb_array_fill(&managed->dl_tensor, false, function, name, array);
    }
    const char *label = PyCapsule_GetName(capsule);
    if (label == NULL) PyErr_Clear();
    PyErr_Format(PyExc_BufferError, "%s: %s, expected a fresh DLPack capsule, got one named '%s'%s",
                 function, name, label == NULL ? "" : label,
                 label != NULL && strncmp(label, "used_", 5) == 0 ? " (already consumed)" : "");
    return -1;
}

// A device that the processor cannot read is refused before the producer does any work for us.
static int check_device(hb_state *state, PyObject *object, const char *function, const char *name)
{
    PyObject *device = PyObject_CallMethodNoArgs(object, state->str_dlpack_device);
    if (device == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear(); // older producers; the tensor itself says where it is
        return 0;
    }
    int rc = -1;
    DLTensor probe = {.ndim = 0, .dtype = {kDLFloat, 32, 1}};
    int64_t type = 0, index = 0;
    if (!PyTuple_Check(device) || PyTuple_GET_SIZE(device) != 2) {
        PyErr_Format(PyExc_TypeError, "%s: %s.__dlpack_device__(), expected (type, index), got %R",
                     function, name, device);
        goto done;
    }
    if (hb_arg_int64(function, name, PyTuple_GET_ITEM(device, 0), &type) < 0 ||
        hb_arg_int64(function, name, PyTuple_GET_ITEM(device, 1), &index) < 0)
        goto done;
    probe.device.device_type = (DLDeviceType)type;
    probe.device.device_id = (int32_t)index;
    rc = hb_check_device(&probe, function, name);
done:
    Py_DECREF(device);
    return rc;
}

int hb_dlpack_get(hb_state *state, PyObject *object, const char *function, const char *name,
                  hb_array *array)
{
    if (PyCapsule_CheckExact(object)) return consume(object, function, name, array) < 0 ? -1 : 1;

    PyObject *method = PyObject_GetAttr(object, state->str_dlpack);
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    int rc = -1;
    PyObject *capsule = NULL;
    if (PyType_Check(object)) { // an array class instead of an array
        rc = 0;
        goto done;
    }
    if (check_device(state, object, function, name) < 0) goto done;
    capsule = PyObject_Vectorcall(method, &state->dlpack_max_version, 0, state->dlpack_kwnames);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); // before DLPack 1.0
        capsule = PyObject_CallNoArgs(method);
    }
    if (capsule == NULL) {
        name_producer_error(function, name);
        goto done;
    }
    if (!PyCapsule_CheckExact(capsule)) {
        PyErr_Format(PyExc_TypeError, "%s: %s.__dlpack__(), expected a capsule, got %s", function,
                     name, Py_TYPE(capsule)->tp_name);
        goto done;
    }
    if (consume(capsule, function, name, array) == 0) rc = 1;
done:
    Py_XDECREF(capsule);
    Py_DECREF(method);
    return rc;
}

// ---- out ----------------------------------------------------------------------------------------

static const DLDataType dlpack_types[HB_DTYPE_COUNT] = {
    [HB_F32] = {kDLFloat, 32, 1}, [HB_BF16] = {kDLBfloat, 16, 1}, [HB_F16] = {kDLFloat, 16, 1},
    [HB_F64] = {kDLFloat, 64, 1}, [HB_U8] = {kDLUInt, 8, 1},      [HB_I8] = {kDLInt, 8, 1},
    [HB_I32] = {kDLInt, 32, 1},   [HB_I64] = {kDLInt, 64, 1},     [HB_BOOL] = {kDLBool, 8, 1},
};

static void set_allocation_error(void *context, const char *kind, const char *message)
{
    (void)context;
    PyObject *type = PyExc_RuntimeError;
    if (kind != NULL && strcmp(kind, "MemoryError") == 0) type = PyExc_MemoryError;
    if (kind != NULL && strcmp(kind, "ValueError") == 0) type = PyExc_ValueError;
    if (kind != NULL && strcmp(kind, "TypeError") == 0) type = PyExc_TypeError;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyErr_SetString(type, message == NULL ? "allocation failed" : message);
    PyGILState_Release(gil);
}

// Takes `managed`.
static PyObject *to_python(const DLPackExchangeAPI *api, DLManagedTensorVersioned *managed)
{
    void *object = NULL;
    if (api->managed_tensor_to_py_object_no_sync(managed, &object) == 0) return object;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "the tensor's framework failed without an exception");
    return NULL;
}

PyObject *hb_exchange_new(const DLPackExchangeAPI *api, hb_dtype dtype, int ndim,
                          const int64_t *shape, void **data)
{
    int64_t sizes[HB_MAX_NDIM];
    for (int d = 0; d < ndim; d++) sizes[d] = shape[d];
    DLTensor prototype = {
        .device = {kDLCPU, 0}, .ndim = ndim, .dtype = dlpack_types[dtype], .shape = sizes};
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_allocator(&prototype, &managed, NULL, set_allocation_error) != 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return NULL;
    }
    *data = (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
    return to_python(api, managed);
}

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

static export_block *export_new(PyObject *owner, void *data, hb_dtype dtype, int ndim,
                                const int64_t *shape, DLTensor *tensor)
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
                         .device = {kDLCPU, 0},
                         .ndim = ndim,
                         .dtype = dlpack_types[dtype],
                         .shape = block->shape,
                         .strides = block->stride};
    return block;
}

static DLManagedTensorVersioned *export_versioned(PyObject *owner, void *data, hb_dtype dtype,
                                                  int ndim, const int64_t *shape, uint64_t flags)
{
    DLTensor tensor;
    export_block *block = export_new(owner, data, dtype, ndim, shape, &tensor);
    if (block == NULL) return NULL;
    block->managed.versioned =
        (DLManagedTensorVersioned){.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
                                   .manager_ctx = block,
                                   .deleter = delete_versioned,
                                   .flags = flags,
                                   .dl_tensor = tensor};
    return &block->managed.versioned;
}

PyObject *hb_wrap(PyObject *owner, const DLPackExchangeAPI *api, void *data, hb_dtype dtype,
                  int ndim, const int64_t *shape)
{
    if (api == NULL) return hb_numpy_wrap(owner, data, dtype, ndim, shape);
    DLManagedTensorVersioned *managed = export_versioned(owner, data, dtype, ndim, shape, 0);
    if (managed == NULL) return NULL;
    return to_python(api, managed);
}

// Frees a capsule that nobody consumed.
static void drop_versioned(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, CAPSULE_VERSIONED)) return;
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, CAPSULE_VERSIONED);
    managed->deleter(managed);
}

static void drop_legacy(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, CAPSULE_LEGACY)) return;
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, CAPSULE_LEGACY);
    managed->deleter(managed);
}

// What the keywords of __dlpack__ ask for.
typedef struct {
    bool versioned, copy;
} export_request;

static int read_request(const char *function, PyObject *const *args, Py_ssize_t n_args,
                        PyObject *kwnames, export_request *request)
{
    const hb_signature signature = {function, 0, 0,
                                    0,        4, {"stream", "max_version", "dl_device", "copy"}};
    PyObject *value[4];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return -1;
    if (hb_given(value[0])) {
        PyErr_Format(PyExc_ValueError,
                     "%s: stream, expected None for memory of the processor, got %R", function,
                     value[0]);
        return -1;
    }
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
    if (hb_given(value[2])) {
        int64_t type = 0;
        if (!PyTuple_Check(value[2]) || PyTuple_GET_SIZE(value[2]) != 2) {
            PyErr_Format(PyExc_TypeError, "%s: dl_device, expected (type, index), got %R", function,
                         value[2]);
            return -1;
        }
        if (hb_arg_int64(function, "dl_device", PyTuple_GET_ITEM(value[2], 0), &type) < 0)
            return -1;
        if (type != kDLCPU) {
            PyErr_Format(PyExc_BufferError, "%s: dl_device, expected the processor (1, 0), got %R",
                         function, value[2]);
            return -1;
        }
    }
    request->copy = false;
    if (hb_given(value[3]) && hb_arg_bool(function, "copy", value[3], &request->copy) < 0)
        return -1;
    return 0;
}

PyObject *hb_to_dlpack(const char *function, PyObject *owner, void *data, hb_dtype dtype, int ndim,
                       const int64_t *shape, PyObject *const *args, Py_ssize_t n_args,
                       PyObject *kwnames)
{
    export_request request;
    if (read_request(function, args, n_args, kwnames, &request) < 0) return NULL;
    if (!request.versioned && !request.copy) {
        PyErr_Format(PyExc_BufferError,
                     "%s: max_version, expected (1, 0) or newer (the memory is read-only, which "
                     "older capsules cannot say), or copy=True",
                     function);
        return NULL;
    }
    PyObject *capsule = NULL;
    Py_INCREF(owner);
    if (request.copy) {
        int64_t numel = 1;
        for (int d = 0; d < ndim; d++) numel *= shape[d];
        size_t bytes = (size_t)numel * hb_dtype_bytes(dtype);
        void *copy = malloc(bytes == 0 ? 1 : bytes);
        if (copy == NULL)
            PyErr_NoMemory();
        else if (bytes > 0)
            memcpy(copy, data, bytes);
        Py_SETREF(owner, copy == NULL ? NULL : hb_memory_owner(copy));
        if (owner == NULL) return NULL;
        data = copy;
    }
    if (request.versioned) {
        uint64_t flags =
            request.copy ? DLPACK_FLAG_BITMASK_IS_COPIED : DLPACK_FLAG_BITMASK_READ_ONLY;
        DLManagedTensorVersioned *managed =
            export_versioned(owner, data, dtype, ndim, shape, flags);
        if (managed == NULL) goto done;
        capsule = PyCapsule_New(managed, CAPSULE_VERSIONED, drop_versioned);
        if (capsule == NULL) managed->deleter(managed);
    } else {
        DLTensor tensor;
        export_block *block = export_new(owner, data, dtype, ndim, shape, &tensor);
        if (block == NULL) goto done;
        block->managed.legacy =
            (DLManagedTensor){.dl_tensor = tensor, .manager_ctx = block, .deleter = delete_legacy};
        capsule = PyCapsule_New(&block->managed.legacy, CAPSULE_LEGACY, drop_legacy);
        if (capsule == NULL) export_free(block);
    }
done:
    Py_DECREF(owner);
    return capsule;
}
