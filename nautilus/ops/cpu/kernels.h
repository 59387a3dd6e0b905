// The plain C interface: what Python passes through ctypes, and the table of kernels that each level fills.
#pragma once

#include <stdint.h>

// Sizes of one Mamba-2 mixer call. B rows, T time, H heads, P head width, G groups, N state width, taps of the
// convolution, I = H P, C = I + 2 G N channels of the convolution. A token of the input is I + C + H numbers: z, xBC, dt.
struct MambaSizes {
  int64_t rows, time, heads, head_width, groups, state, taps, bf16;
  float eps;
};

// Parameters are float. Null where a call has none: tail, state (zeros), reach (all earlier tokens), y, borders.
struct MambaForward {
  MambaSizes sizes;
  const void* input;           // (B, T, I + C + H)
  const float* conv_weight;    // (C, taps)
  const float* conv_bias;      // (C)
  const float* dt_bias;        // (H)
  const float* a;              // (H), negative
  const float* skip;           // (H)
  const float* norm_weight;    // (I)
  const void* tail;            // (B, taps - 1, C): inputs of the convolution before the first token
  const float* state;          // (B, H, N, P)
  const int32_t* reach;        // (B, T): how many earlier tokens belong to the token's document
  void* output;                // (B, T, I)
  float* last_state;           // (B, H, N, P)
  float* y;                    // (B, T, I): the scan's output, kept for the backward
  float* borders;              // (B, chunks, H, N, P): the state before each chunk, kept for the backward
};

// What the backward reads beside the forward's record, and the gradients it writes. Those of parameters are apart for
// each row, to be summed: (B, C, taps), (B, C), (B, H), (B, H), (B, H), (B, I).
struct MambaBackward {
  MambaForward forward;
  const void* doutput;         // (B, T, I)
  const float* dlast_state;    // (B, H, N, P)
  void* dinput;
  float *dconv_weight, *dconv_bias, *ddt_bias, *da, *dskip, *dnorm_weight;
  float* dtail;                // (B, taps - 1, C); null: not wanted
  float* dstate;               // (B, H, N, P)
};

// Tokens between two kept states; the blocks of time in which the mixer works.
enum { MAMBA_CHUNK = 64 };
// Pieces of work of the other kernels: tokens, rows, numbers; and the most experts that a token may have.
enum { EXPERTS_BLOCK = 64, EXPERTS_ACTIVE = 64, NORM_BLOCK = 128, NVFP4_ROWS = 16, NVFP4_BLOCK = 64, SIGMOID_BLOCK = 4096 };

// Sizes of one call of the experts. R tokens, X width of an expert's input and output, F hidden width, E experts, K active.
// Z = R K token-expert pairs, sorted by expert: those of expert e are first[e] .. first[e + 1] - 1.
struct ExpertsSizes {
  int64_t tokens, width, hidden, experts, active, bf16, weights_bf16;
};

struct ExpertsForward {
  ExpertsSizes sizes;
  const void* x;         // (R, X), float or where `bf16` bf16, as are output, hidden and y
  const int64_t* index;  // (R, K)
  const float* weight;   // (R, K)
  const void *up, *down; // (E, F, X) and (E, X, F), float or where `weights_bf16` bf16
  void* output;          // (R, X)
  int32_t* first;        // (E + 1), written
  int32_t* pair;         // (Z), written: which (token, slot) each sorted pair is
  int32_t* place;        // (R, K), written: where each pair is
  void* hidden;          // (Z, F), written: up x before the activation
  void* y;               // (Z, X), written: the output of each pair
};

struct ExpertsBackward {
  ExpertsForward forward;
  const void* doutput;   // (R, X)
  void* dx;              // (R, X)
  float* dweight;        // (R, K)
  float *dup, *ddown;    // as up and down
};

// A matrix (outputs, inputs), packed for activations that are bf16 or float.
struct LinearPack {
  int64_t inputs, outputs, bf16, weight_bf16;
  const void* weight;
  void* packed;
};

// y (rows, outputs) = x (rows, inputs) W^T; x and y are both bf16 or both float.
struct LinearForward {
  int64_t rows, inputs, outputs, bf16;
  const void *x, *packed;
  void* y;
};

// NVFP4 in its released layout: codes (outputs, inputs / 2), two in a byte, the even one low; scale (outputs, inputs /
// 16), E4M3 without sign. Repacked for nvfp4_forward: sixteen rows beside each other, inputs rounded up to a multiple of
// 32, see nvfp4.cpp.
struct Nvfp4Pack {
  int64_t inputs, outputs;
  const uint8_t *codes, *scale;
  uint8_t *packed_codes, *packed_scale;
};

struct Nvfp4Forward {
  int64_t rows, inputs, outputs, wide;
  const void* x;  // (rows, inputs) bf16
  const uint8_t *packed_codes, *packed_scale;
  float tensor_scale;
  void* y;
  int8_t* q;      // scratch: (rows, padded inputs), activations as integers,
  float* q_scale; // (rows, padded inputs / 32),
  int32_t* q_sum; // (rows, padded inputs / 16): -12 times the sum of a block
};

// RMSNorm of rows: y = x / sqrt(mean(x^2) + eps) weight, in float32, rounded once.
struct NormForward {
  int64_t rows, width, bf16;
  const void* x;        // (rows, width)
  const float* weight;  // (width)
  void* y;
  float* scale;         // (rows), 1 / root mean square; may be null
  float eps;
};

struct NormBackward {
  NormForward forward;  // x, weight and scale are read
  const void* dy;
  void* dx;
  float* dweight;       // (blocks of NORM_BLOCK rows, width), to be summed
};

// y = 1 / (1 + e^-x), the same bits for the same x at any place: PyTorch's last few numbers of a tensor may differ from
// what they would be in the middle.
struct Sigmoid {
  int64_t count;
  const float* x;
  float* y;
};

// One level's kernels. Each source file fills in its own; which level it is compiled for is in its function's name.
struct Kernels {
  void (*mamba_forward)(const MambaForward*, int64_t item, void* scratch);  // item: row and group
  void (*mamba_backward)(const MambaBackward*, int64_t item, void* scratch);
  int64_t (*mamba_scratch)(const MambaSizes*, int backward);  // bytes one thread needs
  int (*experts_sort)(const ExpertsForward*);  // 2 when an index names no expert
  void (*experts_forward)(const ExpertsForward*, int64_t expert, void* scratch);
  void (*experts_backward)(const ExpertsBackward*, int64_t expert, void* scratch);
  // Adds up each token's pairs for a block of tokens: outputs times their weights, or gradients as they are.
  void (*experts_combine)(const ExpertsForward*, const void* pairs, void* output, int weighted, int64_t block);
  int64_t (*experts_scratch)(const ExpertsSizes*, int backward);
  void (*linear_pack)(const LinearPack*, int64_t panel);
  int64_t (*linear_packed_size)(const LinearPack*);  // bytes
  int64_t (*linear_panels)(int64_t outputs);
  int64_t (*linear_row_blocks)(int64_t rows);
  void (*linear_forward)(const LinearForward*, int64_t item);  // item: row block * panels + panel
  void (*nvfp4_pack)(const Nvfp4Pack*, int64_t panel);
  void (*nvfp4_quantise)(const Nvfp4Forward*, int64_t row);
  void (*nvfp4_forward)(const Nvfp4Forward*, int64_t item);
  void (*norm_forward)(const NormForward*, int64_t block);
  void (*norm_backward)(const NormBackward*, int64_t block);
  void (*sigmoid)(const Sigmoid*, int64_t block);
};

#define NAUTILUS_JOIN(a, b) a##_##b
#define NAUTILUS_NAME(a, b) NAUTILUS_JOIN(a, b)
#define NAUTILUS_FILL(file) NAUTILUS_NAME(fill_##file, NAUTILUS_LEVEL)
