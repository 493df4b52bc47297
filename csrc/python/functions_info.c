// cpu_info, set_num_threads, get_num_threads, build_info, read_memory, multiply_adds.
#include "python/args.h"
#include "python/functions.h"
#include "python/tensor.h"

#include "core/cpu.h"
#include "core/sanitizer.h"

#ifndef HB_BUILD_CUDA
#define HB_BUILD_CUDA "CPU only"
#endif

#define STRING(x)    #x
#define AS_STRING(x) STRING(x)

PyDoc_STRVAR(cpu_info_doc,
             "cpu_info($module, /)\n--\n\n"
             "{\"detected\": str, \"used\": str, \"amx\": str, \"threads\": int, "
             "\"loops_on_torch_threads\": int, \"loops_late\": int, \"loops_crowded\": int}. "
             "detected: the best instruction set that is used unless HALFBYTE_CPU names another. "
             "amx: \"no\" (none here), \"off\" (used where HALFBYTE_CPU is \"amx\" and the system "
             "grants it) or \"used\". Parallel loops so far: those that torch's OpenMP threads ran "
             "for us, those that waited for a thread without a processor, those with fewer threads "
             "because of such waits.");

static PyObject *cpu_info(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    const hb_context *context = &hb_state_of_module(module)->context;
    const hb_pool_counts counts = hb_pool_count(context->pool);
    const uint32_t detected = hb_cpu_detect();
    const char *amx = "no";
    if (detected & HB_CPU_AMX) amx = context->cpu_flags & HB_CPU_AMX ? "used" : "off";
    return Py_BuildValue(
        "{s:s, s:s, s:s, s:i, s:K, s:K, s:K}", "detected",
        hb_cpu_name(detected & ~(uint32_t)HB_CPU_AMX), "used", hb_cpu_name(context->cpu_flags),
        "amx", amx, "threads", hb_pool_threads(context->pool), "loops_on_torch_threads",
        (unsigned long long)counts.borrowed, "loops_late", (unsigned long long)counts.late,
        "loops_crowded", (unsigned long long)counts.crowded);
}

PyDoc_STRVAR(set_num_threads_doc, "set_num_threads($module, n, /)\n--\n\n"
                                  "Threads of calls that start later, the caller's included.");

static PyObject *set_num_threads(PyObject *module, PyObject *value)
{
    int64_t threads = 0;
    if (hb_arg_int64("set_num_threads", "n", value, &threads) < 0) return NULL;
    if (threads < 1 || threads > 4096) {
        PyErr_Format(PyExc_ValueError, "set_num_threads: n, expected 1 to 4096, got %lld",
                     (long long)threads);
        return NULL;
    }
    hb_pool_set_threads(hb_state_of_module(module)->context.pool, (int)threads);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc, "get_num_threads($module, /)\n--\n\n"
                                  "Threads that a call may use, the caller's included.");

static PyObject *get_num_threads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(hb_pool_threads(hb_state_of_module(module)->context.pool));
}

PyDoc_STRVAR(build_info_doc,
             "build_info($module, /)\n--\n\n"
             "{\"compiler\": str, \"isas\": list[str], \"dlpack\": str, \"numpy_target\": str, "
             "\"sanitize\": bool, \"cuda\": str}. cuda says for which GPUs, or why for none.");

static PyObject *build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
#if defined(__x86_64__) || defined(_M_X64)
    PyObject *isas = Py_BuildValue("[ssssss]", "ref", "avx2", "avx512", "avx512vnni", "avx512vbmi",
                                   "avx512bf16");
#if !defined(HB_WITHOUT_AVXVNNI)
    PyObject *vnni = PyUnicode_FromString("avxvnni");
    if (isas != NULL && (vnni == NULL || PyList_Insert(isas, 2, vnni) < 0)) Py_CLEAR(isas);
    Py_XDECREF(vnni);
#endif
#if !defined(HB_WITHOUT_AMX)
    PyObject *amx = PyUnicode_FromString("amx");
    if (isas != NULL && (amx == NULL || PyList_Append(isas, amx) < 0)) Py_CLEAR(isas);
    Py_XDECREF(amx);
#endif
#elif defined(__aarch64__)
    PyObject *isas = Py_BuildValue("[ss]", "ref", "neon");
#else
    PyObject *isas = Py_BuildValue("[s]", "ref");
#endif
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    PyObject *sanitize = HB_ADDRESS_SANITIZER ? Py_True : Py_False;
    return Py_BuildValue(
        "{s:s, s:N, s:s, s:s, s:O, s:s}", "compiler", compiler, "isas", isas, "dlpack",
        AS_STRING(DLPACK_MAJOR_VERSION) "." AS_STRING(DLPACK_MINOR_VERSION), "numpy_target",
        hb_numpy_target(), "sanitize", sanitize, "cuda", HB_BUILD_CUDA);
}

PyDoc_STRVAR(
    read_memory_doc,
    "read_memory($module, data, /)\n--\n\n"
    "Reads a buffer as fast as the threads can and does nothing else: a ruler for kernels. "
    "Whole pieces of 256 KiB; returns the sum of their 64-bit words modulo 2^64.");

static PyObject *read_memory(PyObject *module, PyObject *data)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0) return NULL;
    hb_context *context = &hb_state_of_module(module)->context;
    uint64_t sum = 0;
    Py_BEGIN_ALLOW_THREADS
    sum = hb_read_memory(context, buffer.buf, buffer.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return PyLong_FromUnsignedLongLong(sum);
}

PyDoc_STRVAR(multiply_adds_doc,
             "multiply_adds($module, kind, calls, /)\n--\n\n"
             "Multiplies in registers as fast as the threads can and does nothing else. kind: "
             "\"float32\", \"bfloat16\" or \"int8\"; calls: pieces of some ten thousand vector "
             "instructions. Returns the operations, a multiply-add counted as two; 0 at once where "
             "the processor has no instruction for that kind.");

static PyObject *multiply_adds(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    static const char *const kinds[] = {"float32", "bfloat16", "int8", NULL}; // hb_ruler_kind
    static const hb_signature signature = {"multiply_adds", 2, 2, 2, 2, {"kind", "calls"}};
    PyObject *value[2];
    int kind = 0;
    int64_t calls = 0;
    if (hb_parse_args(&signature, args, n_args, NULL, value) < 0 ||
        hb_arg_choice(signature.function, "kind", value[0], kinds, &kind) < 0 ||
        hb_arg_int64(signature.function, "calls", value[1], &calls) < 0)
        return NULL;
    if (calls < 0 || calls > 1 << 20) {
        PyErr_Format(PyExc_ValueError, "multiply_adds: calls, expected 0 to %d, got %lld", 1 << 20,
                     (long long)calls);
        return NULL;
    }
    hb_context *context = &hb_state_of_module(module)->context;
    int64_t operations = 0;
    Py_BEGIN_ALLOW_THREADS
    operations = hb_multiply_adds(context, (hb_ruler_kind)kind, calls);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(operations);
}

PyMethodDef hb_functions_info[] = {
    {"cpu_info", cpu_info, METH_NOARGS, cpu_info_doc},
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {"read_memory", read_memory, METH_O, read_memory_doc},
    {"multiply_adds", (PyCFunction)(void (*)(void))multiply_adds, METH_FASTCALL, multiply_adds_doc},
    {NULL, NULL, 0, NULL},
};
