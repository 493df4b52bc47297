// The operations of halfbyte, for the bindings and for C callers. Each validates its arguments
// once, chooses the kernels, splits the work over the pool and returns a status; none touches
// Python.
//
// x, y, dx, dy are views with any strides. Flat arrays (codes, absmax, ...) are contiguous.
//
// On CUDA the views are contiguous, and every array of a call, also those given as plain pointers,
// is memory of the device that x (out, dy; `device` where there is no view) names. The call starts
// kernels on that view's stream and returns without waiting for them; nothing is read on the host,
// so that values are not checked (maps). ops_cuda.h says which calls need a workspace.
//
// bitsandbytes layout: codes of the row-major flattened tensor, two per byte, even index in the
// high nibble; block b covers elements [b*blocksize, (b+1)*blocksize), across row ends where depth
// is no multiple of blocksize; the last block may be shorter.
#ifndef HB_CORE_OPS_H
#define HB_CORE_OPS_H

#include "core/formats.h"
#include "core/kernels.h"
#include "core/optim.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"
#include "core/view.h"

// What every operation needs. Owned by the extension module's state.
typedef struct {
    hb_kernels kernels;
    hb_pool *pool;
    hb_scratch_store *scratch;
    uint32_t cpu_flags;
    hb_codebook_int rounded[HB_CODEBOOK_COUNT][2]; // of each format, to int16 and to int8
} hb_context;

// Fills kernels and starts the pool object. threads <= 0: automatic. On failure nothing is left to
// clear.
hb_status hb_context_init(hb_context *context, uint32_t cpu_flags, int threads, hb_error *error);
void hb_context_clear(hb_context *context);

// ---- 4-bit codebook formats (ops_4bit.c) ------------------------------------------------------

typedef enum { HB_SCALES_ABSMAX = 0, HB_SCALES_SEARCH = 1 } hb_scales;

// A quantized tensor of `numel` elements; rows * depth == numel when it is used as a matrix.
// Scales are float32 in `absmax`, or nested: absmax_codes[i] is an index into nested_map, and
// absmax[i] = nested_map[absmax_codes[i]] * nested_absmax[i / nested_blocksize] + nested_offset.
typedef struct {
    hb_format4 format;
    int64_t blocksize;
    int64_t numel, rows, depth;
    const uint8_t *packed; // [(numel + 1) / 2]
    const float *absmax;   // [ceil(numel / blocksize)], or NULL when nested
    const uint8_t *absmax_codes;
    const float *nested_absmax; // [ceil(n_blocks / nested_blocksize)]
    const float *nested_map;    // [256]
    float nested_offset;
    const float *nested_offset_at; // CUDA: [1] in device memory, in place of the value; or NULL
    int64_t nested_blocksize;
    hb_device device; // of all of them; its stream is nobody's
} hb_tensor4;

// x: any shape, float32/bfloat16/float16. packed [(n + 1) / 2], absmax [ceil(n / blocksize)].
// The missing low nibble of an odd n is the code of 0.0 (NF4 7, FP4 0).
// HB_SCALES_SEARCH: see scale search in docs/numerics.md.
hb_status hb_quantize_4bit(hb_context *context, const hb_view *x, hb_format4 format,
                           int64_t blocksize, hb_scales scales, uint8_t *packed, float *absmax,
                           hb_error *error);
// Elements [start, start + numel(out)) of w in row-major order into out (float32/bf16/f16).
hb_status hb_dequantize_4bit(hb_context *context, const hb_tensor4 *w, int64_t start,
                             const hb_view *out, hb_error *error);
// Double quantization of n absmax values: offset = mean; codes and nested_absmax [ceil(n / 256)] of
// absmax - offset with the signed dynamic map, block size `nested_blocksize`.
// `map` is that map. On CUDA it and offset [1] are device memory, too.
hb_status hb_nest_absmax(hb_context *context, const hb_device *device, const float *absmax,
                         int64_t n, int64_t nested_blocksize, const float *map, uint8_t *codes,
                         float *nested_absmax, float *offset, void *workspace, hb_error *error);
// Scales of blocks [first, first + n) as float32, whatever their storage. Memory of the CPU.
void hb_expand_absmax(const hb_context *context, const hb_tensor4 *w, int64_t first, int64_t n,
                      float *absmax);

// ---- y = x W^T + b, 4-bit W (linear_4bit.c) ---------------------------------------------------

// How products are formed. FLOAT32: x and codebook in float32, float32 accumulation. BFLOAT16: x
// and codebook entries rounded to bfloat16 (what a bfloat16 dense layer would see), float32 sums.
// INT16, INT8: x in integers with a scale for 64 columns, the codebook in integers
// (kernels_linear4.h has the arithmetic and the bound); forward only, dx is that of FLOAT32. Exact
// as FLOAT32 where depth is no multiple of 32, and for many rows of x where that is faster (INT16)
// or blocks are shorter than 64.
// On CUDA (FLOAT32 and BFLOAT16 only) the dtype of x decides instead: FLOAT32 for float32, and for
// the 16-bit dtypes as BFLOAT16 says, rounded to that dtype.
typedef enum {
    HB_COMPUTE_F32 = 0,
    HB_COMPUTE_BF16 = 1,
    HB_COMPUTE_I16 = 2,
    HB_COMPUTE_I8 = 3
} hb_compute;

// x [..., depth], y [..., rows] of the same leading shape; bias [rows] or NULL, any io dtype each.
hb_status hb_linear_4bit(hb_context *context, const hb_view *x, const hb_tensor4 *w,
                         const hb_view *bias, hb_compute compute, const hb_view *y, void *workspace,
                         hb_error *error);
// What hb_linear_4bit gives for each of n weights of one depth, to the bit. Where x has few rows it
// is permuted once and all weights are read in one parallel loop. The CPU's memory only.
enum { HB_LINEAR4_MAX_ITEMS = 4 };
typedef struct {
    const hb_tensor4 *w;
    const hb_view *bias, *y; // bias may be NULL
} hb_linear4_item;
hb_status hb_linear_4bit_group(hb_context *context, const hb_view *x, int n,
                               const hb_linear4_item *items, hb_compute compute, hb_error *error);
// dx = dy W: dy [..., rows], dx [..., depth].
hb_status hb_linear_4bit_grad_input(hb_context *context, const hb_view *dy, const hb_tensor4 *w,
                                    hb_compute compute, const hb_view *dx, void *workspace,
                                    hb_error *error);

// ---- y = x W^T + b, plain W (linear_dense.c) --------------------------------------------------

// For few rows of x: any number is right, but only some, hb_kernels_dense.until, are fast. x [...,
// depth], w [rows, depth] with contiguous rows at any distance, y [..., rows], all of one dtype;
// bias [rows] of any io dtype, or NULL. float32 sums (kernels_dense.h has the bound), the bias
// added, one rounding to y's dtype. The CPU's memory only.
hb_status hb_linear_dense(hb_context *context, const hb_view *x, const hb_view *w,
                          const hb_view *bias, const hb_view *y, hb_error *error);

// ---- what lies between the products (ops_fused.c) ----------------------------------------------

// All views have one io dtype, lie in the CPU's memory, and are contiguous in their last dimension.

// y = w round(x / sqrt(mean(x^2) + eps)) over the last dimension; x and y [..., n], w [n]. The mean
// is summed in float64 and rounded to float32, as are eps, the square root, its inverse and the
// product with x; that and the product with w are rounded to the dtype.
hb_status hb_rms_norm(hb_context *context, const hb_view *x, const hb_view *w, float eps,
                      const hb_view *y, hb_error *error);
// y = round(f(gate)) up, elementwise; rounded to the dtype after f and after the product. One
// shape.
hb_status hb_gate(hb_context *context, const hb_view *gate, const hb_view *up, hb_activation f,
                  const hb_view *y, hb_error *error);
// y = round(x cos) + round(rotated(x) sin), rounded, with rotated(x) = (-second half, first half)
// of the last dimension: x and y [batch, heads, 1, depth], depth even; cos, sin [1 or batch, 1,
// depth].
hb_status hb_rotate(hb_context *context, const hb_view *x, const hb_view *cosine,
                    const hb_view *sine, const hb_view *y, hb_error *error);
// Attention of one token to `length` others: y[b, 0, h] = sum_t p[t] v[b, g, t], p = softmax_t of
// scale q[b, h, 0] . k[b, g, t], g = h / (heads / groups). q [batch, heads, 1, depth], k [batch,
// groups, length, depth], v the same, y [batch, 1, heads, depth]; heads a multiple of groups.
// float32 throughout, one rounding; dot products as in kernels_dense.h.
hb_status hb_attend(hb_context *context, const hb_view *q, const hb_view *k, const hb_view *v,
                    float scale, const hb_view *y, hb_error *error);

// ---- parts of a transformer block, 4-bit W (ops_block.c) ---------------------------------------

// Their results are those of the operations named, one after the other, to the bit; what lies
// between has the dtype of x. Weights and views in the CPU's memory, biases may be NULL, y of an
// item is not used unless said.

// y = down(round(f(gate(x))) up(x)): x [..., n], y [..., rows of down]. hb_linear_4bit_group,
// hb_gate, hb_linear_4bit.
hb_status hb_mlp_4bit(hb_context *context, const hb_view *x, const hb_linear4_item *gate,
                      const hb_linear4_item *up, const hb_linear4_item *down, hb_activation f,
                      hb_compute compute, const hb_view *y, hb_error *error);
// q, k and v of one token a sequence, q and k rotated: x [batch, 1, n], items q, k, v whose y is
// [batch, heads, 1, depth], contiguous, each with its number of heads. hb_linear_4bit_group,
// hb_rotate.
hb_status hb_qkv_4bit(hb_context *context, const hb_view *x, const hb_linear4_item *items,
                      const hb_view *cosine, const hb_view *sine, hb_compute compute,
                      hb_error *error);
// y = out(attend(q, k, v)): as hb_attend; y [batch, 1, rows of out]. hb_attend, hb_linear_4bit.
hb_status hb_attend_4bit(hb_context *context, const hb_view *q, const hb_view *k, const hb_view *v,
                         float scale, const hb_linear4_item *out, hb_compute compute,
                         const hb_view *y, hb_error *error);

// ---- 8-bit block-wise with a 256-entry map (ops_8bit.c) ---------------------------------------

typedef enum {
    HB_MAP_DYNAMIC,
    HB_MAP_DYNAMIC_UNSIGNED,
    HB_MAP_LINEAR,
    HB_MAP_FP8_E4M3,
    HB_MAP_FP8_E5M2,
    HB_MAP_NORMAL,
    HB_MAP8_COUNT
} hb_map8;
// Fills map[256] (ascending).
void hb_map8_fill(hb_map8 which, float *map);
int hb_map8_from_name(const char *name); // -1 when unknown

// map: 256 finite ascending values (HB_ERR_VALUE otherwise). codes [n], absmax [ceil(n/blocksize)].
// Any blocksize >= 1. Nearest entry of x * hb_inverse_scale(absmax); a tie goes to the even index.
hb_status hb_quantize_8bit(hb_context *context, const hb_view *x, const float *map,
                           int64_t blocksize, uint8_t *codes, float *absmax, hb_error *error);
hb_status hb_dequantize_8bit(hb_context *context, const uint8_t *codes, const float *absmax,
                             const float *map, int64_t blocksize, const hb_view *out,
                             hb_error *error);

// ---- row-wise int8, LLM.int8() (ops_int8.c, linear_8bit.c) ------------------------------------

// x [rows, depth] (leading dimensions are flattened). codes = rint(x * 127/absmax) (half to even),
// scale[row] = absmax. threshold > 0: elements with |x| >= threshold take no part in absmax and are
// stored as 0; outlier_columns [depth] bool marks their columns, and when there is more than one
// row whole columns are stored as 0. outlier_columns may be NULL when threshold is 0.
hb_status hb_quantize_rows_int8(hb_context *context, const hb_view *x, float threshold,
                                int8_t *codes, float *scale, uint8_t *outlier_columns,
                                hb_error *error);
// out[r, k] = codes[r, k] * scale[r] / 127.
hb_status hb_dequantize_rows_int8(hb_context *context, const int8_t *codes, const float *scale,
                                  const hb_view *out, hb_error *error);
// c[m, n] = sum_k a[m, k] b[n, k], exact int32 (depth <= 131072 checked).
hb_status hb_matmul_int8(hb_context *context, const hb_device *device, const int8_t *a,
                         const int8_t *b, int64_t m, int64_t n, int64_t depth, int32_t *c,
                         hb_error *error);

// w codes [rows, depth], scale [rows]. HB_INT8_DYNAMIC is LLM.int8(): x is quantized row-wise,
// outlier columns (threshold > 0) are multiplied in float32. HB_INT8_EXACT: float32 x times the
// dequantized weight. float32 epilogue, rounded once to y's dtype.
hb_status hb_linear_8bit(hb_context *context, const hb_view *x, const int8_t *codes,
                         const float *scale, int64_t rows, int64_t depth, const hb_view *bias,
                         hb_int8_mode mode, float threshold, const hb_view *y, void *workspace,
                         hb_error *error);
hb_status hb_linear_8bit_grad_input(hb_context *context, const hb_view *dy, const int8_t *codes,
                                    const float *scale, int64_t rows, int64_t depth,
                                    const hb_view *dx, void *workspace, hb_error *error);

// ---- optimizer steps (ops_optim.c) ------------------------------------------------------------

// One step for every tensor of the list, in one parallel loop. map1 (signed) and map2 [256] are
// needed when some state is 8-bit. With 8-bit states an element whose gradient is not finite is
// left alone and its states are set to zero; with float32 states NaN and infinity propagate. Weight
// decay is decoupled (AdamW) for Adam, AdEMAMix and Lion, and added to the gradient for the others.
hb_status hb_optimizer_step(hb_context *context, const hb_device *device, hb_optimizer optimizer,
                            const hb_optim_tensor *tensors, int64_t count,
                            const hb_optim_settings *settings, const float *map1, const float *map2,
                            void *workspace, hb_error *error);

// ---- what the machine can do (ruler.c) --------------------------------------------------------

// Reads `bytes`, rounded down to whole pieces of HB_RULER_PIECE, once and as fast as the pool's
// threads can; returns the sum of their 64-bit words.
#define HB_RULER_PIECE (1 << 18)
uint64_t hb_read_memory(hb_context *context, const void *data, int64_t bytes);

typedef enum { HB_RULER_F32, HB_RULER_BF16, HB_RULER_INT8 } hb_ruler_kind;
// Multiply-adds in registers: `calls` pieces of work, each of some ten thousand vector
// instructions. Returns the operations, a multiply-add counted as two; 0, without doing anything,
// where no instruction multiplies this kind.
int64_t hb_multiply_adds(hb_context *context, hb_ruler_kind kind, int64_t calls);

#endif
