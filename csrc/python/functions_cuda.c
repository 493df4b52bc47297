// cuda_info.
#include "python/functions.h"

#include "core/cuda_load.h"

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

PyMethodDef hb_functions_cuda[] = {
    {"cuda_info", cuda_info, METH_NOARGS, cuda_info_doc},
    {NULL, NULL, 0, NULL},
};
