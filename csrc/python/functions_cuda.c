// cuda_info, and memory of a GPU's that no framework has made: managed memory (paged optimizer
// states), and what lies at an address (callers through ctypes).
#include "python/args.h"
#include "python/device.h"
#include "python/functions.h"

#include "core/cuda_load.h"
#include "core/ops_cuda.h"

PyDoc_STRVAR(
    cuda_info_doc,
    "cuda_info($module, /)\n--\n\n"
    "{\"available\": bool, \"reason\": str | None, \"driver\": str | None, "
    "\"runtime\": str | None, \"devices\": list[dict]}. Opens the CUDA library, no context.");

static PyObject *version_text(int version)
{
    if (version <= 0) Py_RETURN_NONE;
    return PyUnicode_FromFormat("%d.%d", version / 1000, version % 1000 / 10);
}

// A list of {"name", "capability", "multiprocessors", "memory"}; devices that fail are left out.
static PyObject *devices(const hb_cuda_api *api)
{
    PyObject *list = PyList_New(0);
    int count = 0;
    if (list == NULL || api->device_count(&count) != 0) return list;
    for (int i = 0; i < count; i++) {
        hb_cuda_device device;
        if (api->device_get(i, &device) != 0) continue;
        PyObject *entry = Py_BuildValue("{s:s, s:(ii), s:i, s:L}", "name", device.name,
                                        "capability", device.major, device.minor, "multiprocessors",
                                        device.multiprocessors, "memory", (long long)device.memory);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_XDECREF(entry);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(entry);
    }
    return list;
}

static PyObject *cuda_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    const hb_cuda_api *api = NULL;
    hb_error error = {""};
    int driver = 0, runtime = 0;
    bool available = hb_cuda_ready(&api, &error) == HB_OK;
    hb_error unused;
    if (hb_cuda_load(&api, &unused) == HB_OK) {
        runtime = api->runtime_version;
        if (api->driver_version(&driver) != 0) driver = 0;
    }
    PyObject *list = available ? devices(api) : PyList_New(0);
    if (list == NULL) return NULL;
    const char *prefix = "cuda: ";
    size_t skip = strncmp(error.text, prefix, strlen(prefix)) == 0 ? strlen(prefix) : 0;
    return Py_BuildValue("{s:O, s:z, s:N, s:N, s:N}", "available", available ? Py_True : Py_False,
                         "reason", available ? NULL : error.text + skip, "driver",
                         version_text(driver), "runtime", version_text(runtime), "devices", list);
}

// A device number and, from it, the device. 0 or -1.
static int get_device(const char *function, PyObject *value, hb_device *device)
{
    int64_t index = 0;
    if (hb_arg_int64(function, "device", value, &index) < 0) return -1;
    if (index < 0 || index > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: device, expected the number of a GPU, got %lld",
                     function, (long long)index);
        return -1;
    }
    *device = (hb_device){.type = HB_CUDA, .index = (int32_t)index};
    return 0;
}

static int get_size(const char *function, PyObject *value, int64_t *size)
{
    if (hb_arg_int64(function, "size", value, size) < 0) return -1;
    if (*size > 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: size, expected at least 1 byte, got %lld", function,
                 (long long)*size);
    return -1;
}

#define MANAGED_NAME "halfbyte.managed"

static void free_managed(PyObject *capsule)
{
    hb_managed_free(PyCapsule_GetPointer(capsule, MANAGED_NAME));
}

PyDoc_STRVAR(cuda_managed_memory_doc,
             "cuda_managed_memory($module, device, size, /)\n--\n\n"
             "`size` bytes of CUDA managed memory, uint8 on a device, as a DLPack capsule.");

static PyObject *cuda_managed_memory(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                     PyObject *kwnames)
{
    static const hb_signature signature = {"cuda_managed_memory", 2, 2, 2, 2, {"device", "size"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[2];
    hb_device device;
    int64_t size = 0;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        get_device(function, value[0], &device) < 0 || get_size(function, value[1], &size) < 0)
        return NULL;
    void *memory = NULL;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_managed_new(function, device.index, size, &memory, &error));
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        return NULL;
    }
    PyObject *owner = PyCapsule_New(memory, MANAGED_NAME, free_managed);
    if (owner == NULL) {
        hb_managed_free(memory);
        return NULL;
    }
    PyObject *capsule = hb_bytes_capsule(owner, &device, memory, size);
    Py_DECREF(owner);
    return capsule;
}

PyDoc_STRVAR(
    cuda_prefetch_doc,
    "cuda_prefetch($module, array, /)\n--\n\n"
    "Moves the pages of managed memory to the array's device, in the order of its stream.");

static PyObject *cuda_prefetch(PyObject *module, PyObject *object)
{
    static const char function[] = "cuda_prefetch";
    hb_state *state = hb_state_of_module(module);
    hb_array array;
    if (hb_array_get(state, object, function, "array", HB_TAKE_BYTES | HB_TAKE_WRITABLE, &array) <
        0)
        return NULL;
    PyObject *result = NULL;
    if (array.view.device.type != HB_CUDA) {
        PyErr_Format(PyExc_ValueError, "%s: array, expected one on a CUDA device, got one on cpu",
                     function);
        goto done;
    }
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status, hb_managed_prefetch(function, &array.view.device, array.view.data,
                                               hb_view_numel(&array.view), &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = Py_NewRef(Py_None);
done:
    hb_array_release(&array);
    return result;
}

PyDoc_STRVAR(cuda_view_doc,
             "cuda_view($module, address, size, device, /)\n--\n\n"
             "The `size` bytes at an address as a DLPack capsule, uint8 on the device; None where "
             "the address is not of memory that the device reads. Nothing keeps the memory alive.");

static PyObject *cuda_view(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                           PyObject *kwnames)
{
    static const hb_signature signature = {"cuda_view", 3, 3, 3, 3, {"address", "size", "device"}};
    const char *function = signature.function;
    hb_state *state = hb_state_of_module(module);
    PyObject *value[3];
    hb_device device;
    int64_t size = 0;
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0 ||
        get_size(function, value[1], &size) < 0 || get_device(function, value[2], &device) < 0)
        return NULL;
    void *memory = PyLong_AsVoidPtr(value[0]);
    if (memory == NULL) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%s: address, expected that of memory, got 0", function);
        return NULL;
    }
    hb_error error;
    bool readable = false;
    hb_status status = hb_memory_on_cuda(function, &device, memory, &readable, &error);
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        return NULL;
    }
    if (!readable) Py_RETURN_NONE;
    return hb_bytes_capsule(Py_None, &device, memory, size);
}

PyMethodDef hb_functions_cuda[] = {
    {"cuda_info", cuda_info, METH_NOARGS, cuda_info_doc},
    {"cuda_managed_memory", HB_FASTCALL(cuda_managed_memory), cuda_managed_memory_doc},
    {"cuda_prefetch", cuda_prefetch, METH_O, cuda_prefetch_doc},
    {"cuda_view", HB_FASTCALL(cuda_view), cuda_view_doc},
    {NULL, NULL, 0, NULL},
};
