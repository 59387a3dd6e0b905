// y = x W^T with W in few bits, used as it is stored: value(code) * block scale * tensor scale.
//
// NVFP4, MXFP4, INT4, INT8: activations are rounded to int8 with one scale a_g for each group g of 32 neighbours, so that
// products within a block are exact integers; a block scale is exact in float32. Each output is one chain over its groups:
//
//     y = s2 sum_g a_g sum_{blocks b of g} s_b sum_{k in b} value(code_k) q_k
//
// Codes become unsigned bytes, as dot-product instructions want them: a table adds `ZERO` to each (doubled where there are
// halves), and a block's sum starts at -ZERO times the sum of its activations.
//
// FP8: every E4M3 number is a bf16 number. A part of W is decoded where the cache is near and multiplied as gemm.h does.
//
// Repacked weights put sixteen rows, a panel, beside each other. Four bits: a unit of 32 inputs is 256 bytes; byte 64 j + 4 r
// + i (j = 0..3; row r; i = 0..3) holds input 8 j + i in its low half and 8 j + 4 + i in its high half. Eight bits: 512 bytes;
// byte 64 j + 4 r + i holds input 4 j + i. FP8: a unit of four inputs is 64 bytes; byte 16 (r / 4) + 8 h + 2 (r % 4) + i holds
// input 2 h + i, so that interleaving with the second byte of each number leaves pairs of inputs in the order of the rows.
// The units of four panels follow each other, so that a work item reads its 64 rows as one stream; so do their scales.
#include "gemm.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;
constexpr int ROWS = QUANT_ROWS, VECTORS = ROWS / W, PANELS = QUANT_COLUMNS / ROWS;
constexpr int64_t GROUP = QUANT_GROUP;

int64_t groups(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }
int64_t block_count(int64_t outputs) { return (outputs + QUANT_COLUMNS - 1) / QUANT_COLUMNS; }

// One panel of a matrix.
struct Panel {
  const uint8_t* codes;
  const void* scale;
  const int32_t* zero;
  int shift;  // log2 of the groups of activations to a scale
};

// What distinguishes the formats: bits of a code, scales of a row within a group, bytes of a scale, the code of 0; what the
// scales of activations are multiplied by, and what puts the sums right in the end.
template <int FORMAT>
struct Kind;
template <>
struct Kind<QUANT_NVFP4> {
  static constexpr int BITS = 4, SCALES = 2, SCALE_BYTES = 1, ZERO = 12;
  // Scales come in a unit so small that products with those of activations would leave the range of floats.
  static constexpr float LIFT = 0x1p100f, FACTOR = 0.5f / (E4M3_UNIT * LIFT);
  static F scale(const Panel& p, int64_t g, int which, int row) {
    return load_e4m3(static_cast<const uint8_t*>(p.scale) + (g * 2 + which) * QUANT_COLUMNS + row);
  }
};
template <>
struct Kind<QUANT_MXFP4> {
  static constexpr int BITS = 4, SCALES = 1, SCALE_BYTES = 1, ZERO = 12;
  static constexpr float LIFT = 1.0f, FACTOR = 0.5f;
  static F scale(const Panel& p, int64_t g, int, int row) {
    return load_e8m0(static_cast<const uint8_t*>(p.scale) + g * QUANT_COLUMNS + row);
  }
};
struct FloatScale {
  static constexpr int SCALES = 1, SCALE_BYTES = 4;
  static constexpr float LIFT = 1.0f, FACTOR = 1.0f;
  static F scale(const Panel& p, int64_t g, int, int row) {
    return load(static_cast<const float*>(p.scale) + (g >> p.shift) * QUANT_COLUMNS + row);
  }
};
template <>
struct Kind<QUANT_INT4> : FloatScale {
  static constexpr int BITS = 4, ZERO = 8;
};
template <>
struct Kind<QUANT_INT8> : FloatScale {
  static constexpr int BITS = 8, ZERO = SIGNED_BIAS;
};

// with(Kind) for a format of integer products.
template <class With>
void with_kind(int64_t format, With with) {
  switch (format) {
    case QUANT_NVFP4: return with(Kind<QUANT_NVFP4>());
    case QUANT_MXFP4: return with(Kind<QUANT_MXFP4>());
    case QUANT_INT4: return with(Kind<QUANT_INT4>());
    case QUANT_INT8: return with(Kind<QUANT_INT8>());
  }
}

// ----- repacking -----------------------------------------------------------------------------------------------------

// What the packing of a matrix comes to: inputs and bytes of a unit, units of a row, scales of a row.
struct Sizes {
  int64_t inputs, unit, units, scales;
  explicit Sizes(const QuantMatrix& w) {
    inputs = w.format == QUANT_FP8 ? 4 : GROUP;
    unit = w.format == QUANT_FP8 ? 64 : w.format == QUANT_INT8 ? 512 : 256;
    units = (w.inputs + inputs - 1) / inputs;
    scales = w.format == QUANT_NVFP4   ? 2 * units
             : w.format == QUANT_MXFP4 ? units
             : w.format == QUANT_FP8   ? 1
                                       : (w.inputs + w.group - 1) / w.group;
  }
  // Bytes of codes, and scales, of 64 rows.
  int64_t block() const { return units * PANELS * unit; }
  int64_t block_scales() const { return scales * QUANT_COLUMNS; }
};
int64_t scale_bytes(const QuantMatrix& w) { return w.format == QUANT_NVFP4 || w.format == QUANT_MXFP4 ? 1 : 4; }

constexpr int64_t PIECE = 256;  // words of a row that are moved at a time: those of 64 rows stay near

// Eight codes of four bits: the first four to the low halves of the bytes, the others to the high ones.
inline uint32_t regroup(uint32_t word) {
  uint32_t other = (word ^ word >> 8) & 0x0000FF00;
  word ^= other ^ other << 8;
  other = (word ^ word >> 4) & 0x00F000F0;
  return word ^ other ^ other << 4;
}

// A word of each of sixteen rows, 64 bytes, behind each other; or for FP8 each half of them behind each other in fours.
template <bool FP8>
inline void put_line(uint8_t* to, const uint32_t* from, int64_t stride) {
  for (int r = 0; r < ROWS; r++) {
    uint32_t word = from[r * stride];
    if (!FP8) {
      memcpy(to + r * 4, &word, 4);
    } else {
      memcpy(to + r / 4 * 16 + r % 4 * 2, &word, 2);
      memcpy(to + r / 4 * 16 + 8 + r % 4 * 2, reinterpret_cast<const char*>(&word) + 2, 2);
    }
  }
}

// 64 rows of a matrix. They are read as one stream, for memory is fastest so, and change places in the cache.
void pack_codes(const QuantMatrix& w, const uint8_t* codes, int64_t block, uint8_t* to) {
  Sizes sizes(w);
  bool narrow = w.format != QUANT_INT8 && w.format != QUANT_FP8;
  int64_t stored = narrow ? w.inputs / 2 : w.inputs, lines = sizes.unit / 64, words = sizes.units * lines;
  // Rows at a distance of their length would meet in a few places of the cache.
  alignas(64) uint32_t part[QUANT_COLUMNS][PIECE + 16];
  for (int64_t begin = 0; begin < words; begin += PIECE) {
    int64_t count = words - begin < PIECE ? words - begin : PIECE;
    for (int64_t r = 0; r < QUANT_COLUMNS; r++) {
      int64_t row = block * QUANT_COLUMNS + r, bytes = row < w.outputs ? stored - begin * 4 : 0;
      bytes = bytes < 0 ? 0 : bytes < count * 4 ? bytes : count * 4;
      if (bytes) memcpy(part[r], codes + row * stored + begin * 4, bytes);
      memset(reinterpret_cast<char*>(part[r]) + bytes, w.format == QUANT_INT4 ? 0x88 : 0, count * 4 - bytes);
      for (int64_t i = 0; narrow && i < count; i++) part[r][i] = regroup(part[r][i]);
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t p = 0; p < PANELS; p++) {
        uint8_t* line = to + ((begin + i) / lines * PANELS + p) * sizes.unit + (begin + i) % lines * 64;
        w.format == QUANT_FP8 ? put_line<true>(line, part[p * ROWS] + i, PIECE + 16)
                              : put_line<false>(line, part[p * ROWS] + i, PIECE + 16);
      }
  }
}

// (outputs, stored) to (scale, row of the block); what lies outside has zeros.
template <class To, class From>
void pack_scales(To* to, const From* from, int64_t block, int64_t outputs, int64_t stored, int64_t scales) {
  constexpr int64_t SOME = 8;
  for (int64_t s = 0; s < scales; s += SOME) {
    From part[QUANT_COLUMNS][SOME] = {};
    int64_t some = stored - s < SOME ? stored - s : SOME;
    for (int64_t r = 0; r < QUANT_COLUMNS && block * QUANT_COLUMNS + r < outputs; r++)
      memcpy(part[r], from + (block * QUANT_COLUMNS + r) * stored + s, some * sizeof(From));
    for (int64_t i = 0; i < SOME && s + i < scales; i++)
      for (int64_t r = 0; r < QUANT_COLUMNS; r++) to[(s + i) * QUANT_COLUMNS + r] = static_cast<To>(part[r][i]);
  }
}

// A block of 64 rows of one of the matrices.
void quant_pack(const QuantPack* p, int64_t item) {
  const QuantMatrix& w = p->to;
  Sizes sizes(w);
  int64_t matrix = item / block_count(w.outputs), block = item % block_count(w.outputs), at = item * sizes.block_scales();
  pack_codes(w, p->codes[matrix], block, const_cast<uint8_t*>(w.codes) + item * sizes.block());
  void* scale = const_cast<void*>(w.scale);
  if (scale_bytes(w) == 1)
    pack_scales(static_cast<uint8_t*>(scale) + at, static_cast<const uint8_t*>(p->scale[matrix]), block, w.outputs,
                w.format == QUANT_NVFP4 ? (w.inputs + 15) / 16 : sizes.scales, sizes.scales);
  else
    pack_scales(static_cast<float*>(scale) + at, static_cast<const float*>(p->scale[matrix]), block, w.outputs,
                sizes.scales, sizes.scales);
  if (w.zero)
    pack_scales(const_cast<int32_t*>(w.zero) + at, p->zero[matrix], block, w.outputs, sizes.scales, sizes.scales);
}

// ----- activations ---------------------------------------------------------------------------------------------------

template <class X>
void quantise(const QuantRows* f, int64_t row, int64_t scales, int32_t zero, float lift) {
  int64_t n = groups(f->inputs);
  const X* x = static_cast<const X*>(f->x) + row * f->inputs;
  int8_t* q = f->q + row * n * GROUP;
  for (int64_t g = 0; g < n; g++) {
    F wide[GROUP / W], most = set(0.0f);
    UNROLL for (int i = 0; i < GROUP / W; i++) {
      int64_t at = g * GROUP + i * W;
      wide[i] = at + W <= f->inputs ? load(x + at) : at < f->inputs ? load(x + at, f->inputs - at) : set(0.0f);
      most = larger(most, larger(wide[i], set(0.0f) - wide[i]));
    }
    float top = largest_lane(most);
    F inverse = set(top > 0.0f ? 127.0f / top : 0.0f);
    f->scale[row * n + g] = top / 127.0f * lift;
    F sum[2] = {set(0.0f), set(0.0f)};
    UNROLL for (int i = 0; i < GROUP / W; i++) {
      F whole = round_whole(wide[i] * inverse);
      store_bytes(q + g * GROUP + i * W, whole);
      F& half = sum[i * W / 16 * (scales - 1)];
      half = half + whole;
    }
    for (int64_t s = 0; s < scales; s++)
      f->sum[(row * n + g) * scales + s] = -zero * static_cast<int32_t>(sum_lanes(sum[s]));
  }
}
void quant_rows(const QuantRows* f, int64_t row) {
  with_kind(f->format, [&](auto kind) {
    using K = decltype(kind);
    f->bf16 ? quantise<bf16>(f, row, K::SCALES, K::ZERO, K::LIFT) : quantise<float>(f, row, K::SCALES, K::ZERO, K::LIFT);
  });
}

// ----- integer products ----------------------------------------------------------------------------------------------

const int8_t DOUBLED_E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
const int8_t ITSELF[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

constexpr int64_t AHEAD = 6144;  // bytes of codes that are on their way from memory in a stream
constexpr int MOST_STREAMED = W == 16 ? 4 : 2;

struct Row {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
};

// Both always inline: gcc takes a function of prefetches alone for one that does nothing, and leaves out its calls.
//
// Four panels at once: lines of the block that are wanted some groups later. Its scales come by themselves, and sooner so.
template <class K>
__attribute__((always_inline)) inline void fetch_along(const Panel* panels, int64_t g) {
  constexpr int64_t BYTES = PANELS * GROUP * ROWS * K::BITS / 8;
  UNROLL for (int line = 0; line < BYTES; line += 64) prefetch_once(panels[0].codes + g * BYTES + AHEAD + line);
}

// One panel at a time: with each of the four, a part of the next block. It is used long after, and from the second cache.
struct Next {
  const uint8_t* codes;
  const char* scale;
  int64_t scale_step;
};
template <class K>
__attribute__((always_inline)) inline void fetch_next(const Next& next, int64_t g) {
  constexpr int64_t BYTES = GROUP * ROWS * K::BITS / 8;
  UNROLL for (int line = 0; line < BYTES; line += 64) prefetch_far(next.codes + g * BYTES + line);
  prefetch_far(next.scale + g * next.scale_step);
}

// Quads of inputs: weights of the one and of the next.
template <class K>
inline void two_quads(const uint8_t* codes, int quad, Table lookup, Bytes* w) {
  if (K::BITS == 8) {
    w[0] = load_bytes(codes + quad * 64);
    w[1] = load_bytes(codes + (quad + 1) * 64);
  } else {
    Bytes two = load_bytes(codes + quad / 2 * 64);
    w[0] = low_halves(lookup, two);
    w[1] = high_halves(lookup, two);
  }
}

// M rows of activations with V panels of sixteen rows of W: y[m][v][row], of which a row is QUANT_COLUMNS long.
template <class K, int M, int V>
void tile(const Row* x, const Panel* panels, const Next& next, int64_t n, float* y) {
  constexpr int QUADS = GROUP / 4 / K::SCALES, BYTES = GROUP * ROWS * K::BITS / 8;
  const Table lookup = table(K::ZERO == 12 ? DOUBLED_E2M1 : ITSELF);
  F acc[M * V * VECTORS];
  UNROLL for (int j = 0; j < M * V * VECTORS; j++) acc[j] = set(0.0f);
  for (int64_t g = 0; g < n; g++) {
    V == PANELS ? fetch_along<K>(panels, g) : fetch_next<K>(next, g);
    UNROLL for (int v = 0; v < V; v++) {
      const uint8_t* codes = panels[v].codes + g * PANELS * BYTES;
      UNROLL for (int i = 0; i < VECTORS; i++) {
        F group[M];
        UNROLL for (int s = 0; s < K::SCALES; s++) {
          Bytes w[QUADS];
          UNROLL for (int j = 0; j < QUADS; j += 2) two_quads<K>(codes + i * 4 * W, s * QUADS + j, lookup, w + j);
          F scale = K::scale(panels[v], g, s, i * W);
          UNROLL for (int m = 0; m < M; m++) {
            Ints sum = set_int(x[m].sum[g * K::SCALES + s]);
            if (K::ZERO == 8 && panels[v].zero)  // the sum was made for a code of 0 that is 8
              sum = set_int(x[m].sum[g] / 8) * load_ints(panels[v].zero + (g >> panels[v].shift) * QUANT_COLUMNS + i * W);
            UNROLL for (int j = 0; j < QUADS; j++) {
              Bytes four = four_bytes(x[m].q + g * GROUP + (s * QUADS + j) * 4);
              sum = K::BITS == 8 ? dot_signed(sum, w[j], four) : dot(sum, w[j], four);
            }
            group[m] = s ? fma(to_float(sum), scale, group[m]) : to_float(sum) * scale;
          }
        }
        UNROLL for (int m = 0; m < M; m++) {
          F& a = acc[(m * V + v) * VECTORS + i];
          a = fma(group[m], set(x[m].scale[g]), a);
        }
      }
    }
  }
  constexpr int ONE = V * VECTORS;
  UNROLL for (int j = 0; j < M * ONE; j++) store(y + j / ONE * QUANT_COLUMNS + j % ONE * W, acc[j]);
}

// The same with panels beside each other, where a vector holds a panel: what is loaded of the activations serves all of them.
// Products of different sums follow each other, for each waits for the one before it in the same sum.
template <class K, int M, int V>
void tile_beside(const Row* x, const Panel* panels, const Next& next, int64_t n, float* y) {
  static_assert(V * VECTORS == V, "a vector holds a panel");
  constexpr int QUADS = GROUP / 4 / K::SCALES, BYTES = GROUP * ROWS * K::BITS / 8;
  const Table lookup = table(K::ZERO == 12 ? DOUBLED_E2M1 : ITSELF);
  F acc[V][M], group[V][M];
  Ints sum[V][M];
  UNROLL for (int j = 0; j < V * M; j++) acc[j / M][j % M] = set(0.0f);
  for (int64_t g = 0; g < n; g++) {
    fetch_next<K>(next, g);
    UNROLL for (int s = 0; s < K::SCALES; s++) {
      UNROLL for (int v = 0; v < V; v++) {
        UNROLL for (int m = 0; m < M; m++) {
          sum[v][m] = set_int(x[m].sum[g * K::SCALES + s]);
          if (K::ZERO == 8 && panels[v].zero)
            sum[v][m] = set_int(x[m].sum[g] / 8) * load_ints(panels[v].zero + (g >> panels[v].shift) * QUANT_COLUMNS);
        }
      }
      Bytes w[V][2];
      UNROLL for (int j = 0; j < QUADS; j++) {
        int quad = s * QUADS + j;
        if (j % 2 == 0)
          UNROLL for (int v = 0; v < V; v++) two_quads<K>(panels[v].codes + g * PANELS * BYTES, quad, lookup, w[v]);
        UNROLL for (int m = 0; m < M; m++) {
          Bytes four = four_bytes(x[m].q + g * GROUP + quad * 4);
          UNROLL for (int v = 0; v < V; v++)
            sum[v][m] = K::BITS == 8 ? dot_signed(sum[v][m], w[v][j % 2], four) : dot(sum[v][m], w[v][j % 2], four);
        }
      }
      UNROLL for (int v = 0; v < V; v++) {
        F scale = K::scale(panels[v], g, s, 0);
        UNROLL for (int m = 0; m < M; m++) {
          F whole = to_float(sum[v][m]);
          group[v][m] = s ? fma(whole, scale, group[v][m]) : whole * scale;
        }
      }
    }
    UNROLL for (int m = 0; m < M; m++) {
      F scale = set(x[m].scale[g]);
      UNROLL for (int v = 0; v < V; v++) acc[v][m] = fma(group[v][m], scale, acc[v][m]);
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) store(y + m * QUANT_COLUMNS + v * W, acc[v][m]);
}

// Where one item of work stands: some rows of y and at most QUANT_COLUMNS of its columns.
struct Item {
  const QuantForward* f;
  QuantSpan span;
  int64_t column, columns;
  Panel panel[PANELS];
  int some;  // panels

  Item(const QuantForward* forward, int64_t item) : f(forward) {
    const QuantMatrix& w = f->w;
    Sizes sizes(w);
    int64_t blocks = block_count(w.outputs), block = item % blocks;
    span = f->spans[item / blocks];
    column = block * QUANT_COLUMNS;
    columns = w.outputs - column < QUANT_COLUMNS ? w.outputs - column : QUANT_COLUMNS;
    some = static_cast<int>((columns + ROWS - 1) / ROWS);
    int shift = w.group >= w.inputs ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group / GROUP));
    block += span.matrix * blocks;
    for (int v = 0; v < some; v++) {
      int64_t scale = block * sizes.block_scales() + v * ROWS;
      panel[v] = {w.codes + block * sizes.block() + v * sizes.unit,
                  static_cast<const char*>(w.scale) + scale * scale_bytes(w), w.zero ? w.zero + scale : nullptr, shift};
    }
  }
  Next next(int v) const {
    Sizes sizes(f->w);
    int64_t scales = sizes.block_scales() * scale_bytes(f->w), part = scales / PANELS;
    return {panel[0].codes + sizes.block() + v * sizes.units * sizes.unit,
            static_cast<const char*>(panel[0].scale) + scales + v * part, part / sizes.units};
  }
  int64_t source(int64_t row) const { return f->source ? f->source[row] / f->per_source : row; }

  // y[row][column + j] for `count` columns from `values`.
  void put(int64_t row, int64_t j, const float* values, int64_t count, F factor) const {
    int64_t at = row * f->w.outputs + column + j;
    for (int64_t i = 0; i < count; i += W) {
      F value = load(values + i) * factor;
      if (f->squared_relu) value = larger(value, set(0.0f)), value = value * value;
      f->wide ? store(static_cast<float*>(f->y) + at + i, value, count - i)
              : store(static_cast<bf16*>(f->y) + at + i, value, count - i);
    }
  }
  float tensor_scale() const { return f->w.tensor_scale ? f->w.tensor_scale[span.matrix] : 1.0f; }
};

template <class K, int M>
void rows(const Item& item, int64_t row) {
  const QuantForward* f = item.f;
  int64_t n = groups(f->w.inputs);
  Row x[M];
  for (int m = 0; m < M; m++) {
    int64_t source = item.source(row + m);
    x[m] = {f->q + source * n * GROUP, f->q_scale + source * n, f->q_sum + source * n * K::SCALES};
  }
  F factor = set(item.tensor_scale() * K::FACTOR);
  alignas(64) float y[M][QUANT_COLUMNS];
  // Few rows: four panels at once read memory as one stream. Many rows: one panel at a time leaves registers for them.
  constexpr bool STREAM = M * VECTORS <= MOST_STREAMED;
  int v = 0;
  if (STREAM && item.some == PANELS) {
    tile<K, M, STREAM ? PANELS : 1>(x, item.panel, {}, n, y[0]);
    v = PANELS;
  }
  // Eight rows need more activations than a processor loads while it multiplies: half of them with two panels at a time.
  if constexpr (M == 8)
    for (; v + 2 <= item.some; v += 2)
      for (int half = 0; half < 2; half++)
        tile_beside<K, 4, 2>(x + half * 4, item.panel + v, item.next(v + half), n, y[half * 4] + v * ROWS);
  for (; v < item.some; v++) tile<K, M, 1>(x, item.panel + v, item.next(v), n, y[0] + v * ROWS);
  for (int m = 0; m < M; m++) item.put(row + m, 0, y[m], item.columns, factor);
}

template <class K>
void all_rows(const Item& item) {
  constexpr int MOST = W == 16 ? 8 : 2;
  int64_t row = item.span.row, end = row + item.span.rows;
  for (; row + MOST <= end; row += MOST) rows<K, MOST>(item, row);
  if (MOST > 4 && row + 4 <= end) rows<K, 4>(item, row), row += 4;
  if (MOST > 2 && row + 2 <= end) rows<K, 2>(item, row), row += 2;
  if (row < end) rows<K, 1>(item, row);
}

// ----- FP8 -----------------------------------------------------------------------------------------------------------

constexpr int64_t FP8_AHEAD = 4096;  // as AHEAD
constexpr int FP8_STEPS = 64;  // pairs of inputs decoded at a time: 16 KiB of bf16

// E4M3 to bf16: both have a sign in front; 2^(e - 7) (1 + m / 8), below 2^-6 m 2^-9, which bf16 still has as normal numbers.
constexpr bf16 e4m3_as_bf16(int code) {
  int sign = code >> 7, e = code >> 3 & 15, m = code & 7;
  if (e == 15 && m == 7) return static_cast<bf16>(sign << 15 | 0x7FC0);
  if (e == 0 && m == 0) return static_cast<bf16>(sign << 15);
  if (e == 0)
    for (e = 1; m < 8; e--) m *= 2;
  return static_cast<bf16>(sign << 15 | (e + 120) << 7 | (m & 7) << 4);
}
struct Decoded {
  bf16 number[256];
  uint8_t low[128], high[128];
};
constexpr Decoded decoded() {
  Decoded d{};
  for (int code = 0; code < 256; code++) d.number[code] = e4m3_as_bf16(code);
  for (int code = 0; code < 128; code++) {
    d.low[code] = static_cast<uint8_t>(d.number[code] & 255);
    d.high[code] = static_cast<uint8_t>(d.number[code] >> 8);
  }
  return d;
}
constexpr Decoded E4M3 = decoded();

// Where the pair of inputs at `step` of a column goes: panels of gemm.h are PANEL columns wide, those of W sixteen.
inline bf16* pair_of(bf16* part, int64_t step, int64_t column) {
  return part + (column / PANEL * (FP8_STEPS + 1) + step) * 2 * PANEL + column % PANEL * 2;
}

// Two steps along k of sixteen columns from `column` on.
inline void decode_two_steps(const uint8_t* codes, bf16* part, int64_t step, int64_t column) {
#if defined(__AVX512VBMI__)
  __m512i code = _mm512_loadu_si512(codes);
  __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(E4M3.low), code, _mm512_loadu_si512(E4M3.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(E4M3.high), code, _mm512_loadu_si512(E4M3.high + 64));
  high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // high | (code & sign)
  _mm512_storeu_si512(pair_of(part, step, column), _mm512_unpacklo_epi8(low, high));
  _mm512_storeu_si512(pair_of(part, step + 1, column), _mm512_unpackhi_epi8(low, high));
#elif defined(NAUTILUS_NEON)
  for (int r = 0; r < ROWS; r += 4)
    unpack_e4m3(pair_of(part, step, column + r), pair_of(part, step + 1, column + r), codes + 4 * r, E4M3.low, E4M3.high);
#else
  for (int r = 0; r < ROWS; r++)
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < 2; i++)
        pair_of(part, step + h, column + r)[i] = E4M3.number[codes[r / 4 * 16 + 8 * h + r % 4 * 2 + i]];
#endif
}

void fp8(const Item& item) {
  const QuantForward* f = item.f;
  const QuantSpan& span = item.span;
  int64_t inputs = f->w.inputs;
  alignas(64) bf16 part[(FP8_STEPS + 1) * 2 * QUANT_COLUMNS];
  alignas(64) float c[QUANT_BLOCK * QUANT_COLUMNS];  // [panel of gemm.h][row][PANEL]
  const bf16* x[QUANT_BLOCK];
  for (int64_t r = 0; r < span.rows; r++)
    x[r] = static_cast<const bf16*>(f->x) + item.source(span.row + r) * inputs;
  for (int64_t k = 0; k < inputs; k += 2 * FP8_STEPS) {
    int64_t count = inputs - k < 2 * FP8_STEPS ? (inputs - k) / 2 : FP8_STEPS;
    for (int v = 0; v < item.some; v++)
      for (int64_t step = 0; step < count; step += 2) {
        const uint8_t* codes = item.panel[v].codes + (k / 4 + step / 2) * PANELS * 64;
        prefetch_far(codes + FP8_AHEAD);
        decode_two_steps(codes, part, step, v * ROWS);
      }
    for (int64_t n = 0; n < item.columns; n += PANEL) {
      int64_t columns = item.columns - n < PANEL ? item.columns - n : PANEL;
      for (int64_t m = 0; m < span.rows; m += PAIR_ROWS) {
        int64_t some = span.rows - m < PAIR_ROWS ? span.rows - m : PAIR_ROWS;
        gemm_block<bf16>({x + m, 2}, some, pair_of(part, 0, n), 2 * PANEL, count, columns,
                         c + n * QUANT_BLOCK + m * PANEL, k > 0);
      }
    }
    for (int64_t r = 0; r < span.rows; r++) x[r] += 2 * FP8_STEPS;
  }
  for (int64_t n = 0; n < item.columns; n += W) {
    F factor = load(static_cast<const float*>(item.panel[n / ROWS].scale) + n % ROWS) * set(item.tensor_scale());
    int64_t left = item.columns - n;
    for (int64_t r = 0; r < span.rows; r++)
      item.put(span.row + r, n, c + n / PANEL * PANEL * QUANT_BLOCK + r * PANEL + n % PANEL, left < W ? left : W, factor);
  }
}

void quant_forward(const QuantForward* f, int64_t number) {
  Item item(f, number);
  if (f->w.format == QUANT_FP8) return fp8(item);
  with_kind(f->w.format, [&](auto kind) { all_rows<decltype(kind)>(item); });
}

}  // namespace

void NAUTILUS_FILL(quant)(Kernels* k) {
  k->quant_codes = [](const QuantMatrix* w) { return block_count(w->outputs) * Sizes(*w).block(); };
  k->quant_scales = [](const QuantMatrix* w) { return block_count(w->outputs) * Sizes(*w).block_scales(); };
  k->quant_pack = quant_pack;
  k->quant_rows = quant_rows;
  k->quant_forward = quant_forward;
}
