// What every type of the module shares: immutable objects over memory that they own or view.
//
// `owner` holds what keeps the memory alive: a capsule over an allocation of ours, a producer's
// array, a capsule that will call a DLPack deleter, or another object of the module. The objects
// never change, so they need no tp_clear: a cycle through one of them always has another member
// that can be cleared (as with tuple), and no method can meet memory that is gone already.
#ifndef HB_PYTHON_OBJECT_H
#define HB_PYTHON_OBJECT_H

#include "python/common.h"

#define HB_MAX_OWNERS 5

typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    PyObject *owner[HB_MAX_OWNERS];
    hb_origin origin; // where the memory lies, and the framework of the arrays of properties
} hb_object;

// A tensor in 4 bits.
typedef struct {
    hb_object base;
    hb_tensor4 tensor; // rows, depth: the first dimension and the product of the others
    hb_dtype dtype;    // of the tensor that was quantized
    int ndim;
    int64_t shape[HB_MAX_NDIM];
} hb_params4;

// A matrix in int8 with a scale per row.
typedef struct {
    hb_object base;
    const int8_t *codes;
    const float *scale;
    int64_t shape[2];
    hb_dtype dtype;
} hb_int8params;

// A tensor in 8-bit blocks with a map.
typedef struct {
    hb_object base;
    const uint8_t *codes;
    const float *absmax;
    const float *map;
    int64_t blocksize, numel;
    hb_dtype dtype;
    int ndim;
    int64_t shape[HB_MAX_NDIM];
} hb_params8;

int hb_object_traverse(PyObject *self, visitproc visit, void *arg);
void hb_object_dealloc(PyObject *self);
extern const char hb_copy_doc[], hb_deepcopy_doc[], hb_reduce_doc[], hb_dlpack_device_doc[];
// obj.__copy__(): itself.
PyObject *hb_object_copy(PyObject *self, PyObject *ignored);
// __reduce__: (functools.partial(type.from_parts, **parts), ()).
PyObject *hb_object_reduce(PyObject *self, PyObject *ignored);
// {"device"}: every type's; "cpu" or "cuda:0".
PyObject *hb_object_device(PyObject *self, void *closure);
PyObject *hb_object_dlpack_device(PyObject *self, PyObject *ignored);

// ", device=cuda:0" for a repr; nothing on the CPU.
enum { HB_DEVICE_SUFFIX = HB_DEVICE_TEXT + 16 };
void hb_device_suffix(const hb_device *device, char *text);
// Adds `value` (its reference is taken, NULL is an error) to `dict`. 0 or -1.
int hb_dict_take(PyObject *dict, const char *key, PyObject *value);
// Rows [*start, *stop) of a slice with step 1 over `length`. 0 or -1 with an exception.
int hb_slice_rows(const char *function, PyObject *slice, int64_t length, int64_t *start,
                  int64_t *stop);

hb_params4 *hb_params4_quantize(hb_state *state, const char *function, const char *name,
                                PyObject *x, PyObject *dtype, hb_format4 format, int64_t blocksize,
                                bool double_quant, hb_scales scales);
PyObject *hb_params4_deepcopy(PyObject *self, PyObject *memo);
hb_int8params *hb_int8params_quantize(hb_state *state, const char *function, const char *name,
                                      PyObject *x, PyObject *dtype);
PyObject *hb_int8params_deepcopy(PyObject *self, PyObject *memo);

// ---- html.c -----------------------------------------------------------------------------------

// One row of a table: a label and a value; value NULL ends the list.
typedef struct {
    const char *label;
    PyObject *value; // owned; released by hb_html_table
} hb_html_row;
// <table> without scripts or styles from outside; text is escaped, whole numbers become
// "1,234,567". NULL when a value was NULL.
PyObject *hb_html_table(const char *title, hb_html_row *rows, int count);
// "7.11x": two decimals and a unit.
PyObject *hb_text_decimal(double number, const char *unit);

#endif
