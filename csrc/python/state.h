// State of the extension module, and what its files share. Every mutable thing lives here: the
// module may be created more than once, and no function keeps anything in a static variable.
#ifndef HB_PYTHON_STATE_H
#define HB_PYTHON_STATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <dlpack/dlpack.h>

#include "core/ops.h"

#define HB_EXCHANGE_SLOTS 16

// A tensor type and its DLPack exchange table (valid for the life of the process). Immutable.
typedef struct {
    PyTypeObject *type; // strong
    const DLPackExchangeAPI *api;
    bool lazy_negation; // has is_neg(): see hb_exchange_get
} hb_exchange_entry;

typedef struct {
    hb_context context; // kernels and pool
    bool context_ready;
    float maps[HB_MAP8_COUNT][256]; // filled at import, constant afterwards

    PyTypeObject *params4bit_type;
    PyTypeObject *linear4bit_type;
    PyTypeObject *int8params_type;
    PyTypeObject *linear8bit_type;
    PyTypeObject *params8bit_type;
    PyObject *cuda_error;

    PyObject *str_dlpack;         // "__dlpack__"
    PyObject *str_dlpack_device;  // "__dlpack_device__"
    PyObject *str_exchange_api;   // "__dlpack_c_exchange_api__"
    PyObject *str_is_neg;         // "is_neg"
    PyObject *str_resolve_neg;    // "resolve_neg"
    PyObject *dlpack_kwnames;     // ("max_version",)
    PyObject *dlpack_kwnames_gpu; // ("max_version", "stream")
    PyObject *dlpack_max_version; // (1, 3)
    PyObject *dlpack_stream;      // 1: the legacy default stream

    // Types with an exchange table, in the order they were met. A slot is written once (compare and
    // swap) and never changes, so that readers need no lock.
    _Atomic(hb_exchange_entry *) exchange[HB_EXCHANGE_SLOTS];
} hb_state;

static inline hb_state *hb_state_of_module(PyObject *module)
{
    return (hb_state *)PyModule_GetState(module);
}

// For instances of our own types: they are final, so that the type is always the one that was made
// with the module.
static inline hb_state *hb_state_of(PyObject *self)
{
    return (hb_state *)PyType_GetModuleState(Py_TYPE(self));
}

// Sets the exception for a failed status; returns NULL.
PyObject *hb_raise(hb_state *state, hb_status status, const hb_error *error);

// Runs a core operation without the GIL and stores its status.
#define HB_WITHOUT_GIL(status, call)                                                               \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS(status)                                                             \
        = (call);                                                                                  \
        Py_END_ALLOW_THREADS                                                                       \
    } while (0)

#endif
