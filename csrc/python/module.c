// halfbyte._C: module definition, state, exceptions. The exec slot reads as a table of contents.
#include "python/functions.h"
#include "python/tensor.h"
#include "python/types.h"

#include "core/cpu.h"

PyObject *hb_raise(hb_state *state, hb_status status, const hb_error *error)
{
    PyObject *type = PyExc_RuntimeError;
    switch (status) {
    case HB_OK: break;
    case HB_ERR_VALUE:
    case HB_ERR_DEVICE: type = PyExc_ValueError; break;
    case HB_ERR_TYPE: type = PyExc_TypeError; break;
    case HB_ERR_BUFFER: type = PyExc_BufferError; break;
    case HB_ERR_MEMORY: type = PyExc_MemoryError; break;
    case HB_ERR_CUDA: type = state->cuda_error; break;
    }
    PyErr_SetString(type, error->text);
    return NULL;
}

static int add_strings(hb_state *state)
{
    state->str_dlpack = PyUnicode_InternFromString("__dlpack__");
    state->str_dlpack_device = PyUnicode_InternFromString("__dlpack_device__");
    state->str_exchange_api = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    state->str_is_neg = PyUnicode_InternFromString("is_neg");
    state->str_resolve_neg = PyUnicode_InternFromString("resolve_neg");
    state->dlpack_kwnames = Py_BuildValue("(N)", PyUnicode_InternFromString("max_version"));
    state->dlpack_kwnames_gpu = Py_BuildValue("(NN)", PyUnicode_InternFromString("max_version"),
                                              PyUnicode_InternFromString("stream"));
    state->dlpack_max_version = Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    state->dlpack_stream = PyLong_FromLong(1);
    return state->str_dlpack && state->str_dlpack_device && state->str_exchange_api &&
                   state->str_is_neg && state->str_resolve_neg && state->dlpack_kwnames &&
                   state->dlpack_kwnames_gpu && state->dlpack_max_version && state->dlpack_stream
               ? 0
               : -1;
}

static int add_context(hb_state *state)
{
    int unknown = 0;
    hb_error error;
    uint32_t flags = hb_cpu_flags(&unknown);
    if (unknown &&
        PyErr_WarnEx(
            PyExc_RuntimeWarning,
            "HALFBYTE_CPU names no instruction set that halfbyte knows "
            "(ref, avx2, avxvnni, avx512, avx512vnni, avx512vbmi, avx512bf16, amx, neon): ignored",
            1) < 0)
        return -1;
    hb_status status = hb_context_init(&state->context, flags, 0, &error);
    if (status != HB_OK) {
        hb_raise(state, status, &error);
        return -1;
    }
    state->context_ready = true;
    for (int i = 0; i < HB_MAP8_COUNT; i++) hb_map8_fill((hb_map8)i, state->maps[i]);
    return 0;
}

static int add_exceptions(PyObject *module, hb_state *state)
{
    state->cuda_error = PyErr_NewExceptionWithDoc(
        "halfbyte._C.CudaError", "No CUDA device can be used, or one reported an error.",
        PyExc_RuntimeError, NULL);
    return PyModule_AddObjectRef(module, "CudaError", state->cuda_error);
}

static int add_types(PyObject *module, hb_state *state)
{
    const struct {
        PyType_Spec *spec;
        PyTypeObject **type;
    } types[] = {
        {&hb_params4bit_spec, &state->params4bit_type},
        {&hb_linear4bit_spec, &state->linear4bit_type},
        {&hb_int8params_spec, &state->int8params_type},
        {&hb_linear8bit_spec, &state->linear8bit_type},
        {&hb_params8bit_spec, &state->params8bit_type},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        *types[i].type = (PyTypeObject *)PyType_FromModuleAndSpec(module, types[i].spec, NULL);
        if (*types[i].type == NULL || PyModule_AddType(module, *types[i].type) < 0) return -1;
    }
    return 0;
}

static int module_exec(PyObject *module)
{
    hb_state *state = hb_state_of_module(module);
    if (hb_numpy_import() < 0) return -1;
    if (add_strings(state) < 0) return -1;
    if (add_context(state) < 0) return -1;
    if (add_exceptions(module, state) < 0) return -1;
    if (add_types(module, state) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_4bit) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_8bit) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_block) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_dense) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_cuda) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_fused) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_grouped) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_info) < 0) return -1;
    if (PyModule_AddFunctions(module, hb_functions_optim) < 0) return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    hb_state *state = hb_state_of_module(module);
    Py_VISIT(state->params4bit_type);
    Py_VISIT(state->linear4bit_type);
    Py_VISIT(state->int8params_type);
    Py_VISIT(state->linear8bit_type);
    Py_VISIT(state->params8bit_type);
    Py_VISIT(state->cuda_error);
    return hb_exchange_traverse(state, visit, arg);
}

static int module_clear(PyObject *module)
{
    hb_state *state = hb_state_of_module(module);
    Py_CLEAR(state->params4bit_type);
    Py_CLEAR(state->linear4bit_type);
    Py_CLEAR(state->int8params_type);
    Py_CLEAR(state->linear8bit_type);
    Py_CLEAR(state->params8bit_type);
    Py_CLEAR(state->cuda_error);
    Py_CLEAR(state->str_dlpack);
    Py_CLEAR(state->str_dlpack_device);
    Py_CLEAR(state->str_exchange_api);
    Py_CLEAR(state->str_is_neg);
    Py_CLEAR(state->str_resolve_neg);
    Py_CLEAR(state->dlpack_kwnames);
    Py_CLEAR(state->dlpack_kwnames_gpu);
    Py_CLEAR(state->dlpack_max_version);
    Py_CLEAR(state->dlpack_stream);
    hb_exchange_clear(state);
    return 0;
}

static void module_free(void *op)
{
    PyObject *module = op;
    hb_state *state = hb_state_of_module(module);
    module_clear(module);
    if (state->context_ready) hb_context_clear(&state->context);
    state->context_ready = false;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, // as NumPy
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

PyDoc_STRVAR(module_doc, "The extension module: types and functions over the C core.");

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,      .m_name = "halfbyte._C", .m_doc = module_doc,
    .m_size = sizeof(hb_state), .m_slots = module_slots, .m_traverse = module_traverse,
    .m_clear = module_clear,    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&module_def);
}
