// Arrays in and out. Fastest first: the DLPack 1.3 exchange API of the argument's type, NumPy's
// C-API, __dlpack__ (or a capsule itself), the buffer protocol.
#ifndef HB_PYTHON_TENSOR_H
#define HB_PYTHON_TENSOR_H

#include "python/state.h"

// What a caller accepts: one bit per hb_dtype, and how the memory is to be handed over.
enum {
    HB_TAKE_F32 = 1u << HB_F32,
    HB_TAKE_IO = 1u << HB_F32 | 1u << HB_BF16 | 1u << HB_F16,
    HB_TAKE_U8 = 1u << HB_U8,
    HB_TAKE_I8 = 1u << HB_I8,
    HB_TAKE_I32 = 1u << HB_I32,
    HB_TAKE_I64 = 1u << HB_I64,
    HB_TAKE_BOOL = 1u << HB_BOOL,
    HB_TAKE_BYTES = 1u << 16,       // any dtype; the view becomes uint8 [bytes] (implies FLAT)
    HB_TAKE_U16_AS_BF16 = 1u << 17, // uint16 holds bfloat16 (besides what the dtype bits say)
    HB_TAKE_FLAT = 1u << 18,        // row-major without gaps; other inputs are copied
    HB_TAKE_WRITABLE = 1u << 19,    // an output: never copied, read-only memory is refused
    HB_TAKE_KEEP = 1u << 20         // the memory must outlive the call: owner is always set
};

typedef struct hb_origin hb_origin; // device.h

// `view` is valid while the caller's object and `owner` live.
typedef struct {
    hb_view view;
    DLDataType type;              // what the producer said
    const DLPackExchangeAPI *api; // the producer's framework; NULL stands for NumPy
    PyObject *owner;              // strong: what keeps view.data alive, or NULL: the argument does
    bool managed;                 // CUDA managed memory: of every device
} hb_array;

// 0, or -1 with an exception set (TypeError: no array or a wrong dtype; BufferError: memory that
// cannot be used so; ValueError: shape; CudaError: no CUDA device). `array` must be initialised
// with {0} or be released; on failure nothing is held. Inputs on CUDA are always contiguous and
// aligned: others are copied in the order of their framework's current stream.
int hb_array_get(hb_state *state, PyObject *object, const char *function, const char *name,
                 unsigned take, hb_array *array);
void hb_array_release(hb_array *array);
// Replaces the elements by a row-major copy in memory of our own, on the same device.
int hb_array_own(hb_state *state, const char *function, hb_array *array);

// A result of `shape`: `out` when given (dtype, shape and device checked, any strides), otherwise
// new memory from origin's framework or NumPy. Returns a new reference and fills `array`. take:
// HB_TAKE_U16_AS_BF16 and HB_TAKE_FLAT apply to `out`.
PyObject *hb_output(hb_state *state, PyObject *out, const char *function, const char *name,
                    const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                    unsigned take, hb_array *array);

// Refuses an output that shares memory with an input. 0, or -1 with ValueError.
int hb_check_overlap(const char *function, const char *out_name, const hb_array *out,
                     const char *in_name, const hb_array *in);
// The same for plain memory: `size` bytes from `data`.
int hb_check_overlap_bytes(const char *function, const char *out_name, const hb_array *out,
                           const char *in_name, const void *data, int64_t size);
// An array of exactly `expected` elements, or ValueError.
int hb_check_numel(const char *function, const char *name, const hb_array *array, int64_t expected);

// Zero-copy array over memory that `owner` keeps alive, in origin's framework or (read-only) NumPy.
PyObject *hb_wrap(PyObject *owner, const hb_origin *origin, void *data, hb_dtype dtype, int ndim,
                  const int64_t *shape);
// The same as a capsule for __dlpack__; keywords as the Python array API standard has them.
PyObject *hb_to_dlpack(hb_state *state, const char *function, PyObject *owner,
                       const hb_origin *origin, void *data, hb_dtype dtype, int ndim,
                       const int64_t *shape, PyObject *const *args, Py_ssize_t n_args,
                       PyObject *kwnames);

// `size` writable bytes as a capsule of the old kind, which every framework takes.
PyObject *hb_bytes_capsule(PyObject *owner, const hb_device *device, void *data, int64_t size);

// The framework's name for a DLPack dtype: "float64", "complex64", "opaque".
void hb_dltype_name(DLDataType type, char *text, size_t size);

// Shared with numpy.c and dlpack.c: fills view, type and api from a producer's tensor.
int hb_array_fill(const DLTensor *tensor, bool readonly, const char *function, const char *name,
                  hb_array *array);
// The device of a producer's tensor: the CPU or CUDA. Others: -1 with BufferError.
int hb_device_from_dlpack(DLDevice device, const char *function, const char *name,
                          hb_device *result);
// A capsule that frees `memory` (from malloc); frees it itself on failure.
PyObject *hb_memory_owner(void *memory);

// ---- numpy.c ----------------------------------------------------------------------------------

int hb_numpy_import(void);
const char *hb_numpy_target(void); // oldest NumPy that this build runs with
bool hb_numpy_check_exact(PyObject *object);
bool hb_numpy_check(PyObject *object); // ndarray or a subclass
int hb_numpy_get(PyObject *object, const char *function, const char *name, unsigned take,
                 hb_array *array);
// New array, uninitialised; *data is its memory.
PyObject *hb_numpy_new(hb_dtype dtype, int ndim, const int64_t *shape, void **data);
// Read-only array over `data`, base = owner.
PyObject *hb_numpy_wrap(PyObject *owner, void *data, hb_dtype dtype, int ndim,
                        const int64_t *shape);

// ---- dlpack.c ---------------------------------------------------------------------------------

// The type's exchange table and what else is known of it. 1: found, 0: none, -1: exception.
int hb_exchange_find(hb_state *state, PyTypeObject *type, hb_exchange_entry *entry);
int hb_exchange_get(hb_state *state, const hb_exchange_entry *entry, PyObject *object,
                    const char *function, const char *name, unsigned take, hb_array *array);
PyObject *hb_exchange_new(const hb_origin *origin, hb_dtype dtype, int ndim, const int64_t *shape,
                          void **data);
// `bytes` from the framework's allocator on origin's device; returns their owner.
PyObject *hb_exchange_memory(const hb_origin *origin, int64_t bytes, char **memory);
// 1: done, 0: the object has no __dlpack__, -1: exception.
int hb_dlpack_get(hb_state *state, PyObject *object, const char *function, const char *name,
                  hb_array *array);
#define HB_CAPSULE_VERSIONED      "dltensor_versioned"
#define HB_CAPSULE_VERSIONED_USED "used_dltensor_versioned"
#define HB_CAPSULE_LEGACY         "dltensor"
#define HB_CAPSULE_LEGACY_USED    "used_dltensor"
extern const DLDataType hb_dlpack_types[HB_DTYPE_COUNT];
DLDevice hb_device_to_dlpack(const hb_device *device);
// A tensor of the framework's, uninitialised; NULL with an exception.
DLManagedTensorVersioned *hb_exchange_allocate(const hb_origin *origin, hb_dtype dtype, int ndim,
                                               const int64_t *shape);
// The framework's array of `managed`, which it takes, also on failure.
PyObject *hb_exchange_to_python(const DLPackExchangeAPI *api, DLManagedTensorVersioned *managed);
void hb_exchange_clear(hb_state *state);
int hb_exchange_traverse(hb_state *state, visitproc visit, void *arg);

#endif
