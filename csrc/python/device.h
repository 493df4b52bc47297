// CUDA arrays in the binding: is there a device, on which stream, memory from the caller's
// framework, copies of strided arrays, and tables of the processor's that a kernel needs.
//
// A call works on one device, on the current stream of the framework of its first array. Memory
// that it takes for a moment comes from that framework's allocator and is given back when the
// kernels are launched, not when they have run: such allocators reuse memory in the order of the
// stream. The GIL is released around every launch, which may wait for room in the stream. Producers
// that only have __dlpack__ are asked to be ready for the legacy default stream, which the call
// then uses; they cannot give memory, so that results need out= there.
#ifndef HB_PYTHON_DEVICE_H
#define HB_PYTHON_DEVICE_H

#include "python/tensor.h"

// Where results go: the framework that makes them (NULL: NumPy, on the CPU) and the device.
struct hb_origin {
    const DLPackExchangeAPI *api;
    hb_device device;
};

// The stream of arrays that objects hold: any call's.
#define HB_ANY_STREAM ((void *)(intptr_t)-1)

static inline hb_origin hb_origin_of(const hb_array *array)
{
    return (hb_origin){array->api, array->view.device};
}

// What an object keeps of the origin of its arrays.
static inline hb_origin hb_origin_held(hb_origin origin)
{
    if (origin.device.type == HB_CUDA) origin.device.stream = HB_ANY_STREAM;
    return origin;
}

// The same with the framework's current stream, for a call of the object's. 0 or -1.
int hb_origin_enter(hb_state *state, const char *function, const hb_origin *held, hb_origin *now);

// "cpu", "cuda:1".
enum { HB_DEVICE_TEXT = 24 };
void hb_device_text(const hb_device *device, char *text);

// 0, or -1 with CudaError, which says why no CUDA device can be used (name: whose array it is).
int hb_device_open(hb_state *state, const char *function, const char *name, int index);
// Completes an array on CUDA: opens the device and asks for the current stream.
int hb_device_enter(hb_state *state, const char *function, const char *name, hb_array *array);

// ValueError unless the array lies on `expected` and its work goes to the same stream.
int hb_raise_device(const char *function, const char *name, const hb_array *array,
                    const hb_device *expected);
static inline int hb_check_device(const char *function, const char *name, const hb_array *array,
                                  const hb_device *expected)
{
    const hb_device *got = &array->view.device;
    if (got->type == HB_CPU && expected->type == HB_CPU) return 0;
    return hb_raise_device(function, name, array, expected);
}

// Memory for `count` arrays of bytes[i] in one allocation of origin's framework (CPU: malloc), each
// aligned to 256 bytes (CPU: 64); the pointers go to part[i]. Returns its owner.
PyObject *hb_memory_new(const char *function, const hb_origin *origin, int count,
                        const int64_t *bytes, void **part);
// Copies bytes between two places of one device, in the order of its stream. 0 or -1.
int hb_memory_copy(hb_state *state, const char *function, const hb_device *device, void *target,
                   const void *source, int64_t bytes);

// Scratch of a call: nothing on the CPU and for 0 bytes. 0 or -1; *owner is released after it.
int hb_workspace_new(const char *function, const hb_origin *origin, int64_t bytes, PyObject **owner,
                     void **workspace);

// Makes `array`, whose strides or alignment no kernel takes, a row-major copy on its device.
int hb_device_own(hb_state *state, const char *function, hb_array *array);
// A strided output gets contiguous memory to write to in its place: 1, with *target what
// hb_stage_end copies it to; 0 where that is not needed; -1 with an exception.
int hb_stage_strided(const char *function, hb_array *out, hb_view *target);
static inline int hb_stage_begin(const char *function, hb_array *out, hb_view *target)
{
    if (out->view.device.type == HB_CPU) return 0;
    return hb_stage_strided(function, out, target);
}
int hb_stage_end(hb_state *state, const char *function, const hb_array *out, const hb_view *target);

// A table of up to 256 floats (contiguous) where origin's kernels can read it: where it is when it
// already lies there or on the CPU beside CPU arrays, otherwise a copy that array->owner keeps.
int hb_table_move(hb_state *state, const char *function, const char *name, const hb_origin *origin,
                  hb_array *array);

#endif
