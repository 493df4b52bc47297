// optimizer_step: one step of an optimizer for a list of tensors in one call.
#include "python/common.h"
#include "python/functions.h"

#include "core/ops_cuda.h"

static const char *const function = "optimizer_step";
static const char *const optimizer_names[] = {"adam",    "ademamix", "momentum", "lion",
                                              "rmsprop", "adagrad",  NULL}; // hb_optimizer

// One entry of `tensors`, as the caller sees it.
enum { P, G, STATE1, STATE2, ABSMAX1, ABSMAX2, UNORM, ARRAYS, STEP = ARRAYS, FIELDS };
static const char *const field_names[FIELDS] = {"p",       "g",       "state1", "state2",
                                                "absmax1", "absmax2", "unorm",  "step"};
static const unsigned field_takes[ARRAYS] = {HB_TAKE_IO | HB_TAKE_WRITABLE,
                                             HB_TAKE_IO | HB_TAKE_FLAT,
                                             HB_TAKE_F32 | HB_TAKE_U8 | HB_TAKE_WRITABLE,
                                             HB_TAKE_F32 | HB_TAKE_U8 | HB_TAKE_WRITABLE,
                                             HB_TAKE_F32 | HB_TAKE_WRITABLE,
                                             HB_TAKE_F32 | HB_TAKE_WRITABLE,
                                             HB_TAKE_F32 | HB_TAKE_WRITABLE};

// `expected` elements without gaps, or ValueError.
static int check_array(const char *name, const hb_array *array, int64_t expected)
{
    if (hb_check_numel(function, name, array, expected) < 0) return -1;
    if (hb_view_is_contiguous(&array->view)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s[i], expected contiguous memory, got a strided tensor",
                 function, name);
    return -1;
}

// Everything lies where the first parameter does. Paged states may say that they are the
// processor's: managed memory, which the device can use where it lies.
static int check_place(hb_state *state, int field, const hb_array *array, const hb_device *device)
{
    bool paged = false;
    if (device->type == HB_CUDA && array->view.device.type == HB_CPU && field > G &&
        hb_view_numel(&array->view) > 0) {
        hb_error error;
        hb_status status = hb_memory_on_cuda(function, device, array->view.data, &paged, &error);
        if (status != HB_OK) {
            hb_raise(state, status, &error);
            return -1;
        }
    }
    return paged ? 0 : hb_check_device(function, field_names[field], array, device);
}

// Fills `tensor` from one entry; `device` is that of the tensors before (NULL: none). The arrays
// are released by the caller.
static int get_tensor(hb_state *state, hb_optimizer optimizer, PyObject *entry,
                      const hb_device *device, hb_array *arrays, hb_optim_tensor *tensor)
{
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != FIELDS) {
        PyErr_Format(PyExc_TypeError,
                     "%s: tensors[i], expected a tuple (p, g, state1, state2, absmax1, absmax2, "
                     "unorm, step), got %s",
                     function, Py_TYPE(entry)->tp_name);
        return -1;
    }
    for (int f = 0; f < ARRAYS; f++) {
        PyObject *value = PyTuple_GET_ITEM(entry, f);
        if (f > STATE1 && value == Py_None) continue;
        if (hb_array_get(state, value, function, field_names[f], field_takes[f], &arrays[f]) < 0)
            return -1;
        if (device != NULL && check_place(state, f, &arrays[f], device) < 0) return -1;
        if (f == P && device == NULL) device = &arrays[P].view.device; // of the first tensor
    }
    if (hb_arg_int64(function, field_names[STEP], PyTuple_GET_ITEM(entry, STEP), &tensor->step) < 0)
        return -1;
    const int64_t n = hb_view_numel(&arrays[P].view);
    const int64_t rows = optimizer == HB_ADEMAMIX ? 2 : 1; // of the first state
    const int64_t blocks = hb_ceil_div(n, HB_OPTIM_BLOCKSIZE);
    const int64_t expected[ARRAYS] = {n, n, rows * n, n, rows * blocks, blocks, 1};
    for (int f = 0; f < ARRAYS; f++) {
        const bool given = f <= STATE1 || PyTuple_GET_ITEM(entry, f) != Py_None;
        if (given && check_array(field_names[f], &arrays[f], expected[f]) < 0) return -1;
    }
    const bool has_second = PyTuple_GET_ITEM(entry, STATE2) != Py_None;
    tensor->state_is_8bit = arrays[STATE1].view.dtype == HB_U8;
    if (has_second && arrays[STATE2].view.dtype != arrays[STATE1].view.dtype) {
        PyErr_Format(PyExc_TypeError, "%s: state2, expected %s as state1, got %s", function,
                     hb_dtype_name(arrays[STATE1].view.dtype),
                     hb_dtype_name(arrays[STATE2].view.dtype));
        return -1;
    }
    tensor->p = arrays[P].view.data;
    tensor->g = arrays[G].view.data;
    tensor->p_dtype = arrays[P].view.dtype;
    tensor->g_dtype = arrays[G].view.dtype;
    tensor->n = n;
    tensor->state1 = arrays[STATE1].view.data;
    tensor->state2 = arrays[STATE2].view.data;
    tensor->absmax1 = arrays[ABSMAX1].view.data;
    tensor->absmax2 = arrays[ABSMAX2].view.data;
    tensor->unorm = arrays[UNORM].view.data;
    return 0;
}

PyDoc_STRVAR(
    optimizer_step_doc,
    "optimizer_step($module, optimizer, tensors, /, *, lr, beta1=0.0, beta2=0.0, beta3=0.0, "
    "alpha=0.0, eps=0.0, weight_decay=0.0, gnorm_scale=1.0, max_unorm=0.0, skip_zeros=False, "
    "map1=None, map2=None)"
    "\n--\n\nOne step for every (p, g, state1, state2, absmax1, absmax2, unorm, step), in place.");

static PyObject *optimizer_step(PyObject *module, PyObject *const *args, Py_ssize_t n_args,
                                PyObject *kwnames)
{
    static const hb_signature signature = {"optimizer_step",
                                           2,
                                           2,
                                           3,
                                           14,
                                           {"optimizer", "tensors", "lr", "beta1", "beta2", "beta3",
                                            "alpha", "eps", "weight_decay", "gnorm_scale",
                                            "max_unorm", "skip_zeros", "map1", "map2"}};
    hb_state *state = hb_state_of_module(module);
    PyObject *value[14];
    if (hb_parse_args(&signature, args, n_args, kwnames, value) < 0) return NULL;
    hb_optim_settings settings = {.gnorm_scale = 1.0};
    double *const scalars[] = {&settings.lr,           &settings.beta1,       &settings.beta2,
                               &settings.beta3,        &settings.alpha,       &settings.eps,
                               &settings.weight_decay, &settings.gnorm_scale, &settings.max_unorm};
    int optimizer = 0;
    if (hb_arg_choice(function, "optimizer", value[0], optimizer_names, &optimizer) < 0)
        return NULL;
    for (int i = 0; i < 9; i++)
        if (hb_arg_double(function, signature.names[2 + i], value[2 + i], scalars[i]) < 0)
            return NULL;
    if (hb_arg_bool(function, "skip_zeros", value[11], &settings.skip_zeros) < 0) return NULL;

    hb_array map1_array = {0}, map2_array = {0};
    const float *map1 = NULL, *map2 = NULL;
    hb_origin origin = {.device = {.type = HB_CPU}};
    PyObject *scratch = NULL;
    void *workspace = NULL;
    hb_array *arrays = NULL;
    hb_optim_tensor *tensors = NULL;
    PyObject *result = NULL;
    // A tuple of our own: the caller's list may change while the GIL is released.
    PyObject *list = PySequence_Tuple(value[1]);
    if (list == NULL) return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(list);
    arrays = PyMem_Calloc((size_t)count * ARRAYS + 1, sizeof *arrays);
    tensors = PyMem_Calloc((size_t)count + 1, sizeof *tensors);
    if (arrays == NULL || tensors == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (get_tensor(state, (hb_optimizer)optimizer, PyTuple_GET_ITEM(list, i),
                       i > 0 ? &arrays[P].view.device : NULL, arrays + i * ARRAYS, &tensors[i]) < 0)
            goto done;
    if (count > 0) origin = hb_origin_of(&arrays[P]);
    if ((hb_given(value[12]) &&
         hb_map8_get(state, value[12], function, "map1", 0, &origin, &map1_array, &map1) < 0) ||
        (hb_given(value[13]) &&
         hb_map8_get(state, value[13], function, "map2", 0, &origin, &map2_array, &map2) < 0) ||
        hb_workspace_new(function, &origin,
                         hb_optimizer_workspace(&origin.device, (hb_optimizer)optimizer, tensors,
                                                count, &settings),
                         &scratch, &workspace) < 0)
        goto done;
    hb_error error;
    hb_status status;
    HB_WITHOUT_GIL(status,
                   hb_optimizer_step(&state->context, &origin.device, (hb_optimizer)optimizer,
                                     tensors, count, &settings, map1, map2, workspace, &error));
    if (status != HB_OK)
        hb_raise(state, status, &error);
    else
        result = Py_NewRef(Py_None);
done:
    for (Py_ssize_t i = 0; arrays != NULL && i < count * ARRAYS; i++) hb_array_release(&arrays[i]);
    Py_XDECREF(scratch);
    PyMem_Free(arrays);
    PyMem_Free(tensors);
    hb_array_release(&map1_array);
    hb_array_release(&map2_array);
    Py_DECREF(list);
    return result;
}

PyMethodDef hb_functions_optim[] = {
    {"optimizer_step", HB_FASTCALL(optimizer_step), optimizer_step_doc},
    {NULL, NULL, 0, NULL},
};
