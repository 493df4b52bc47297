// From "anything that carries a tensor" to a checked hb_view, and results back.
#include "python/tensor.h"
#include "python/args.h"
#include "python/device.h"

#include <stdlib.h>

#define MEMORY_NAME "halfbyte.memory"

// ---- names for messages -------------------------------------------------------------------------

void hb_dltype_name(DLDataType type, char *text, size_t size)
{
    const char *kind = "opaque";
    switch (type.code) {
    case kDLInt: kind = "int"; break;
    case kDLUInt: kind = "uint"; break;
    case kDLFloat: kind = "float"; break;
    case kDLBfloat: kind = "bfloat"; break;
    case kDLComplex: kind = "complex"; break;
    case kDLBool: snprintf(text, size, "bool"); return;
    default: break;
    }
    if (type.lanes == 1)
        snprintf(text, size, "%s%d", kind, type.bits);
    else
        snprintf(text, size, "%s%dx%d", kind, type.bits, type.lanes);
}

// "float32, bfloat16 or float16" for the dtype bits of `take`.
static void accepted_names(unsigned take, char *text, size_t size)
{
    const char *names[HB_DTYPE_COUNT + 1];
    int count = 0;
    for (int dtype = 0; dtype < HB_DTYPE_COUNT; dtype++)
        if (take & (1u << dtype)) names[count++] = hb_dtype_name((hb_dtype)dtype);
    if (take & HB_TAKE_U16_AS_BF16) names[count++] = "uint16 (as bfloat16)";
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < count && used < size; i++) {
        const char *joint = i == 0 ? "" : i + 1 == count ? " or " : ", ";
        used += (size_t)snprintf(text + used, size - used, "%s%s", joint, names[i]);
    }
}

static const char *device_name(DLDeviceType type)
{
    switch (type) {
    case kDLCUDA: return "cuda";
    case kDLCUDAManaged: return "cuda (managed)";
    case kDLROCM: return "rocm";
    case kDLMetal: return "metal";
    case kDLOneAPI: return "xpu";
    default: return NULL;
    }
}

int hb_device_from_dlpack(DLDevice device, const char *function, const char *name,
                          hb_device *result)
{
    const int type = (int)device.device_type;
    *result = (hb_device){.type = HB_CPU};
    if (type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost) return 0;
    if (type == kDLCUDA || type == kDLCUDAManaged) {
        *result = (hb_device){.type = HB_CUDA, .index = device.device_id};
        if (device.device_id >= 0) return 0;
    }
    const char *text = device_name((DLDeviceType)type);
    if (text == NULL)
        PyErr_Format(PyExc_BufferError,
                     "%s: %s, expected memory of the processor (cpu) or of a CUDA device, got "
                     "DLPack device type %d",
                     function, name, type);
    else
        PyErr_Format(PyExc_BufferError,
                     "%s: %s, expected memory of the processor (cpu) or of a CUDA device, got "
                     "%s:%d",
                     function, name, text, device.device_id);
    return -1;
}

// ---- memory ------------------------------------------------------------------------------------

static void free_memory(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, MEMORY_NAME));
}

PyObject *hb_memory_owner(void *memory)
{
    PyObject *capsule = PyCapsule_New(memory, MEMORY_NAME, free_memory);
    if (capsule == NULL) free(memory);
    return capsule;
}

void hb_array_release(hb_array *array)
{
    Py_CLEAR(array->owner);
}

// ---- a producer's tensor -> hb_array
// --------------------------------------------------------------

// HB_DTYPE_COUNT stands for a dtype that the core has no name for.
static hb_dtype dtype_of(DLDataType type)
{
    if (type.lanes != 1) return HB_DTYPE_COUNT;
    switch (type.code << 8 | type.bits) {
    case kDLFloat << 8 | 32: return HB_F32;
    case kDLBfloat << 8 | 16: return HB_BF16;
    case kDLFloat << 8 | 16: return HB_F16;
    case kDLFloat << 8 | 64: return HB_F64;
    case kDLUInt << 8 | 8: return HB_U8;
    case kDLInt << 8 | 8: return HB_I8;
    case kDLInt << 8 | 32: return HB_I32;
    case kDLInt << 8 | 64: return HB_I64;
    case kDLBool << 8 | 8: return HB_BOOL;
    default: return HB_DTYPE_COUNT;
    }
}

static int64_t item_bytes(DLDataType type)
{
    return ((int64_t)type.bits * type.lanes + 7) / 8;
}

int hb_array_fill(const DLTensor *tensor, bool readonly, const char *function, const char *name,
                  hb_array *array)
{
    hb_view *view = &array->view;
    if (hb_device_from_dlpack(tensor->device, function, name, &view->device) < 0) return -1;
    array->managed = tensor->device.device_type == kDLCUDAManaged;
    if (tensor->ndim < 0 || tensor->ndim > HB_MAX_NDIM ||
        (tensor->ndim > 0 && tensor->shape == NULL)) {
        PyErr_Format(PyExc_ValueError, "%s: %s, expected 0 to %d dimensions, got %d", function,
                     name, HB_MAX_NDIM, (int)tensor->ndim);
        return -1;
    }
    array->type = tensor->dtype;
    view->dtype = dtype_of(tensor->dtype);
    view->ndim = tensor->ndim;
    view->readonly = readonly;

    // Junk from a producer must not become an address: sizes, their product and the span of bytes
    // all have to fit. The first and last element are `low` and `high` elements from data.
    int64_t numel = 1, low = 0, high = 0, bytes = item_bytes(tensor->dtype), span = 0;
    bool bad = bytes == 0;
    for (int d = view->ndim - 1; d >= 0; d--) {
        view->shape[d] = tensor->shape[d];
        view->stride[d] = tensor->strides != NULL ? tensor->strides[d] : numel;
        bad =
            bad || tensor->shape[d] < 0 || __builtin_mul_overflow(numel, tensor->shape[d], &numel);
        if (bad) break;
        int64_t reach = 0;
        if (tensor->shape[d] > 1)
            bad = __builtin_mul_overflow(tensor->shape[d] - 1, view->stride[d], &reach) ||
                  __builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high);
    }
    if (bad || (numel > 0 && (__builtin_sub_overflow(high, low, &span) ||
                              __builtin_mul_overflow(span, bytes, &span) ||
                              __builtin_mul_overflow(numel, bytes, &span)))) {
        PyErr_Format(PyExc_ValueError,
                     "%s: %s, expected sizes and strides that fit into 64 bits, got others",
                     function, name);
        return -1;
    }
    view->data = numel == 0 ? NULL : (char *)tensor->data + tensor->byte_offset;
    if (numel > 0 && tensor->data == NULL) {
        PyErr_Format(PyExc_BufferError, "%s: %s, expected a tensor with memory, got a null pointer",
                     function, name);
        return -1;
    }
    return 0;
}

// ---- checks and copies after the view is known
// ----------------------------------------------------

static int check_dtype(const char *function, const char *name, unsigned take, hb_array *array)
{
    hb_view *view = &array->view;
    if (view->dtype < HB_DTYPE_COUNT && (take & (1u << view->dtype))) return 0;
    DLDataType type = array->type;
    if ((take & HB_TAKE_U16_AS_BF16) && type.code == kDLUInt && type.bits == 16 &&
        type.lanes == 1) {
        view->dtype = HB_BF16;
        return 0;
    }
    if (take & HB_TAKE_BYTES) { // move elements of the same size, whatever they mean
        static const hb_dtype of_size[9] = {[1] = HB_U8, [2] = HB_F16, [4] = HB_F32, [8] = HB_F64};
        int64_t bytes = item_bytes(type);
        if (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8) {
            view->dtype = of_size[bytes];
            return 0;
        }
    }
    char expected[120], got[32];
    hb_dltype_name(type, got, sizeof got);
    accepted_names(take, expected, sizeof expected);
    PyErr_Format(PyExc_TypeError, "%s: %s, expected dtype %s, got %s", function, name,
                 take & HB_TAKE_BYTES ? "of 1, 2, 4 or 8 bytes" : expected, got);
    return -1;
}

// True when no two elements can share an address: sorted by stride, each dimension steps over the
// whole of the smaller ones. Sufficient; exotic strides that interleave are refused as well.
static bool elements_are_distinct(const hb_view *view)
{
    int64_t stride[HB_MAX_NDIM], size[HB_MAX_NDIM], extent = 1;
    int count = 0;
    for (int d = 0; d < view->ndim; d++) {
        if (view->shape[d] == 0) return true;
        if (view->shape[d] == 1) continue;
        int64_t step = view->stride[d] < 0 ? -view->stride[d] : view->stride[d];
        int at = count++;
        for (; at > 0 && stride[at - 1] > step; at--) {
            stride[at] = stride[at - 1];
            size[at] = size[at - 1];
        }
        stride[at] = step;
        size[at] = view->shape[d];
    }
    for (int i = 0; i < count; i++) {
        if (stride[i] < extent) return false;
        extent += (size[i] - 1) * stride[i];
    }
    return true;
}

static int check_writable(const char *function, const char *name, unsigned take, bool aligned,
                          const hb_view *view)
{
    const char *problem = NULL;
    if (view->readonly)
        problem = "read-only memory";
    else if (!aligned)
        problem = "misaligned memory";
    else if ((take & (HB_TAKE_FLAT | HB_TAKE_BYTES)) && !hb_view_is_contiguous(view))
        problem = "a strided view (expected contiguous)";
    if (problem != NULL) {
        PyErr_Format(PyExc_BufferError, "%s: %s, expected writable memory, got %s", function, name,
                     problem);
        return -1;
    }
    if (!elements_are_distinct(view)) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: %s, expected an output whose elements do not overlap, got strides that do",
            function, name);
        return -1;
    }
    return 0;
}

int hb_array_own(hb_state *state, const char *function, hb_array *array)
{
    hb_view *view = &array->view;
    if (view->device.type == HB_CUDA) return hb_device_own(state, function, array);
    size_t bytes = (size_t)hb_view_numel(view) * hb_dtype_bytes(view->dtype);
    void *memory = malloc(bytes == 0 ? 1 : bytes);
    if (memory == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    hb_view_gather(view, memory);
    PyObject *owner = hb_memory_owner(memory);
    if (owner == NULL) return -1;
    Py_XSETREF(array->owner, owner);
    view->data = memory;
    hb_contiguous_strides(view->ndim, view->shape, view->stride);
    return 0;
}

static int finish(hb_state *state, const char *function, const char *name, unsigned take,
                  hb_array *array)
{
    hb_view *view = &array->view;
    const bool cuda = view->device.type == HB_CUDA;
    if (cuda && hb_device_enter(state, function, name, array) < 0) return -1;
    if (check_dtype(function, name, take, array) < 0) return -1;
    bool aligned = (uintptr_t)view->data % hb_dtype_bytes(view->dtype) == 0;
    bool flat = take & (HB_TAKE_FLAT | HB_TAKE_BYTES);
    if (take & HB_TAKE_BYTES) aligned = true; // bytes have no alignment
    if (take & HB_TAKE_WRITABLE) {
        if (check_writable(function, name, take, aligned, view) < 0) return -1;
    } else if (!aligned || ((flat || cuda) && !hb_view_is_contiguous(view))) {
        if (hb_array_own(state, function, array) < 0) return -1;
    }
    if (take & HB_TAKE_BYTES) {
        view->shape[0] = hb_view_numel(view) * (int64_t)hb_dtype_bytes(view->dtype);
        view->stride[0] = 1;
        view->ndim = 1;
        view->dtype = HB_U8;
    }
    return 0;
}

// ---- the buffer protocol
// --------------------------------------------------------------------------

static DLDataType buffer_type(const Py_buffer *buffer)
{
    const char *format = buffer->format == NULL ? "B" : buffer->format;
    if (*format == '@' || *format == '=' || *format == '<') format++;
    uint8_t bits = (uint8_t)(buffer->itemsize * 8);
    DLDataType type = {kDLOpaqueHandle, 8, (uint16_t)buffer->itemsize};
    if (format[0] == '\0' || format[1] != '\0' || buffer->itemsize > 16) return type;
    if (strchr("efd", *format) != NULL)
        type = (DLDataType){kDLFloat, bits, 1};
    else if (strchr("bhilqn", *format) != NULL)
        type = (DLDataType){kDLInt, bits, 1};
    else if (strchr("BHILQNc", *format) != NULL)
        type = (DLDataType){kDLUInt, bits, 1};
    else if (*format == '?')
        type = (DLDataType){kDLBool, bits, 1};
    return type;
}

static int buffer_get(PyObject *object, const char *function, const char *name, hb_array *array)
{
    array->owner = PyMemoryView_FromObject(object);
    if (array->owner == NULL) return -1;
    const Py_buffer *buffer = PyMemoryView_GET_BUFFER(array->owner);
    if (buffer->ndim > HB_MAX_NDIM || buffer->suboffsets != NULL) {
        PyErr_Format(PyExc_BufferError,
                     "%s: %s, expected at most %d dimensions without suboffsets, got %d%s",
                     function, name, HB_MAX_NDIM, buffer->ndim,
                     buffer->suboffsets ? " with suboffsets" : "");
        return -1;
    }
    int64_t shape[HB_MAX_NDIM], stride[HB_MAX_NDIM];
    for (int d = 0; d < buffer->ndim; d++) {
        shape[d] = buffer->shape[d];
        stride[d] = buffer->itemsize == 0 ? 0 : buffer->strides[d] / buffer->itemsize;
        if (buffer->itemsize == 0 || buffer->strides[d] % buffer->itemsize != 0) {
            PyErr_Format(PyExc_BufferError,
                         "%s: %s, expected strides of whole elements, got %zd bytes for %zd",
                         function, name, buffer->strides[d], buffer->itemsize);
            return -1;
        }
    }
    DLTensor tensor = {.data = buffer->buf,
                       .device = {kDLCPU, 0},
                       .ndim = buffer->ndim,
                       .dtype = buffer_type(buffer),
                       .shape = shape,
                       .strides = stride};
    return hb_array_fill(&tensor, buffer->readonly, function, name, array);
}

// ---- entry points
// ---------------------------------------------------------------------------------

static int find_producer(hb_state *state, PyObject *object, const char *function, const char *name,
                         unsigned take, hb_array *array)
{
    if (hb_numpy_check_exact(object)) return hb_numpy_get(object, function, name, take, array);
    hb_exchange_entry entry;
    int exchange = hb_exchange_find(state, Py_TYPE(object), &entry);
    if (exchange < 0) return -1;
    if (exchange > 0) return hb_exchange_get(state, &entry, object, function, name, take, array);
    if (hb_numpy_check(object)) return hb_numpy_get(object, function, name, take, array);
    int found = hb_dlpack_get(state, object, function, name, array);
    if (found != 0) return found < 0 ? -1 : 0;
    if (PyObject_CheckBuffer(object)) return buffer_get(object, function, name, array);
    PyErr_Format(PyExc_TypeError,
                 "%s: %s, expected an array (torch, numpy, __dlpack__ or buffer protocol), got %s",
                 function, name, Py_TYPE(object)->tp_name);
    return -1;
}

int hb_array_get(hb_state *state, PyObject *object, const char *function, const char *name,
                 unsigned take, hb_array *array)
{
    array->owner = NULL;
    array->api = NULL;
    if (find_producer(state, object, function, name, take, array) == 0 &&
        finish(state, function, name, take, array) == 0)
        return 0;
    hb_array_release(array);
    return -1;
}

static int check_output(const char *function, const char *name, hb_dtype dtype, int ndim,
                        const int64_t *shape, const hb_view *view)
{
    bool same = view->ndim == ndim;
    for (int d = 0; same && d < ndim; d++) same = view->shape[d] == shape[d];
    if (same && view->dtype == dtype) return 0;
    char expected[120], got[120];
    hb_shape_text(shape, ndim, expected, sizeof expected);
    hb_shape_text(view->shape, view->ndim, got, sizeof got);
    if (same)
        PyErr_Format(PyExc_TypeError, "%s: %s, expected dtype %s, got %s", function, name,
                     hb_dtype_name(dtype), hb_dtype_name(view->dtype));
    else
        PyErr_Format(PyExc_ValueError, "%s: %s, expected shape %s, got %s", function, name,
                     expected, got);
    return -1;
}

PyObject *hb_output(hb_state *state, PyObject *out, const char *function, const char *name,
                    const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                    unsigned take, hb_array *array)
{
    array->owner = NULL;
    if (hb_given(out)) {
        take |= HB_TAKE_WRITABLE | 1u << dtype;
        if (hb_array_get(state, out, function, name, take, array) < 0) return NULL;
        if (check_output(function, name, dtype, ndim, shape, &array->view) < 0 ||
            hb_check_device(function, name, array, &origin->device) < 0) {
            hb_array_release(array);
            return NULL;
        }
        return Py_NewRef(out);
    }
    hb_view *view = &array->view;
    *view = (hb_view){.dtype = dtype, .device = origin->device, .ndim = ndim};
    array->api = origin->api;
    array->managed = false;
    int64_t stride = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        view->shape[d] = shape[d];
        view->stride[d] = stride;
        if (__builtin_mul_overflow(stride, shape[d], &stride)) {
            PyErr_Format(PyExc_ValueError, "%s: %s, expected a size of 64 bits, got more", function,
                         name);
            return NULL;
        }
    }
    if (origin->api != NULL) return hb_exchange_new(origin, dtype, ndim, shape, &view->data);
    if (origin->device.type == HB_CPU) return hb_numpy_new(dtype, ndim, shape, &view->data);
    PyErr_Format(PyExc_BufferError,
                 "%s: %s, expected an output array on cuda:%d (the input's framework offers no "
                 "allocator: it has no __dlpack_c_exchange_api__), got none",
                 function, name, (int)origin->device.index);
    return NULL;
}

// The bytes [*low, *high) that the view can touch.
static void byte_range(const hb_view *view, uintptr_t *low, uintptr_t *high)
{
    int64_t first = 0, last = 0;
    for (int d = 0; d < view->ndim; d++) {
        int64_t reach = (view->shape[d] - 1) * view->stride[d];
        if (view->shape[d] == 0) {
            *low = *high = 0;
            return;
        }
        if (reach < 0)
            first += reach;
        else
            last += reach;
    }
    int64_t bytes = (int64_t)hb_dtype_bytes(view->dtype);
    *low = (uintptr_t)((char *)view->data + first * bytes);
    *high = (uintptr_t)((char *)view->data + (last + 1) * bytes);
}

int hb_check_overlap_bytes(const char *function, const char *out_name, const hb_array *out,
                           const char *in_name, const void *data, int64_t size)
{
    uintptr_t low, high, in_low = (uintptr_t)data, in_high = in_low + (uintptr_t)size;
    byte_range(&out->view, &low, &high);
    if (size == 0 || high <= in_low || in_high <= low || low == high) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s, expected memory apart from %s, got memory they share",
                 function, out_name, in_name);
    return -1;
}

int hb_check_overlap(const char *function, const char *out_name, const hb_array *out,
                     const char *in_name, const hb_array *in)
{
    uintptr_t low, high;
    byte_range(&in->view, &low, &high);
    return hb_check_overlap_bytes(function, out_name, out, in_name, (const void *)low,
                                  (int64_t)(high - low));
}

int hb_check_numel(const char *function, const char *name, const hb_array *array, int64_t expected)
{
    int64_t numel = hb_view_numel(&array->view);
    if (numel == expected) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s, expected %lld elements, got %lld", function, name,
                 (long long)expected, (long long)numel);
    return -1;
}
