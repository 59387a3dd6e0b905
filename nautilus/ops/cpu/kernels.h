// The plain C interface: what Python passes through ctypes, and the table of kernels that each level fills.
#pragma once

#include <stdint.h>

// Sizes of one Mamba-2 mixer call. B rows, T time (where the rows begin at places that the call says: the tokens of all of
// them), H heads, P head width, G groups, N state width, taps of the convolution, I = H P, C = I + 2 G N channels of the
// convolution. A token of the input is I + C + H numbers: z, xBC, dt.
// `window`: how many tokens a slot can keep beside its state; 0 where there is nothing beside it.
struct MambaSizes {
  int64_t rows, time, heads, head_width, groups, state, taps, window, bf16;
  float eps;
};

// Parameters are float. Null where a call has none: tail, state (zeros), reach (all earlier tokens), slot, begin, last_tail,
// y, borders, kept, pending. With `slot` tail, state, last_tail and last_state hold one entry per slot, and row b uses
// slot[b]; what is read and what is written may then be the same memory. With `begin` the tokens of row b are begin[b] ..
// begin[b + 1] - 1 of T, however many, and there are no `reach` and `borders`.
//
// Deferred fold. Tokens that may be taken back are run without a change of the state: a `tentative` call keeps of each
// what the state will need, its input of the convolution behind the tail's, the rest in `kept`, and leaves minus their
// number in `pending`. The caller puts there how many of them stay. The next call of any kind, which may have no tokens of
// its own, first folds those into tail and state.
struct MambaForward {
  MambaSizes sizes;
  const void* input;           // (B, T, I + C + H)
  const float* conv_weight;    // (taps, C)
  const float* conv_bias;      // (C)
  const float* dt_bias;        // (H)
  const float* a;              // (H), negative
  const float* skip;           // (H)
  const float* norm_weight;    // (I)
  const void* tail;            // (B, taps - 1 + window, C): inputs of the convolution before the first token
  const float* state;          // (B, H, N, P)
  const int32_t* reach;        // (B, T): how many earlier tokens belong to the token's document
  const int32_t* slot;         // (B)
  const int32_t* begin;        // (B + 1)
  void* output;                // (B, T, I)
  void* last_tail;             // as tail, up to the last token
  float* last_state;           // (B, H, N, P)
  float* y;                    // (B, T, I): the scan's output, kept for the backward
  float* borders;              // (B, chunks, H, N, P): the state before each chunk, kept for the backward
  int64_t slots;               // how many there are
  float* kept;                 // (slots, window, I + G N + H): dt x, b, and exp(dt a)
  int32_t* pending;            // (slots)
  int64_t tentative;           // a row has at most `window` tokens, and that is at most MAMBA_CHUNK

  int64_t first(int64_t row) const { return begin ? begin[row] : row * sizes.time; }  // of its tokens
  int64_t tokens(int64_t row) const { return first(row + 1) - first(row); }
};

// What the backward reads beside the forward's record, and the gradients it writes. Those of parameters are apart for
// each row, to be summed: (B, taps, C), (B, C), (B, H), (B, H), (B, H), (B, I).
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
// Pieces of work of the other kernels: tokens and columns, rows forward and backward, numbers; and the most experts that a
// token may have. Eight sequences make two pieces.
enum { EXPERTS_TOKENS = 4, EXPERTS_COLUMNS = 1024, EXPERTS_ACTIVE = 64, NORM_ROWS = 4, NORM_BLOCK = 128 };
enum { ROUTE_BLOCK = 4, ADD_BLOCK = 1 << 12, ROTARY_BLOCK = 16 };

// Sizes of one call of the experts. R tokens, X width of an expert's input and output, F hidden width, E experts, K active.
// Z = R K token-expert pairs, sorted by expert: those of expert e are first[e] .. first[e + 1] - 1. Where `packed` the
// matrices of the forward are laid out as nautilus_linear_pack does, one expert's after the other's.
struct ExpertsSizes {
  int64_t tokens, width, hidden, experts, active, bf16, weights_bf16, gated, packed;
};

struct ExpertsForward {
  ExpertsSizes sizes;
  const void* x;         // (R, X), float or where `bf16` bf16, as are output, hidden, gate_hidden and y
  const int64_t* index;  // (R, K)
  const float* weight;   // (R, K)
  const void *up, *down; // (E, F, X) and (E, X, F), float or where `weights_bf16` bf16
  const void* gate;      // as up; read where `gated`
  void* output;          // (R, X)
  int32_t* first;        // (E + 1), written
  int32_t* pair;         // (Z), written: which (token, slot) each sorted pair is
  int32_t* place;        // (R, K), written: where each pair is
  void* hidden;          // (Z, F), written: up x before the activation
  void* gate_hidden;     // (Z, F), written where `gated`: gate x
  void* y;               // (Z, X), written: the output of each pair
};

struct ExpertsBackward {
  ExpertsForward forward;
  const void* doutput;   // (R, X)
  void* dx;              // (R, X)
  float* dweight;        // (R, K)
  float *dup, *ddown, *dgate;  // as up, down and gate
};

// A matrix (outputs, inputs), packed for activations that are bf16 or float.
struct LinearPack {
  int64_t inputs, outputs, bf16, weight_bf16;
  const void* weight;
  void* packed;
};

// y (rows, outputs) = x (rows, inputs) W^T, or the square of its positive part, computed in bf16 or float. W is packed as
// bf16 or, not for bf16, as float; x may be bf16 where float is computed with, and y float where bf16 is.
struct LinearForward {
  int64_t rows, inputs, outputs, bf16, packed_bf16, x_bf16, y_bf16, squared_relu;
  const void *x, *packed;
  void* y;
};

// Number formats of matrices that are used as they are stored; see quant.cpp.
enum QuantFormat { QUANT_NVFP4, QUANT_MXFP4, QUANT_INT4, QUANT_INT8, QUANT_FP8 };
// Rows of W in a panel; outputs and rows of activations in an item of work; inputs whose activations have a scale in common.
enum { QUANT_ROWS = 16, QUANT_COLUMNS = 64, QUANT_BLOCK = 64, QUANT_GROUP = 32 };

// `count` matrices (outputs, inputs), repacked by quant_pack, one after the other in each of codes, scale and zero.
struct QuantMatrix {
  int64_t count, inputs, outputs, format;
  int64_t group;              // inputs with a scale in common, for INT4 and INT8: a multiple of 32, or all
  const uint8_t* codes;
  const void* scale;          // bytes for NVFP4 and MXFP4, else float
  const int32_t* zero;        // the code of 0 for each scale, for INT4; null: 8
  const float* tensor_scale;  // (count); null: 1
};

// `to.count` matrices as they are stored, each where its file has it, and where they go: codes (outputs, inputs), two in a
// byte where they have four bits, the even one low, in rows of whole bytes; scale (outputs, inputs / group), zero likewise
// in bytes or null.
struct QuantPack {
  QuantMatrix to;
  const uint8_t *const *codes, *const *zero;
  const void* const* scale;
};

// Rows of activations as int8, with a scale for 32 neighbours.
struct QuantRows {
  int64_t rows, inputs, format, bf16;
  const void* x;   // (rows, inputs), bf16 or float
  int8_t* q;       // (rows, inputs rounded up to a multiple of 32)
  float* scale;    // (rows, groups)
  int32_t* sum;    // (rows, groups or twice as many): the sum of what shares a scale of W, times minus the code of 0
};

// Some neighbouring rows of y that meet the same matrix; at most QUANT_BLOCK.
struct QuantSpan {
  int32_t matrix, row, rows;
};

// y[r] = x[source[r]] W^T, or the square of its positive part. Activations are int8, bf16 where W is in FP8.
struct QuantForward {
  QuantMatrix w;
  int64_t span_count, wide, squared_relu;
  const QuantSpan* spans;
  const int32_t* source;  // null: r itself
  int64_t per_source;     // source counts pairs of this many to a row of x
  const void* x;
  const int8_t* q;
  const float* q_scale;
  const int32_t* q_sum;
  void* y;                // float where `wide`, else bf16
};

// y = x W^T, or the square of its positive part; x (rows, inputs) in bf16, y in float where `wide`, else bf16.
struct QuantLinear {
  QuantMatrix w;
  int64_t rows, wide, squared_relu;
  const void* x;
  void* y;
};

// Experts, each matrix of all of them in one format, up and gate in the same. Of `pairs` the caller gives sizes, x, index,
// weight and output; all numbers are bf16. `gate` is read where the sizes say that they are gated.
struct QuantExperts {
  ExpertsForward pairs;
  QuantMatrix up, down, gate;
};

// RMSNorm of rows: y = x / sqrt(mean(x^2) + eps) weight, in float32, rounded once.
struct NormForward {
  int64_t rows, width, pitch, bf16;
  const void* x;        // (rows, width)
  const float* weight;  // (width)
  void* y;              // its rows begin `pitch` numbers apart
  float* scale;         // (rows), 1 / root mean square; may be null
  float eps;
};

struct NormBackward {
  NormForward forward;  // x, weight and scale are read
  const void* dy;
  void* dx;
  float* dweight;       // (blocks of NORM_BLOCK rows, width), to be summed
};

// y = a + b.
struct Add {
  int64_t count, bf16;
  const void *a, *b;
  void* y;
};

// y[r] = table[index[r]].
struct Embed {
  int64_t rows, width, vocab, table_bf16, bf16;
  const int64_t* index;
  const void* table;
  void* y;
};

// y = silu(gate) up, computed in float32 and rounded once; y may be bf16 where the others are float.
struct Swiglu {
  int64_t count, bf16, y_bf16;
  const void *gate, *up;
  void* y;
};
struct SwigluBackward {
  Swiglu forward;  // gate and up are read
  const void* dy;
  void *dgate, *dup;
};

// Rotary positions: each pair (x_i, x_{i + P/2}) turned by position times frequency_i radians. With the frequencies negated
// this is its own backward.
struct Rotary {
  int64_t tokens, heads, width, bf16;
  const int64_t* position;  // (tokens)
  const double* frequency;  // (P / 2)
  const void* x;            // (tokens, H, P)
  void* y;
};

// The router. score = sigmoid(logits), or softmax; the `active` largest score + bias are chosen, where there are groups of
// experts only from the `active_groups` whose two best add up highest; weight = scale score / (sum of the chosen + 1e-20).
// Chosen experts come in ascending order; of equals the first is chosen.
struct Route {
  int64_t tokens, experts, active, groups, active_groups, softmax, normalise;
  float scale;
  const float* logits;  // (tokens, experts)
  const float* bias;    // (experts); may be null
  float* score;         // (tokens, experts)
  int64_t* index;       // (tokens, active)
  float* weight;        // (tokens, active)
};

// best: the first of the largest logits; total = log sum exp logits, NaN where one of them is NaN or infinity, or none is a number.
struct Peak {
  int64_t rows, vocab;
  const float* logits;  // (rows, vocab)
  int64_t* best;        // (rows)
  double* total;        // (rows)
};

// token: of each row, the first at which the cumulated exp((logit - largest) / temperature) exceed their sum times a
// number in [0, 1) that depends on seed and position alone.
struct Draw {
  int64_t rows, vocab;
  const float* logits;        // of the first row
  const int64_t* at;          // (rows): where those of each row begin, from there
  const int64_t* best;        // (rows), of the largest logits
  const double* temperature;  // (rows), positive
  const uint64_t* seed;       // (rows)
  const uint64_t* position;   // (rows)
  int64_t* token;             // (rows)
};

// Reads memory, to see how fast that goes; `sum` is of no use but that it cannot be left out.
struct ReadAll {
  const int64_t* memory;
  int64_t count;
  int64_t ahead;    // bytes that are fetched ahead, 0: left to the processor
  int64_t sum[64];  // of the threads
};
enum { READ_BLOCK = 1 << 17, READ_THREADS = 64 };

struct ReplayEntry {
  int (*function)(const void* arguments, int threads);
  const void* arguments;
};
struct Replay {
  const ReplayEntry* entries;
  int64_t count, failed;
};

// Keys and values of one attention layer in pages of KV_PAGE tokens, and where the new tokens of a call lie in them.
// The tokens of B rows follow each other: those of row r are begin[r] .. begin[r + 1] - 1 and stand at its last
// positions. What a page looks like is said in attention.cpp. Positions are worked on in tiles of KV_TILE.
enum { KV_PAGE = 16, KV_TILE = 64 };
enum { KV_F32, KV_BF16, KV_FP8, KV_INT8 };

struct KvPages {
  int64_t rows, groups, width, format;
  int64_t tokens, pages, most;  // of the call, of the pool, of a row
  const int32_t* begin;   // (B + 1)
  const int32_t* length;  // (B): positions of each row, new tokens included
  const int32_t* table;   // (B, most): the page that holds positions 16 i .. 16 i + 15
  uint8_t *keys, *values; // (pages, G, bytes of a page)
};

// The position of every new token of such a call.
struct Positions {
  int64_t rows, tokens;
  const int32_t *begin, *length;
  int64_t* position;  // (tokens)
};

struct KvWrite {
  KvPages at;
  int64_t bf16;
  const void *k, *v;      // (tokens, G, P), bf16 or float
  float k_scale, v_scale; // fp8: what a code of 1 stands for
};

// Keys of token t are visible from first[t] on, and among the last `window` positions where that is not 0.
struct AttentionForward {
  KvPages at;
  int64_t heads, window, parts;  // parts: pieces of work that the heads of a group are cut into
  const void* q;                 // (tokens, H, P), float for pages of float, else bf16
  const int32_t* first;          // (tokens); null: zeros
  void* out;                     // (tokens, H, P) as q
  float* lse;                    // (tokens, H): log of the sum of exp of all scores; null: not wanted
  float scale, v_scale;          // of scores and of outputs
};

// Queries are the last T of S positions. A row is a query and a head of one group: there are T H / G for each batch row
// and group. A block of rows meets a tile of keys; slabs are blocks of rows, strips tiles of keys. `sums` begins as zeros.
enum { ATTENTION_BLOCK = 48, ATTENTION_TILE = 48, ATTENTION_PAD = 16 };

struct AttentionBackward {
  int64_t rows, time, positions, heads, groups, width, window, bf16, strip, slab;
  const void *q, *k, *v, *out, *dout;  // (B, T, H, P), (B, S, G, P), bf16 or float, as are the gradients
  const float* lse;                    // (B, T, H)
  const int32_t* first;                // (B, T); null: zeros
  void *dq, *dk, *dv;
  float* sums;   // (B, G, strips, 2, strip, P rounded up to a multiple of ATTENTION_PAD)
  float* parts;  // (B, G, strips, slab, as many)
  float scale;
};

// Low-precision training; see lowbit.cpp. Rows come in groups, those of group g are first[g] .. first[g + 1] - 1: the
// tokens of an expert, or one group of all. Blocks start at a group's first row.
enum { LOWBIT_NVFP4, LOWBIT_MXFP8 };
enum { LOWBIT_ROWS, LOWBIT_COLUMNS, LOWBIT_TILES };  // what lies in a block: neighbours of a row, of a column, 16 x 16
enum { LOWBIT_FORWARD, LOWBIT_INPUTS, LOWBIT_WEIGHTS };
enum { LOWBIT_BLOCK = 192, LOWBIT_TOP = 2688 };  // rows worked on at a time; the largest value of NVFP4, 6 x 448

// y = the values of x in a format, without the tensor scale, which is top / LOWBIT_TOP. Groups have multiples of 16 rows where they
// are turned by Hadamard's matrix, and even numbers where the result is zipped: rows in twos, as products over rows want it.
struct LowBit {
  int64_t groups, columns, bf16, format, axis, turn, stochastic, zipped, known;  // known: top is given
  int64_t seed, step, stream, first_row, first_group;  // where the random bits lie that are drawn
  const int64_t* blocks;                  // and which block each 16 columns are of all; null: as they lie
  const int64_t* first;                   // (groups + 1)
  const void* x;                          // (rows, columns), bf16, or float that is rounded to bf16 first
  const uint8_t* bits;                    // as x, random bits to use instead; null: drawn
  uint16_t* y;                            // as x; null: only top is found
  float* top;                             // (groups): the largest magnitude; NaN where x is not finite; MXFP8: LOWBIT_TOP
  int64_t flushed;                        // written: numbers that were not zero and became zero
};

struct LowBitSpan {
  int64_t group, row, rows;
};

// forward: y = a b^T, a (rows, inputs), b (groups, outputs, inputs). inputs: y = a b, a (rows, outputs), b as before.
// weights: y = a^T b for each group, a (rows, outputs) and b (rows, inputs) zipped. Times both tensor scales; null: 1.
struct LowBitProduct {
  int64_t groups, outputs, inputs, kind, wide;
  const int64_t* first;
  const uint16_t *a, *b;
  const float *a_top, *b_top;  // (groups)
  void* y;                         // float where `wide`, else bf16
};

// One level's kernels. Each source file fills in its own; which level it is compiled for is in its function's name.
struct Kernels {
  void (*mamba_forward)(const MambaForward*, int64_t item, void* scratch);  // item: row and group
  void (*mamba_backward)(const MambaBackward*, int64_t item, void* scratch);
  int64_t (*mamba_scratch)(const MambaSizes*, int backward);  // bytes one thread needs
  int (*experts_sort)(const ExpertsForward*);  // 2 when an index names no expert
  void (*experts_forward)(const ExpertsForward*, int64_t expert, void* scratch);
  void (*experts_backward)(const ExpertsBackward*, int64_t expert, void* scratch);
  // Adds up the pairs of some tokens in some columns: outputs times their weights, or gradients as they are.
  void (*experts_combine)(const ExpertsForward*, const void* pairs, void* output, int weighted, int64_t item);
  int64_t (*experts_scratch)(const ExpertsSizes*, int backward);
  void (*linear_pack)(const LinearPack*, int64_t panel);
  int64_t (*linear_packed_size)(const LinearPack*);  // bytes
  int64_t (*linear_panels)(int64_t outputs);
  int64_t (*linear_row_blocks)(int64_t rows);
  void (*linear_forward)(const LinearForward*, int64_t item);  // item: row block * panels + panel
  int64_t (*quant_codes)(const QuantMatrix*);   // bytes of the codes of one repacked matrix,
  int64_t (*quant_scales)(const QuantMatrix*);  // and how many scales it has
  void (*quant_pack)(const QuantPack*, int64_t item);  // item: matrix * column blocks + column block
  void (*quant_rows)(const QuantRows*, int64_t row);
  void (*quant_forward)(const QuantForward*, int64_t item);  // item: span * column blocks + column block
  void (*norm_forward)(const NormForward*, int64_t block);
  void (*norm_backward)(const NormBackward*, int64_t block);
  void (*add)(const Add*, int64_t block);
  void (*embed)(const Embed*, int64_t row);
  void (*swiglu)(const Swiglu*, int64_t block);
  void (*swiglu_backward)(const SwigluBackward*, int64_t block);
  void (*rotary)(const Rotary*, int64_t block);
  void (*peak)(const Peak*, int64_t row);
  void (*draw)(const Draw*, int64_t row);
  void (*route)(const Route*, int64_t block, void* scratch);
  int64_t (*route_scratch)(const Route*);
  int (*kv_check)(const KvWrite*);  // 2 when a page, a length or a document lies outside
  void (*kv_write)(const KvWrite*, int64_t item, void* scratch);  // item: row and group
  int64_t (*kv_scratch)(const KvWrite*);
  int (*attention_check)(const AttentionForward*);  // as kv_check
  int64_t (*attention_items)(const AttentionForward*);
  void (*attention_forward)(const AttentionForward*, int64_t item, void* scratch);
  int64_t (*attention_scratch)(const AttentionForward*);
  // item: (batch row, group, strip), against the slab that begins with row `from`
  void (*attention_backward_piece)(const AttentionBackward*, int64_t item, int64_t from, void* scratch);
  int64_t (*attention_backward_scratch)(const AttentionBackward*);
  void (*attention_backward_queries)(const AttentionBackward*, int64_t item, int64_t from);  // item: ..., block of slab
  void (*attention_backward_keys)(const AttentionBackward*, int64_t item);  // item: (batch row, group, strip)
  uint32_t (*lowbit_largest)(const LowBit*, const LowBitSpan*);  // bits of the largest magnitude
  int64_t (*lowbit_round)(const LowBit*, const LowBitSpan*, float amax);
  int64_t (*lowbit_panels)(const LowBitProduct*);
  int64_t (*lowbit_packed)(const LowBitProduct*);  // numbers of one packed weight matrix
  void (*lowbit_pack)(const LowBitProduct*, int64_t group, int64_t panel, uint16_t* to);
  void (*lowbit_rows)(const LowBitProduct*, const LowBitSpan*, int64_t panel, const uint16_t* packed);
  int64_t (*lowbit_scratch)(const LowBitProduct*);
  void (*lowbit_outer)(const LowBitProduct*, int64_t group, int64_t panel, void* scratch);
};

#define NAUTILUS_JOIN(a, b) a##_##b
#define NAUTILUS_NAME(a, b) NAUTILUS_JOIN(a, b)
#define NAUTILUS_FILL(file) NAUTILUS_NAME(fill_##file, NAUTILUS_LEVEL)
