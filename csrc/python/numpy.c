// The only file that knows NumPy's C-API. Built against NumPy 2 headers, runs with 1.24 and newer.
#include "python/tensor.h"

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION    NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

int hb_numpy_import(void)
{
    return PyArray_ImportNumPyAPI();
}

const char *hb_numpy_target(void)
{
    return "1.24";
}

bool hb_numpy_check_exact(PyObject *object)
{
    return PyArray_CheckExact(object);
}

bool hb_numpy_check(PyObject *object)
{
    return PyArray_Check(object);
}

// ml_dtypes registers its types with kind 'V'; only the scalar type's name tells them.
static bool is_bfloat16(const PyArray_Descr *descr)
{
    const char *name = strrchr(descr->typeobj->tp_name, '.');
    name = name == NULL ? descr->typeobj->tp_name : name + 1;
    return PyTypeNum_ISUSERDEF(descr->type_num) && strcmp(name, "bfloat16") == 0;
}

static DLDataType type_of(PyArrayObject *array)
{
    const PyArray_Descr *descr = PyArray_DESCR(array);
    npy_intp bytes = PyArray_ITEMSIZE(array);
    uint8_t bits = bytes <= 16 ? (uint8_t)(bytes * 8) : 0;
    switch (bits == 0 ? 'V' : descr->kind) {
    case 'f': return (DLDataType){kDLFloat, bits, 1};
    case 'i': return (DLDataType){kDLInt, bits, 1};
    case 'u': return (DLDataType){kDLUInt, bits, 1};
    case 'b': return (DLDataType){kDLBool, 8, 1};
    case 'c': return (DLDataType){kDLComplex, bits, 1};
    default: break;
    }
    if (is_bfloat16(descr)) return (DLDataType){kDLBfloat, 16, 1};
    return (DLDataType){kDLOpaqueHandle, 8, bytes <= UINT16_MAX ? (uint16_t)bytes : 0};
}

// Byte order, alignment and strides as the core wants them? Strides must be whole elements.
static bool is_plain(PyArrayObject *array)
{
    if (!PyArray_ISALIGNED(array) || PyArray_ISBYTESWAPPED(array)) return false;
    npy_intp bytes = PyArray_ITEMSIZE(array);
    for (int d = 0; d < PyArray_NDIM(array); d++)
        if (bytes == 0 || PyArray_STRIDE(array, d) % bytes != 0) return false;
    return true;
}

int hb_numpy_get(PyObject *object, const char *function, const char *name, unsigned take,
                 hb_array *array)
{
    PyArrayObject *source = (PyArrayObject *)object;
    if (PyArray_NDIM(source) > HB_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %s, expected at most %d dimensions, got %d", function,
                     name, HB_MAX_NDIM, PyArray_NDIM(source));
        return -1;
    }
    if (PyDataType_REFCHK(PyArray_DESCR(source))) {
        PyErr_Format(PyExc_TypeError, "%s: %s, expected numbers, got dtype %S", function, name,
                     PyArray_DESCR(source));
        return -1;
    }
    bool readonly = !PyArray_ISWRITEABLE(source);
    if (!is_plain(source)) {
        if (take & HB_TAKE_WRITABLE) {
            PyErr_Format(PyExc_BufferError,
                         "%s: %s, expected an aligned array in native byte order, got another",
                         function, name);
            return -1;
        }
        PyArray_Descr *native = PyArray_DescrNewByteorder(PyArray_DESCR(source), NPY_NATIVE);
        if (native == NULL) return -1;
        array->owner = PyArray_FromArray(source, native, // takes the reference to `native`
                                         NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY);
        if (array->owner == NULL) return -1;
        source = (PyArrayObject *)array->owner;
    } else if (take & HB_TAKE_KEEP) {
        array->owner = Py_NewRef(object);
    }
    int64_t shape[HB_MAX_NDIM], stride[HB_MAX_NDIM];
    const npy_intp bytes = PyArray_ITEMSIZE(source);
    for (int d = 0; d < PyArray_NDIM(source); d++) {
        shape[d] = PyArray_DIM(source, d);
        stride[d] = PyArray_STRIDE(source, d) / bytes;
    }
    DLTensor tensor = {.data = PyArray_DATA(source),
                       .device = {kDLCPU, 0},
                       .ndim = PyArray_NDIM(source),
                       .dtype = type_of(source),
                       .shape = shape,
                       .strides = stride};
    return hb_array_fill(&tensor, readonly, function, name, array);
}

// bfloat16 exists in NumPy where ml_dtypes has been imported; otherwise its bits go as uint16.
static PyArray_Descr *descr_of(hb_dtype dtype)
{
    static const int type_num[HB_DTYPE_COUNT] = {
        [HB_F32] = NPY_FLOAT32, [HB_BF16] = NPY_UINT16, [HB_F16] = NPY_FLOAT16,
        [HB_F64] = NPY_FLOAT64, [HB_U8] = NPY_UINT8,    [HB_I8] = NPY_INT8,
        [HB_I32] = NPY_INT32,   [HB_I64] = NPY_INT64,   [HB_BOOL] = NPY_BOOL};
    PyArray_Descr *descr = NULL;
    if (dtype == HB_BF16) {
        PyObject *name = PyUnicode_FromString("ml_dtypes");
        PyObject *module = name == NULL ? NULL : PyImport_GetModule(name);
        Py_XDECREF(name);
        if (module != NULL) {
            PyObject *scalar = PyObject_GetAttrString(module, "bfloat16");
            Py_DECREF(module);
            if (scalar == NULL) return NULL;
            int converted = PyArray_DescrConverter(scalar, &descr);
            Py_DECREF(scalar);
            return converted == NPY_SUCCEED ? descr : NULL;
        }
        if (PyErr_Occurred()) return NULL;
    }
    return PyArray_DescrFromType(type_num[dtype]);
}

PyObject *hb_numpy_new(hb_dtype dtype, int ndim, const int64_t *shape, void **data)
{
    npy_intp sizes[HB_MAX_NDIM];
    for (int d = 0; d < ndim; d++) sizes[d] = (npy_intp)shape[d];
    PyArray_Descr *descr = descr_of(dtype);
    if (descr == NULL) return NULL;
    PyObject *object = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, sizes, NULL, NULL, 0, NULL);
    if (object != NULL) *data = PyArray_DATA((PyArrayObject *)object);
    return object;
}

PyObject *hb_numpy_wrap(PyObject *owner, void *data, hb_dtype dtype, int ndim, const int64_t *shape)
{
    static const char nothing[8]; // an address for arrays without elements
    npy_intp sizes[HB_MAX_NDIM];
    for (int d = 0; d < ndim; d++) sizes[d] = (npy_intp)shape[d];
    PyArray_Descr *descr = descr_of(dtype);
    if (descr == NULL) return NULL;
    void *address = data == NULL ? (void *)(uintptr_t)nothing : data;
    PyObject *object = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, sizes, NULL, address,
                                            NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED, NULL);
    if (object == NULL) return NULL;
    if (PyArray_SetBaseObject((PyArrayObject *)object, Py_NewRef(owner)) < 0) Py_CLEAR(object);
    return object;
}
