// The C ABI of mxdit's CPU kernels, and all that src/mxdit/backends/native.py and cpu.py know of them.
//
// What is computed is docs/numerics.md; the reference in torch (src/mxdit/numerics/codec.py, reference.py) gives the same bits.
// Matrices are row-major with the last axis contiguous; `stride` counts elements from row to row. Packed operands are in
// the canonical layout: FP4 codes (rows, K/2) with element 2i in the low nibble, FP8 codes (rows, K), E8M0 scales
// (rows, ceil(K/32)), outer scales fp32 (rows, ceil(K/512)). Arguments are the caller's to check.
#pragma once
#include <stdint.h>

#define MX_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum MxDtype { MX_BF16, MX_FP16, MX_FP32 };
enum MxFormat { MX_FP4, MX_FP8, MX_FLOAT };  // MX_FLOAT: activations that are not quantized
enum MxRule { MX_OCP, MX_UOS, MX_EVEN6, MX_EVEN7, MX_CUBLAS };
enum MxRound { MX_RINT, MX_ROUND, MX_FLOOR };
enum MxMask { MX_NO_MASK = -1, MX_BOOL_MASK = 3 };  // or an MxDtype: added to the logits
enum MxAttend { MX_EXACT, MX_INT8 };

// How x (rows, k) becomes codes and scales.
typedef struct {
  const void* x;          // of x_dtype
  int64_t rows, k, x_stride;
  int32_t x_dtype, format, rule, round;
  const float* mul_scale;  // (k), holding values of x_dtype, or NULL
  uint8_t* codes;
  uint8_t* scale;
  float* outer;  // not NULL: two scale levels
} MxEncode;

// Packed (rows, k) to values.
typedef struct {
  const uint8_t *codes, *scale;
  const float* outer;  // or NULL
  int64_t rows, k;
  int32_t format, out_dtype;
  void* out;  // (rows, k)
} MxDecode;

// out (m, n) = activations (m, k) times weights (n, k), transposed, plus bias. The activations come as x, to be encoded
// as `a_format`, `rule` and mul_scale say (a_format MX_FLOAT: multiplied as they are), or packed, with x NULL.
typedef struct {
  int64_t m, n, k, x_stride;
  const void* x;
  const float* mul_scale;
  const uint8_t *a_codes, *a_scale;
  const float* a_outer;
  const uint8_t *w_codes, *w_scale;
  const float* w_outer;  // not NULL: the sum runs over groups of 512, each with its outer scales
  const void* bias;      // (n) of bias_dtype, or NULL
  void* out;
  int32_t x_dtype, a_format, rule, w_format, bias_dtype, out_dtype;
  int32_t a_dual;  // x is encoded with two scale levels
} MxLinear;

// out (batch, queries, heads, v_width), contiguous, = softmax(scale q k^T + mask) v. q is (batch, queries, heads, width), k
// (batch, keys, kv_heads, width), v (batch, keys, kv_heads, v_width), all of `dtype`. Strides count elements from batch to
// batch, token to token and head to head; the last axis is contiguous.
typedef struct {
  int64_t batch, queries, keys, heads, kv_heads, width, v_width;
  const void *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  const void* mask;         // of mask_dtype; bool as bytes, 1 where a key takes part
  int64_t mask_strides[4];  // of batch, head, query and key; 0 where it is broadcast
  void* out;
  float scale;
  int32_t dtype, mask_dtype, causal, method;
} MxAttention;

// out = rows of x over their root mean square, times weight, then, with cos and sin, each pair (2i, 2i + 1) of each `head`
// numbers turned. Rows of one token follow each other, `token_rows` of them, tokens too, `tokens` of them. out may be x.
typedef struct {
  int64_t rows, width, x_stride, out_stride;
  const void* x;        // of `dtype`, as out
  const float* weight;  // (width)
  const float *cos, *sin;  // (tokens, head), or NULL: head is width then
  void* out;
  int64_t head, tokens, token_rows;
  float eps;
  int32_t dtype, rounded;  // rounded: to `dtype` before the weight, too
} MxRmsNorm;

// x = GELU of x, in the approximation by tanh.
typedef struct {
  void* x;
  int64_t count;
  int32_t dtype;
} MxGelu;

// Names of the instruction set paths that this CPU runs, best first, separated by blanks.
MX_API const char* mx_paths(void);
// Use that path from now on, or, for NULL, the best; 0, or -1 for one that this CPU does not run.
MX_API int mx_select(const char* path);
MX_API const char* mx_selected(void);

MX_API void mx_encode(const MxEncode* job, int threads);
MX_API void mx_decode(const MxDecode* job, int threads);
// 0, or -1 where memory ran out.
MX_API int mx_linear(const MxLinear* job, int threads);
// Likewise.
MX_API int mx_attention(const MxAttention* job, int threads);
MX_API void mx_rms_norm(const MxRmsNorm* job, int threads);
MX_API void mx_gelu(const MxGelu* job, int threads);

#ifdef __cplusplus
}
#endif
