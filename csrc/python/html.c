// The table that notebooks show: plain HTML, escaped, no script, no style but alignment.
#include "python/object.h"

static PyObject *with_commas(PyObject *number)
{
    PyObject *format = PyUnicode_FromString(",");
    PyObject *text = format == NULL ? NULL : PyObject_Format(number, format);
    Py_XDECREF(format);
    return text;
}

static PyObject *escape(PyObject *text)
{
    static const char *const pairs[][2] = {
        {"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}};
    // Whole numbers get separators of thousands; True and False, which are whole numbers too, do
    // not.
    PyObject *escaped = PyLong_CheckExact(text) ? with_commas(text) : PyObject_Str(text);
    for (size_t i = 0; escaped != NULL && i < sizeof pairs / sizeof *pairs; i++) {
        PyObject *next = PyObject_CallMethod(escaped, "replace", "ss", pairs[i][0], pairs[i][1]);
        Py_SETREF(escaped, next);
    }
    return escaped;
}

PyObject *hb_html_table(const char *title, hb_html_row *rows, int count)
{
    PyObject *html = PyUnicode_FromFormat("<table><caption><b>%s</b></caption><tbody>", title);
    for (int i = 0; i < count; i++) {
        PyObject *value = html == NULL || rows[i].value == NULL ? NULL : escape(rows[i].value);
        if (value == NULL) {
            Py_CLEAR(html);
        } else {
            PyObject *next = PyUnicode_FromFormat("%U<tr><th style=\"text-align:left\">%s</th><td "
                                                  "style=\"text-align:right\">%U</td></tr>",
                                                  html, rows[i].label, value);
            Py_SETREF(html, next);
        }
        Py_XDECREF(value);
        Py_CLEAR(rows[i].value);
    }
    if (html == NULL) return NULL;
    PyObject *result = PyUnicode_FromFormat("%U</tbody></table>", html);
    Py_DECREF(html);
    return result;
}

PyObject *hb_text_decimal(double number, const char *unit)
{
    char *digits = PyOS_double_to_string(number, 'f', 2, 0, NULL);
    if (digits == NULL) return PyErr_NoMemory();
    PyObject *text = PyUnicode_FromFormat("%s%s", digits, unit);
    PyMem_Free(digits);
    return text;
}
