// The stateless functions of the module, one table a file.
#ifndef HB_PYTHON_FUNCTIONS_H
#define HB_PYTHON_FUNCTIONS_H

#include "python/state.h"

#define HB_FASTCALL(function)                                                                      \
    ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL | METH_KEYWORDS

extern PyMethodDef hb_functions_4bit[];
extern PyMethodDef hb_functions_8bit[];
extern PyMethodDef hb_functions_block[];
extern PyMethodDef hb_functions_cuda[];
extern PyMethodDef hb_functions_dense[];
extern PyMethodDef hb_functions_fused[];
extern PyMethodDef hb_functions_grouped[];
extern PyMethodDef hb_functions_info[];
extern PyMethodDef hb_functions_optim[];

#endif
