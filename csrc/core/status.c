#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

hb_status hb_fail(hb_error *error, hb_status status, const char *format, ...)
{
    if (error != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return status;
}
