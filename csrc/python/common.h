// Inputs and outputs that several functions and types share.
#ifndef HB_PYTHON_COMMON_H
#define HB_PYTHON_COMMON_H

#include "python/args.h"
#include "python/device.h"

// TypeError unless a call by position has `expected` arguments.
int hb_args_count(const char *function, Py_ssize_t n_args, Py_ssize_t expected);
// The first n arguments, arrays called names[i], of a dtype of x. On failure those before it are
// set: release all.
int hb_arrays_get(hb_state *state, const char *function, PyObject *const *args, int n,
                  const char *const *names, hb_array *arrays);
// The dtype of a result: `dtype` if given, else that of `out` if given, else `otherwise`.
int hb_result_dtype(hb_state *state, const char *function, PyObject *dtype, PyObject *out,
                    hb_dtype otherwise, hb_dtype *result);
// The input of a quantizer: float32, bfloat16 or float16; uint16 holds bfloat16 when `dtype` says
// so.
int hb_quantizer_input(hb_state *state, const char *function, const char *name, PyObject *x,
                       PyObject *dtype, hb_array *array);
// `shape` must be what the array has.
int hb_check_shape(const char *function, PyObject *shape, const hb_array *array);
// A bias: [rows], float32, bfloat16 or float16, on the weight's device.
int hb_bias_get(hb_state *state, PyObject *object, const char *function, int64_t rows,
                const hb_device *device, unsigned take, hb_array *array);
// A 256-entry map for origin's kernels: a name, or float32 [256] on the CPU or origin's device.
// *map lives as long as `array` and the module. `name`: of the argument.
int hb_map8_get(hb_state *state, PyObject *object, const char *function, const char *name,
                unsigned take, const hb_origin *origin, hb_array *array, const float **map);
// One of the module's maps for origin's kernels; on CUDA a copy that array->owner keeps.
int hb_map8_known(hb_state *state, const char *function, hb_map8 which, const hb_origin *origin,
                  hb_array *array, const float **map);
// A flat result of `numel` elements: `out` when given (any shape; uint8: any dtype of as many
// bytes), otherwise new with `shape`.
PyObject *hb_output_flat(hb_state *state, PyObject *out, const char *function, const char *name,
                         const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                         hb_array *array);
// Block sizes of the 8-bit codes: 1 and up.
int hb_arg_blocksize8(const char *function, const char *name, PyObject *value, int64_t *result);
// 4-bit codes: the powers of two from 32 to 4096.
int hb_arg_blocksize4(const char *function, const char *name, PyObject *value, int64_t *result);
// The shape of a result of a layer, [..., to], for an input [..., from]; checks the input.
int hb_layer_shape(const char *function, const char *name, const hb_view *input, int64_t rows,
                   int64_t depth, bool backward, int64_t *shape);

#endif
