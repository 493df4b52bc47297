// The memory of a 4-bit tensor, as the arguments of a call or the parts of an object give it.
#ifndef HB_PYTHON_WEIGHTS4_H
#define HB_PYTHON_WEIGHTS4_H

#include "python/args.h"
#include "python/device.h"

// The Python arguments; NULL where not given.
typedef struct {
    PyObject *packed, *absmax, *quant_type, *blocksize;
    PyObject *nested_absmax, *nested_map, *nested_offset, *nested_blocksize;
} hb_weights4_args;

// `tensor` points into the arrays; numel, rows and depth are the caller's to set. All lie on
// packed's device, in the order of its stream. nested_offset: only where it stays in CUDA memory.
typedef struct {
    hb_tensor4 tensor;
    hb_array packed, absmax, nested_absmax, nested_map, nested_offset;
} hb_weights4;

// Reads the arrays (take: HB_TAKE_KEEP or 0) and checks every dtype. On failure nothing is held.
int hb_weights4_get(hb_state *state, const char *function, const hb_weights4_args *args,
                    unsigned take, hb_weights4 *weights);
void hb_weights4_release(hb_weights4 *weights);
// Sets tensor.numel and checks that packed, absmax and nested_absmax have just the sizes for it.
int hb_weights4_set_numel(const char *function, hb_weights4 *weights, int64_t numel);
// Weights of a matrix product, all set: shape must be (rows, depth).
int hb_weights4_matrix(hb_state *state, const char *function, const hb_weights4_args *args,
                       PyObject *shape_object, hb_weights4 *weights);
static inline int64_t hb_packed_bytes(int64_t numel)
{
    return numel / 2 + numel % 2;
}

// Elements [start, start + numel(shape)) into `out` or a new array of origin's framework.
PyObject *hb_dequantize4_run(hb_state *state, const char *function, const hb_tensor4 *tensor,
                             int64_t start, hb_dtype dtype, const hb_origin *origin, int ndim,
                             const int64_t *shape, PyObject *out);

// y = x W^T + b, or dx = dy W (backward): reads `input`, makes or checks the output, runs the core.
typedef struct {
    const char *function, *input_name;
    bool backward;
    hb_compute compute;
    const hb_view *bias; // forward only; may be NULL
} hb_linear4_call;
PyObject *hb_linear4_run(hb_state *state, const hb_linear4_call *call, const hb_tensor4 *tensor,
                         PyObject *input, PyObject *out);

#endif
