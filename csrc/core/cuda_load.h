// Finds and opens libhalfbyte_cuda.so, once, when somebody first asks for a GPU.
#ifndef HB_CORE_CUDA_LOAD_H
#define HB_CORE_CUDA_LOAD_H

#include "core/cuda_api.h"
#include "core/status.h"

// The library's functions, whether or not there is a driver or a GPU. HB_ERR_CUDA with a sentence
// when this build has no library, or one that cannot be opened or is of another version. The
// library lies beside the shared object that holds this function, or where the environment variable
// HALFBYTE_CUDA_LIBRARY says. Thread-safe; the answer is the same for the life of the process.
hb_status hb_cuda_load(const hb_cuda_api **api, hb_error *error);
// The same, and a driver and a device that it can use.
hb_status hb_cuda_ready(const hb_cuda_api **api, hb_error *error);
// HB_OK, or HB_ERR_CUDA with "function: " and the sentence of a status that the library returned.
hb_status hb_cuda_check(const hb_cuda_api *api, const char *function, int status, hb_error *error);

#endif
