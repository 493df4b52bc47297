// Views as matrices: what the products y = x W^T and dx = dy W share, whatever W is stored in.
#ifndef HB_CORE_MATRIX_H
#define HB_CORE_MATRIX_H

#include "core/kernels_linear4.h"
#include "core/status.h"
#include "core/view.h"

// A view with all dimensions but the last counted as rows. Strides of any sign; at least one
// dimension.
typedef struct {
    const hb_view *view;
    int64_t rows, cols, col_stride;
} hb_matrix;

hb_matrix hb_matrix_of(const hb_view *view);
// Offset in elements of row `row`, and the address of an offset.
int64_t hb_matrix_row_offset(const hb_matrix *m, int64_t row);
unsigned char *hb_matrix_element(const hb_matrix *m, int64_t offset);
// Rows [begin, begin + n) contiguous each, at one distance? Then *stride is that distance in
// elements.
bool hb_matrix_rows_are_regular(const hb_matrix *m, int64_t begin, int64_t n, int64_t *stride);
// Copies row `row` to contiguous memory; 16- and 32-bit elements.
void hb_matrix_gather_row(const hb_matrix *m, int64_t row, void *target);
// Rows [begin, begin + n), each contiguous and *stride elements from the next: in place where they
// are regular, else copied to `target`.
const void *hb_matrix_rows(const hb_matrix *m, int64_t begin, int64_t n, void *target,
                           int64_t *stride);
// y[row, begin + i] = sums[i] + bias[i], rounded once, i < n <= HB_LINEAR4_MAX_TILE_COLS. bias
// NULL: 0. sums 64-byte aligned.
void hb_matrix_finish(const hb_kernels_linear4 *kernels, const hb_matrix *y, int64_t row,
                      int64_t begin, int64_t n, const float *sums, const float *bias);

// The bias of n outputs has an io dtype, one dimension and n elements.
hb_status hb_matrix_check_bias(const hb_view *bias, int64_t n, const char *function,
                               hb_error *error);
// Is it an array of float32 as it is? (Else: copied as one.)
bool hb_matrix_bias_is_plain(const hb_view *bias);
void hb_matrix_copy_bias(const hb_view *bias, float *target);

// `name` is an io dtype with at least one dimension, contiguous unless on the CPU.
hb_status hb_matrix_check_view(const hb_view *view, const char *function, const char *name,
                               hb_error *error);
// The same, of this dtype, in memory of the CPU, each row contiguous.
hb_status hb_matrix_check_rows(const hb_view *view, hb_dtype dtype, const char *function,
                               const char *name, hb_error *error);
// Like hb_matrix_check_view for x and y; y is writable; they have x_cols and y_cols columns (called
// x_size and y_size in messages, which compare them with the weight) and the same leading
// dimensions.
hb_status hb_matrix_check_views(const hb_view *x, int64_t x_cols, const char *x_name,
                                const char *x_size, const hb_view *y, int64_t y_cols,
                                const char *y_name, const char *y_size, const char *function,
                                hb_error *error);

#endif
