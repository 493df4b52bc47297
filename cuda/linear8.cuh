// What the kernels of the products with row-wise int8 weights share: the job that a launch gets,
// and what follows the sums.
//
//   dynamic:    y[j, r] = (sum_k cx[j, k] c[r, k] * (sx[j]/127) + sum_o x[j, o] c[r, o]) *
//   (s[r]/127) + bias[r]
//   exact:      y[j, r] = (sum_k x[j, k] c[r, k]) * (s[r]/127) + bias[r]
//   transposed: y[j, k] = sum_r x[j, r] (s[r]/127) c[r, k]
//
// cx, sx: x quantized row-wise, 0 in its outlier columns o. The integer sum is exact, 1/127 is the
// float32 next to it, and all that follows are single float32 operations in this order, the CPU's:
// without outliers y has the CPU's bits, and with 16-bit x also with one outlier column.
#ifndef HB_CUDA_LINEAR8_CUH
#define HB_CUDA_LINEAR8_CUH

#include "experts.cuh"
#include "kernels.cuh"
#include "rows8.cuh"

struct linear8_job {
    hb_cuda_linear8 a;
    // Dynamic mode: x quantized, [m, depth] and [m], and its outlier columns, ascending. `columns`
    // is NULL without a threshold; *n_columns is known on the device only.
    const int8_t *x_codes;
    const float *x_scale;
    const int32_t *columns, *n_columns;
    int32_t *c; // not NULL: only the integer sums are wanted, [m, rows]
    // x as the sum of three bfloat16, [3][m][pitch] (linear8_wide.cu).
    uint16_t *planes;
    int64_t pitch;
    int64_t x_tiles, blocks; // of the launch
};

// bias[i], or 0.
HB_DEVICE float linear8_bias(const hb_cuda_linear8 &a, int64_t i)
{
    if (a.bias == nullptr) return 0.0f;
    switch (a.bias_dtype) {
    case 0: return load_float<0>(a.bias, i);
    case 1: return load_float<1>(a.bias, i);
    default: return load_float<2>(a.bias, i);
    }
}

// scale / 127 of row i of the weight (or of x).
HB_DEVICE float linear8_factor(const float *scale, int64_t i)
{
    return mul_rn(load(scale + i), HB_INT8_STEP);
}

// The float32 before the last factor.
HB_DEVICE float linear8_value(int32_t sum, float x_factor, bool has_outliers, float outliers)
{
    const float value = mul_rn((float)sum, x_factor);
    return has_outliers ? add_rn(value, outliers) : value;
}

// What is written: row i of the stacked weight.
HB_DEVICE float linear8_finish(const hb_cuda_linear8 &a, int64_t i, float value)
{
    value = mul_rn(value, linear8_factor(a.scale, i));
    return a.bias != nullptr ? add_rn(value, linear8_bias(a, i)) : value;
}

// How many outlier columns there are.
HB_DEVICE int linear8_columns(const linear8_job &job)
{
    return job.columns != nullptr ? load(job.n_columns) : 0;
}

// The sum over outlier columns for row j of x and row i of the stacked weight.
template <int IO>
HB_DEVICE float linear8_outliers(const linear8_job &job, int count, int64_t j, int64_t i)
{
    float sum = 0.0f;
    for (int o = 0; o < count; o++) {
        const int64_t k = load(job.columns + o);
        const float w = (float)load(job.a.codes + i * job.a.depth + k);
        sum = add_rn(sum, mul_rn(load_float<IO>(job.a.x, j * job.a.depth + k), w));
    }
    return sum;
}

// ---- the kernels (host) -------------------------------------------------------------------------

int hb_cuda_launch_linear8_simt(const hb_cuda_queue *queue, const linear8_job &job);
// The kernel for a few rows quantizes x itself where job.x_codes is NULL, which it can if `fuses`.
bool hb_cuda_linear8_few_fits(const hb_cuda_queue *queue, const hb_cuda_linear8 &a);
bool hb_cuda_linear8_few_fuses(const hb_cuda_linear8 &a);
int hb_cuda_launch_linear8_few(const hb_cuda_queue *queue, const linear8_job &job);
// The exact mode and gradients.
bool hb_cuda_linear8_wide_fits(const hb_cuda_queue *queue, const hb_cuda_linear8 &a);
int64_t hb_cuda_linear8_wide_workspace(const hb_cuda_linear8 &a);
int hb_cuda_launch_linear8_wide(const hb_cuda_queue *queue, const linear8_job &job);
// path: TILE, TILE_SMALL, or AUTO between these two.
bool hb_cuda_linear8_tile_fits(const hb_cuda_queue *queue, const linear8_job &job);
int hb_cuda_launch_linear8_tile(const hb_cuda_queue *queue, const linear8_job &job, int32_t path);

#endif
