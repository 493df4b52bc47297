#include "python/device.h"

#include "core/cuda_load.h"
#include "core/ops_cuda.h"

#include <stdlib.h>

void hb_device_text(const hb_device *device, char *text)
{
    if (device->type == HB_CUDA)
        snprintf(text, HB_DEVICE_TEXT, "cuda:%d", (int)device->index);
    else
        snprintf(text, HB_DEVICE_TEXT, "cpu");
}

// ---- devices and streams ------------------------------------------------------------------------

int hb_device_open(hb_state *state, const char *function, const char *name, int index)
{
    const hb_cuda_api *api;
    hb_error error;
    if (hb_cuda_ready(&api, &error) == HB_OK) return 0;
    const char *prefix = "cuda: ";
    size_t skip = strncmp(error.text, prefix, strlen(prefix)) == 0 ? strlen(prefix) : 0;
    PyErr_Format(state->cuda_error, "%s: %s is on cuda:%d, which cannot be used: %s", function,
                 name, index, error.text + skip);
    return -1;
}

// The framework's current stream on `device` into device->stream.
static int ask_stream(const char *function, const DLPackExchangeAPI *api, hb_device *device)
{
    device->stream = NULL; // __dlpack__ was asked for the legacy default stream
    if (api == NULL || api->current_work_stream == NULL) return 0;
    if (api->current_work_stream(kDLCUDA, device->index, &device->stream) == 0) return 0;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_RuntimeError,
                     "%s: the framework of cuda:%d failed to say its current stream", function,
                     (int)device->index);
    return -1;
}

int hb_device_enter(hb_state *state, const char *function, const char *name, hb_array *array)
{
    hb_device *device = &array->view.device;
    if (hb_device_open(state, function, name, device->index) < 0) return -1;
    return ask_stream(function, array->api, device);
}

int hb_origin_enter(hb_state *state, const char *function, const hb_origin *held, hb_origin *now)
{
    *now = *held;
    if (held->device.type == HB_CPU) return 0;
    if (hb_device_open(state, function, "weight", held->device.index) < 0) return -1;
    return ask_stream(function, held->api, &now->device);
}

int hb_raise_device(const char *function, const char *name, const hb_array *array,
                    const hb_device *expected)
{
    const hb_device *got = &array->view.device;
    char want[HB_DEVICE_TEXT], have[HB_DEVICE_TEXT];
    const bool anywhere = array->managed && expected->type == HB_CUDA; // every device reads it
    if (anywhere || hb_device_is_same(*got, *expected)) {
        if (got->stream == expected->stream || expected->stream == HB_ANY_STREAM) return 0;
        PyErr_Format(PyExc_ValueError,
                     "%s: %s, expected an array whose framework works on the stream of the others "
                     "(%p), got one on %p",
                     function, name, expected->stream, got->stream);
        return -1;
    }
    hb_device_text(expected, want);
    hb_device_text(got, have);
    PyErr_Format(PyExc_ValueError, "%s: %s, expected an array on %s as the others, got one on %s",
                 function, name, want, have);
    return -1;
}

// ---- memory -------------------------------------------------------------------------------------

// Sum of the sizes rounded up to `alignment`; offset[i] is where part i begins. -1: too much.
static int64_t lay_out(int count, const int64_t *bytes, int64_t alignment, int64_t *offset)
{
    int64_t total = 0;
    for (int i = 0; i < count; i++) {
        offset[i] = total;
        if (bytes[i] > PTRDIFF_MAX - 4 * alignment ||
            __builtin_add_overflow(total, (bytes[i] + alignment - 1) / alignment * alignment,
                                   &total) ||
            total > PTRDIFF_MAX - 4 * alignment)
            return -1;
    }
    return total;
}

// `bytes` from the framework of `origin`, aligned to 256.
static PyObject *framework_memory(const char *function, const hb_origin *origin, int64_t bytes,
                                  char **memory)
{
    if (origin->api == NULL) {
        PyErr_Format(PyExc_BufferError,
                     "%s: this call needs %lld bytes on cuda:%d, expected arrays of a framework "
                     "that can give them (__dlpack_c_exchange_api__), got others",
                     function, (long long)bytes, (int)origin->device.index);
        return NULL;
    }
    PyObject *owner = hb_exchange_memory(origin, bytes, memory);
    if (owner == NULL || (uintptr_t)*memory % 256 == 0) return owner;
    Py_DECREF(owner);
    owner = hb_exchange_memory(origin, bytes + 255, memory);
    if (owner != NULL) *memory += -(uintptr_t)*memory % 256;
    return owner;
}

PyObject *hb_memory_new(const char *function, const hb_origin *origin, int count,
                        const int64_t *bytes, void **part)
{
    const bool cuda = origin->device.type == HB_CUDA;
    const int64_t alignment = cuda ? 256 : 64;
    int64_t offset[8], total = lay_out(count, bytes, alignment, offset);
    if (total < 0) return PyErr_NoMemory();
    if (total == 0) total = alignment;
    char *memory = NULL;
    PyObject *owner = NULL;
    if (cuda) {
        owner = framework_memory(function, origin, total, &memory);
    } else {
        void *allocated = NULL;
        if (posix_memalign(&allocated, (size_t)alignment, (size_t)total) != 0)
            return PyErr_NoMemory();
        memory = allocated;
        owner = hb_memory_owner(allocated);
    }
    if (owner == NULL) return NULL;
    for (int i = 0; i < count; i++) part[i] = memory + offset[i];
    return owner;
}

int hb_memory_copy(hb_state *state, const char *function, const hb_device *device, void *target,
                   const void *source, int64_t bytes)
{
    if (bytes == 0) return 0;
    if (device->type == HB_CPU) {
        memcpy(target, source, (size_t)bytes);
        return 0;
    }
    hb_view from = {.data = (void *)(uintptr_t)source,
                    .dtype = HB_U8,
                    .device = *device,
                    .ndim = 1,
                    .shape = {bytes},
                    .stride = {1}};
    hb_view to = from;
    to.data = target;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_copy_cuda(function, &from, &to, &error));
    if (status != HB_OK) hb_raise(state, status, &error);
    return status == HB_OK ? 0 : -1;
}

int hb_workspace_new(const char *function, const hb_origin *origin, int64_t bytes, PyObject **owner,
                     void **workspace)
{
    *owner = NULL;
    *workspace = NULL;
    if (bytes <= 0) return 0;
    *owner = hb_memory_new(function, origin, 1, &bytes, workspace);
    return *owner == NULL ? -1 : 0;
}

// ---- copies of strided arrays -------------------------------------------------------------------

// The same elements in row-major order at `data`.
static hb_view contiguous_at(const hb_view *view, void *data)
{
    hb_view dense = *view;
    dense.data = data;
    hb_contiguous_strides(dense.ndim, dense.shape, dense.stride);
    return dense;
}

static PyObject *dense_memory(const char *function, const hb_array *array, void **data)
{
    const hb_view *view = &array->view;
    const hb_origin origin = hb_origin_of(array);
    const int64_t bytes = hb_view_numel(view) * (int64_t)hb_dtype_bytes(view->dtype);
    return hb_memory_new(function, &origin, 1, &bytes, data);
}

// Memory that is not aligned to its elements is copied byte by byte, as one more dimension.
static hb_status copy_any(const char *function, const hb_view *source, const hb_view *target,
                          hb_error *error)
{
    const int64_t item = (int64_t)hb_dtype_bytes(source->dtype);
    if ((uintptr_t)source->data % (uintptr_t)item == 0)
        return hb_copy_cuda(function, source, target, error);
    HB_CHECK(error, source->ndim < HB_MAX_NDIM, HB_ERR_BUFFER,
             "%s: misaligned memory on CUDA, expected at most %d dimensions, got %d", function,
             HB_MAX_NDIM - 1, source->ndim);
    hb_view from = *source, to = *target;
    for (int d = 0; d < source->ndim; d++) {
        from.stride[d] *= item;
        to.stride[d] *= item;
    }
    from.shape[from.ndim] = to.shape[to.ndim] = item;
    from.stride[from.ndim++] = to.stride[to.ndim++] = 1;
    from.dtype = to.dtype = HB_U8;
    return hb_copy_cuda(function, &from, &to, error);
}

int hb_device_own(hb_state *state, const char *function, hb_array *array)
{
    void *data;
    PyObject *owner = dense_memory(function, array, &data);
    if (owner == NULL) return -1;
    const hb_view dense = contiguous_at(&array->view, data);
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, copy_any(function, &array->view, &dense, &error));
    if (status != HB_OK) {
        Py_DECREF(owner);
        hb_raise(state, status, &error);
        return -1;
    }
    array->view = dense;
    Py_XSETREF(array->owner, owner);
    return 0;
}

int hb_stage_strided(const char *function, hb_array *out, hb_view *target)
{
    if (hb_view_is_contiguous(&out->view)) return 0;
    void *data;
    PyObject *memory = dense_memory(function, out, &data);
    if (memory == NULL) return -1;
    PyObject *both = PyTuple_Pack(2, memory, out->owner == NULL ? Py_None : out->owner);
    Py_DECREF(memory);
    if (both == NULL) return -1;
    Py_XSETREF(out->owner, both);
    *target = out->view;
    out->view = contiguous_at(target, data);
    return 1;
}

int hb_stage_end(hb_state *state, const char *function, const hb_array *out, const hb_view *target)
{
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_copy_cuda(function, &out->view, target, &error));
    if (status == HB_OK) return 0;
    hb_raise(state, status, &error);
    return -1;
}

// ---- tables -------------------------------------------------------------------------------------

int hb_table_move(hb_state *state, const char *function, const char *name, const hb_origin *origin,
                  hb_array *array)
{
    const hb_view *view = &array->view;
    if (view->device.type == HB_CUDA || origin->device.type == HB_CPU)
        return hb_check_device(function, name, array, &origin->device);
    const int64_t numel = hb_view_numel(view), bytes = numel * (int64_t)sizeof(float);
    void *data;
    PyObject *owner = hb_memory_new(function, origin, 1, &bytes, &data);
    if (owner == NULL) return -1;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_upload_cuda(function, &origin->device, view->data, (int)numel, data, &error));
    if (status != HB_OK) {
        Py_DECREF(owner);
        hb_raise(state, status, &error);
        return -1;
    }
    array->view.data = data;
    array->view.device = origin->device;
    Py_XSETREF(array->owner, owner);
    return 0;
}
