// The types of the module, one a file.
#ifndef HB_PYTHON_TYPES_H
#define HB_PYTHON_TYPES_H

#include "python/state.h"

#endif
