// Status codes of the core. A core function returns one; the sentence for the user goes into an
// hb_error that the caller owns. Only csrc/python turns them into exceptions.
#ifndef HB_CORE_STATUS_H
#define HB_CORE_STATUS_H

typedef enum {
    HB_OK = 0,
    HB_ERR_VALUE,  // a value out of range, a shape that does not fit   -> ValueError
    HB_ERR_TYPE,   // a dtype that the operation does not take          -> TypeError
    HB_ERR_BUFFER, // memory that cannot be used so (read-only, ...)    -> BufferError
    HB_ERR_MEMORY, // an allocation failed                              -> MemoryError
    HB_ERR_DEVICE, // a device that is missing or does not match        -> ValueError
    HB_ERR_CUDA    // the CUDA library reported an error                -> halfbyte.CudaError
} hb_status;

// text: one line "function: argument, expected, got", NUL-terminated. Written only on failure.
typedef struct {
    char text[256];
} hb_error;

// Writes the sentence (printf rules, truncated to fit) and returns `status`. `error` may be NULL.
hb_status hb_fail(hb_error *error, hb_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

#define HB_CHECK(error, condition, status, ...)                                                    \
    do {                                                                                           \
        if (!(condition)) return hb_fail((error), (status), __VA_ARGS__);                          \
    } while (0)

#define HB_TRY(expression)                                                                         \
    do {                                                                                           \
        hb_status hb_try_status_ = (expression);                                                   \
        if (hb_try_status_ != HB_OK) return hb_try_status_;                                        \
    } while (0)

#endif
