// The memory of 8-bit tensors: row-wise int8 (one scale a row) and block-wise codes with a map.
#ifndef HB_PYTHON_WEIGHTS8_H
#define HB_PYTHON_WEIGHTS8_H

#include "python/device.h"

// Row-wise int8: codes [..., depth], scale [rows], rows the product of the leading dimensions.
typedef struct {
    hb_array codes, scale;
    int64_t rows, depth;
} hb_rows8;

// Block-wise codes; the shape is the caller's.
typedef struct {
    const uint8_t *codes;
    const float *absmax;
    const float *map; // [256]
    int64_t blocksize;
} hb_tensor8;

// take: HB_TAKE_KEEP or 0. On failure nothing is held.
int hb_rows8_get(hb_state *state, const char *function, PyObject *codes, PyObject *scale,
                 unsigned take, hb_rows8 *rows);
void hb_rows8_release(hb_rows8 *rows);
// codes must be [rows, depth].
int hb_rows8_check_matrix(const char *function, const hb_rows8 *rows);
// A finite threshold >= 0.
int hb_arg_threshold(const char *function, PyObject *value, float *result);

// Results go to `out` or a new array of origin's framework; the memory given is of its device.
PyObject *hb_dequantize_rows8_run(hb_state *state, const char *function, const int8_t *codes,
                                  const float *scale, hb_dtype dtype, const hb_origin *origin,
                                  int ndim, const int64_t *shape, PyObject *out);
PyObject *hb_dequantize8_run(hb_state *state, const char *function, const hb_tensor8 *tensor,
                             hb_dtype dtype, const hb_origin *origin, int ndim,
                             const int64_t *shape, PyObject *out);

// y = x W^T + b, or dx = dy W (backward).
typedef struct {
    const char *function, *input_name;
    bool backward;
    hb_int8_mode mode;
    float threshold;
    const hb_view *bias; // forward only; may be NULL
    hb_device device;    // of the weight
} hb_linear8_call;
PyObject *hb_linear8_run(hb_state *state, const hb_linear8_call *call, const int8_t *codes,
                         const float *scale, int64_t rows, int64_t depth, PyObject *input,
                         PyObject *out);

#endif
