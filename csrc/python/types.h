// The types of the module, one a file.
#ifndef HB_PYTHON_TYPES_H
#define HB_PYTHON_TYPES_H

#include "python/state.h"

extern PyType_Spec hb_params4bit_spec;
extern PyType_Spec hb_linear4bit_spec;
extern PyType_Spec hb_int8params_spec;
extern PyType_Spec hb_linear8bit_spec;
extern PyType_Spec hb_params8bit_spec;

#if PY_VERSION_HEX >= 0x030C0000
#define HB_MEMBER_OFFSET   Py_T_PYSSIZET
#define HB_MEMBER_READONLY Py_READONLY
#else
#include <structmember.h>
#define HB_MEMBER_OFFSET   T_PYSSIZET
#define HB_MEMBER_READONLY READONLY
#endif

#define HB_TYPE_FLAGS (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE)

#define HB_METHOD(function) ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL | METH_KEYWORDS
#define HB_CLASS_METHOD(function)                                                                  \
    ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL | METH_KEYWORDS | METH_CLASS

#endif
