#include "python/object.h"

const char hb_copy_doc[] = "__copy__($self, /)\n--\n\nItself: the object never changes.";
const char hb_deepcopy_doc[] = "__deepcopy__($self, memo, /)\n--\n\nA copy with memory of its own.";
const char hb_reduce_doc[] = "__reduce__($self, /)\n--\n\nFor pickle.";
const char hb_dlpack_device_doc[] =
    "__dlpack_device__($self, /)\n--\n\n(1, 0): the processor; (2, i): cuda:i.";

int hb_object_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self)); // an instance of a heap type owns a reference to its type
    for (int i = 0; i < HB_MAX_OWNERS; i++) Py_VISIT(((hb_object *)self)->owner[i]);
    return 0;
}

void hb_object_dealloc(PyObject *self)
{
    hb_object *object = (hb_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (object->weakrefs != NULL) PyObject_ClearWeakRefs(self);
    for (int i = 0; i < HB_MAX_OWNERS; i++) Py_CLEAR(object->owner[i]);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject *hb_object_copy(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(self);
}

PyObject *hb_object_reduce(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *parts = NULL, *from_parts = NULL, *functools = NULL, *partial = NULL, *first = NULL,
             *bound = NULL, *result = NULL;
    parts = PyObject_CallMethod(self, "parts", NULL);
    if (parts == NULL) goto done;
    from_parts = PyObject_GetAttrString((PyObject *)Py_TYPE(self), "from_parts");
    if (from_parts == NULL) goto done;
    functools = PyImport_ImportModule("functools");
    if (functools == NULL) goto done;
    partial = PyObject_GetAttrString(functools, "partial");
    if (partial == NULL) goto done;
    first = PyTuple_Pack(1, from_parts);
    if (first == NULL) goto done;
    bound = PyObject_Call(partial, first, parts);
    if (bound == NULL) goto done;
    result = Py_BuildValue("O()", bound);
done:
    Py_XDECREF(parts);
    Py_XDECREF(from_parts);
    Py_XDECREF(functools);
    Py_XDECREF(partial);
    Py_XDECREF(first);
    Py_XDECREF(bound);
    return result;
}

PyObject *hb_object_device(PyObject *self, void *Py_UNUSED(closure))
{
    char text[HB_DEVICE_TEXT];
    hb_device_text(&((hb_object *)self)->origin.device, text);
    return PyUnicode_FromString(text);
}

PyObject *hb_object_dlpack_device(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const DLDevice device = hb_device_to_dlpack(&((hb_object *)self)->origin.device);
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

void hb_device_suffix(const hb_device *device, char *text)
{
    char name[HB_DEVICE_TEXT];
    hb_device_text(device, name);
    text[0] = '\0';
    if (device->type != HB_CPU) snprintf(text, HB_DEVICE_SUFFIX, ", device=%s", name);
}

int hb_dict_take(PyObject *dict, const char *key, PyObject *value)
{
    if (value == NULL) return -1;
    int rc = PyDict_SetItemString(dict, key, value);
    Py_DECREF(value);
    return rc;
}

int hb_slice_rows(const char *function, PyObject *slice, int64_t length, int64_t *start,
                  int64_t *stop)
{
    if (!PySlice_Check(slice)) {
        PyErr_Format(PyExc_TypeError, "%s: rows, expected a slice, got %s", function,
                     Py_TYPE(slice)->tp_name);
        return -1;
    }
    Py_ssize_t first, last, step;
    if (PySlice_Unpack(slice, &first, &last, &step) < 0) return -1;
    if (step != 1) {
        PyErr_Format(PyExc_ValueError, "%s: rows, expected a slice of step 1, got step %zd",
                     function, step);
        return -1;
    }
    PySlice_AdjustIndices((Py_ssize_t)length, &first, &last, step);
    *start = first;
    *stop = last < first ? first : last;
    return 0;
}
