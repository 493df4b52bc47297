// Arguments of Python calls: a parser for METH_FASTCALL | METH_KEYWORDS, and conversions that name
// function, argument, expected and got when they fail. None allocates on success.
#ifndef HB_PYTHON_ARGS_H
#define HB_PYTHON_ARGS_H

#include "python/state.h"

#define HB_MAX_ARGS 16

// A signature: `names` in order; the first `positional_only` cannot be keywords, those from
// `positional` on can be nothing else; the first `required` must be given.
typedef struct {
    const char *function;
    int positional_only, positional, required, count;
    const char *names[HB_MAX_ARGS];
} hb_signature;

// Fills values[0..count-1] with borrowed references, NULL where not given. 0, or -1 with TypeError.
int hb_parse_args(const hb_signature *signature, PyObject *const *args, Py_ssize_t n_args,
                  PyObject *kwnames, PyObject **values);
// The same for tp_new and other cold callables that get a tuple and a dict.
int hb_parse_tuple(const hb_signature *signature, PyObject *args, PyObject *kwargs,
                   PyObject **values);

static inline bool hb_given(PyObject *value)
{
    return value != NULL && value != Py_None;
}

// Each leaves *result alone when `value` is NULL (not given). 0, or -1 with an exception set.
int hb_arg_int64(const char *function, const char *name, PyObject *value, int64_t *result);
int hb_arg_double(const char *function, const char *name, PyObject *value, double *result);
int hb_arg_float(const char *function, const char *name, PyObject *value, float *result);
int hb_arg_bool(const char *function, const char *name, PyObject *value, bool *result);
// "nf4" | "fp4".
int hb_arg_format4(const char *function, const char *name, PyObject *value, hb_format4 *result);
// One of `choices` (NULL-terminated); *result is its index.
int hb_arg_choice(const char *function, const char *name, PyObject *value,
                  const char *const *choices, int *result);
// "float32", torch.float32, numpy.float32, numpy.dtype("float32"): float32, bfloat16 or float16.
// None counts as not given.
int hb_arg_dtype(const char *function, const char *name, PyObject *value, hb_dtype *result);
// A sequence of at most HB_MAX_NDIM sizes whose product fits into int64.
int hb_arg_shape(const char *function, const char *name, PyObject *value, int *ndim, int64_t *shape,
                 int64_t *numel);

extern const char *const hb_scales_names[];     // "absmax", "search": hb_scales
extern const char *const hb_compute_names[];    // of hb_compute
extern const char *const hb_activation_names[]; // of hb_activation
extern const char *const hb_mode_names[];       // "dynamic", "exact": hb_int8_mode

// "(2, 3)" into text.
void hb_shape_text(const int64_t *shape, int ndim, char *text, size_t size);
PyObject *hb_shape_tuple(const int64_t *shape, int ndim);

#endif
