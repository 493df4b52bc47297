// DLPack inwards: the exchange API (1.3) and its allocator, versioned and legacy capsules.
//
// Who owns what: a DLManagedTensor is freed by its deleter, exactly once. A capsule of ours takes
// that duty before the producer's capsule is marked as used, so that no failure can fall between
// the two. For the way out see dlpack_out.c.
#include "python/tensor.h"
#include "core/large_pages.h"
#include "python/args.h"
#include "python/device.h"

#include <stdlib.h>

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
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_VERSIONED_USED);
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
    PyErr_Restore(type, value, traceback);
}

static void free_legacy(PyObject *capsule)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_LEGACY_USED);
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
    array->owner = PyCapsule_New(managed, HB_CAPSULE_VERSIONED_USED, free_versioned);
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
    if (PyCapsule_IsValid(capsule, HB_CAPSULE_VERSIONED)) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_VERSIONED);
        if (managed->version.major != DLPACK_MAJOR_VERSION) {
            PyErr_Format(PyExc_BufferError, "%s: %s, expected DLPack version %d, got %u.%u",
                         function, name, DLPACK_MAJOR_VERSION, managed->version.major,
                         managed->version.minor);
            return -1;
        }
        if (adopt(capsule, managed, HB_CAPSULE_VERSIONED_USED, free_versioned, array) < 0)
            return -1;
        bool readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
        return hb_array_fill(&managed->dl_tensor, readonly, function, name, array);
    }
    if (PyCapsule_IsValid(capsule, HB_CAPSULE_LEGACY)) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, HB_CAPSULE_LEGACY);
        if (adopt(capsule, managed, HB_CAPSULE_LEGACY_USED, free_legacy, array) < 0) return -1;
        return hb_array_fill(&managed->dl_tensor, false, function, name, array);
    }
    const char *label = PyCapsule_GetName(capsule);
    if (label == NULL) PyErr_Clear();
    PyErr_Format(PyExc_BufferError, "%s: %s, expected a fresh DLPack capsule, got one named '%s'%s",
                 function, name, label == NULL ? "" : label,
                 label != NULL && strncmp(label, "used_", 5) == 0 ? " (already consumed)" : "");
    return -1;
}

// A device that cannot be used is refused before the producer does any work for us.
static int ask_device(hb_state *state, PyObject *object, const char *function, const char *name,
                      hb_device *answer)
{
    *answer = (hb_device){.type = HB_CPU};
    PyObject *device = PyObject_CallMethodNoArgs(object, state->str_dlpack_device);
    if (device == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear(); // older producers; the tensor itself says where it is
        return 0;
    }
    int rc = -1;
    int64_t type = 0, index = 0;
    if (!PyTuple_Check(device) || PyTuple_GET_SIZE(device) != 2) {
        PyErr_Format(PyExc_TypeError, "%s: %s.__dlpack_device__(), expected (type, index), got %R",
                     function, name, device);
        goto done;
    }
    if (hb_arg_int64(function, name, PyTuple_GET_ITEM(device, 0), &type) < 0 ||
        hb_arg_int64(function, name, PyTuple_GET_ITEM(device, 1), &index) < 0)
        goto done;
    const DLDevice place = {(DLDeviceType)type, (int32_t)index};
    rc = hb_device_from_dlpack(place, function, name, answer);
    if (rc == 0 && answer->type == HB_CUDA)
        rc = hb_device_open(state, function, name, answer->index);
done:
    Py_DECREF(device);
    return rc;
}

// object.__dlpack__(max_version=..., stream=...); without max_version where it does not know that.
static PyObject *call_dlpack(hb_state *state, PyObject *method, bool cuda)
{
    PyObject *values[2] = {state->dlpack_max_version, state->dlpack_stream};
    PyObject *capsule = PyObject_Vectorcall(
        method, values, 0, cuda ? state->dlpack_kwnames_gpu : state->dlpack_kwnames);
    if (capsule != NULL || !PyErr_ExceptionMatches(PyExc_TypeError)) return capsule;
    PyErr_Clear(); // before DLPack 1.0
    if (!cuda) return PyObject_CallNoArgs(method);
    return PyObject_CallFunction(method, "O", state->dlpack_stream);
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
    hb_device device;
    if (ask_device(state, object, function, name, &device) < 0) goto done;
    capsule = call_dlpack(state, method, device.type == HB_CUDA);
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

// ---- new memory of the framework's --------------------------------------------------------------

const DLDataType hb_dlpack_types[HB_DTYPE_COUNT] = {
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

PyObject *hb_exchange_to_python(const DLPackExchangeAPI *api, DLManagedTensorVersioned *managed)
{
    void *object = NULL;
    if (api->managed_tensor_to_py_object_no_sync(managed, &object) == 0) return object;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "the tensor's framework failed without an exception");
    return NULL;
}

DLDevice hb_device_to_dlpack(const hb_device *device)
{
    if (device->type == HB_CUDA) return (DLDevice){kDLCUDA, device->index};
    return (DLDevice){kDLCPU, 0};
}

DLManagedTensorVersioned *hb_exchange_allocate(const hb_origin *origin, hb_dtype dtype, int ndim,
                                               const int64_t *shape)
{
    int64_t sizes[HB_MAX_NDIM];
    for (int d = 0; d < ndim; d++) sizes[d] = shape[d];
    DLTensor prototype = {.device = hb_device_to_dlpack(&origin->device),
                          .ndim = ndim,
                          .dtype = hb_dlpack_types[dtype],
                          .shape = sizes};
    DLManagedTensorVersioned *managed = NULL;
    if (origin->api->managed_tensor_allocator(&prototype, &managed, NULL, set_allocation_error) ==
        0)
        return managed;
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return NULL;
}

PyObject *hb_exchange_new(const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                          void **data)
{
    DLManagedTensorVersioned *managed = hb_exchange_allocate(origin, dtype, ndim, shape);
    if (managed == NULL) return NULL;
    *data = (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
    if (origin->device.type == HB_CPU) {                // NumPy does the same by itself
        int64_t bytes = (int64_t)hb_dtype_bytes(dtype); // the allocator has found the product small
        for (int d = 0; d < ndim; d++) bytes *= shape[d];
        hb_advise_large_pages(*data, bytes);
    }
    return hb_exchange_to_python(origin->api, managed);
}

PyObject *hb_exchange_memory(const hb_origin *origin, int64_t bytes, char **memory)
{
    DLManagedTensorVersioned *managed = hb_exchange_allocate(origin, HB_U8, 1, &bytes);
    if (managed == NULL) return NULL;
    PyObject *owner = PyCapsule_New(managed, HB_CAPSULE_VERSIONED_USED, free_versioned);
    if (owner == NULL) {
        if (managed->deleter != NULL) managed->deleter(managed);
        return NULL;
    }
    *memory = (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
    return owner;
}
