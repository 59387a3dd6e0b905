// The backward of causal grouped attention. A row is a query and a head of one group. With lse, the logarithm of the
// sum of exp of all scores that the forward found, and delta_t = dout_t . out_t,
//
//     p_ts = exp(scale q_t . k_s - lse_t)        ds_ts = p_ts (dout_t . v_s - delta_t)
//     dv_s = sum_t p_ts dout_t        dk_s = scale sum_t ds_ts q_t        dq_t = scale sum_s ds_ts k_s
//
// Keys lie in strips at fixed places, rows in slabs. A piece of work is a strip against a slab: blocks of rows, and for
// each the strip's tiles of keys, both in ascending order. So p and ds are made once, a block and tile at a time, and
// never leave the cache. dk and dv are chains over all rows, which go on from slab to slab in `sums`. dq is a chain for
// each strip, in `parts`, and these are added up in ascending order. Where a row must not see a position, p and ds are
// exactly 0, and a tile that no row of a block may see is left out, which changes no bit. Hence no gradient depends on
// the number of threads, on the other rows of a batch or on the size of a slab, nor dq on the other queries.
//
// In bf16, p and ds are rounded before they meet dout, q and k. What is to be summed over rows or keys lies in steps of
// a product: pairs of rows or keys in bf16, single ones in float.
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"

namespace {

using bf16 = uint16_t;
constexpr int BLOCK = ATTENTION_BLOCK, TILE = ATTENTION_TILE;
// Chains held in registers: for scores so many rows by so many vectors of keys; for gradients Step::ROWS by TILE_VECTORS
// of channels, or NARROW_ROWS by one. Rows of a block are left out by UNIT of them.
template <class T>
constexpr int SCORE_ROWS = W == 16 ? 8 : Step<T>::ROWS;
constexpr int SCORE_VECTORS = W == 16 ? 3 : 2, NARROW_ROWS = W == 16 ? 12 : 8, UNIT = 24;
template <class T>
constexpr bool FITS = UNIT % SCORE_ROWS<T> == 0 && UNIT % Step<T>::ROWS == 0 && TILE % Step<T>::ROWS == 0;
static_assert(FITS<float> && FITS<bf16> && BLOCK % UNIT == 0 && UNIT % NARROW_ROWS == 0, "rows");
static_assert(TILE % (SCORE_VECTORS * W) == 0 && TILE % NARROW_ROWS == 0, "keys");

int64_t padded(int64_t width) { return (width + ATTENTION_PAD - 1) / ATTENTION_PAD * ATTENTION_PAD; }
int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t strips(const AttentionBackward& b) { return (b.positions + b.strip - 1) / b.strip; }

// Where one pair of batch row and group has its rows, and what each may see.
struct Place {
  const AttentionBackward& b;
  int64_t row, group, heads;  // heads: of the group

  Place(const AttentionBackward& backward, int64_t pair)
      : b(backward), row(pair / b.groups), group(pair % b.groups), heads(b.heads / b.groups) {}
  int64_t rows() const { return b.time * heads; }
  // Of row m among queries, and of a position among keys.
  int64_t query(int64_t m) const { return (row * b.time + m / heads) * b.heads + group * heads + m % heads; }
  int64_t key(int64_t position) const { return (row * b.positions + position) * b.groups + group; }
  int64_t last(int64_t m) const { return b.positions - b.time + m / heads; }
  int64_t low(int64_t m) const {
    int64_t first = b.first ? b.first[row * b.time + m / heads] : 0;
    return larger_of(b.window ? larger_of(first, last(m) - b.window + 1) : first, 0);
  }
  // Positions that some row of the block sees.
  struct Reach {
    int64_t low, end;
  };
  Reach reach(int64_t m) const {
    int64_t end = smaller_of(m + BLOCK, rows()), least = low(m);
    for (int64_t i = m; i < end; i++) least = smaller_of(least, low(i));
    return {least, last(end - 1) + 1};
  }
};

// Scratch of one thread.
template <class T>
struct Work {
  static constexpr int K = Step<T>::K;
  T *keys, *values;                // (tiles of a strip, P, TILE), in steps of channels
  T* key_steps;                    // (strip, wide), in steps of keys
  T *q, *dout, *ds;                // (BLOCK, wide), (BLOCK, TILE)
  T *q_steps, *dout_steps;         // (BLOCK, wide), in steps of rows
  T *p_steps, *ds_steps;           // (BLOCK, TILE), in steps of rows
  float *score, *dweight;          // (SCORE_ROWS, TILE)
  float *lse, *delta;              // (BLOCK)
  int64_t *low, *last;             // (BLOCK): the first and last position that a row sees
  Scratch pieces;

  Work(const AttentionBackward& b, void* scratch) : pieces{static_cast<char*>(scratch)} {
    int64_t wide = padded(b.width);
    keys = pieces.take<T>(b.strip * wide);
    values = pieces.take<T>(b.strip * wide);
    key_steps = pieces.take<T>(b.strip * wide);
    q_steps = pieces.take<T>(BLOCK * wide);
    dout_steps = pieces.take<T>(BLOCK * wide);
    p_steps = pieces.take<T>(BLOCK * TILE);
    ds_steps = pieces.take<T>(BLOCK * TILE);
    // Steps of single rows are rows.
    q = K == 1 ? q_steps : pieces.take<T>(BLOCK * wide);
    dout = K == 1 ? dout_steps : pieces.take<T>(BLOCK * wide);
    ds = K == 1 ? ds_steps : pieces.take<T>(BLOCK * TILE);
    score = pieces.take<float>(SCORE_ROWS<T> * TILE);
    dweight = pieces.take<float>(SCORE_ROWS<T> * TILE);
    lse = pieces.take<float>(BLOCK);
    delta = pieces.take<float>(BLOCK);
    low = pieces.take<int64_t>(BLOCK);
    last = pieces.take<int64_t>(BLOCK);
  }
};

// seen[TILE - low + i] is 1 from i = low on, before it 0.
struct Edge {
  float seen[2 * TILE];
  constexpr Edge() : seen{} {
    for (int i = TILE; i < 2 * TILE; i++) seen[i] = 1.0f;
  }
};
constexpr Edge edge;

// c = a b for M rows of a and V vectors of columns of b, or with `more` c += a b. Not part of any other function: with
// more around them compilers keep the sums in memory.
template <class T, int M, int V>
__attribute__((noinline)) void product(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                                       int64_t steps, float* c, int64_t c_row, bool more) {
  using S = Step<T>;
  F sum[M * V];
  UNROLL for (int i = 0; i < M * V; i++) sum[i] = more ? load(c + i / V * c_row + i % V * W) : set(0.0f);
  for (int64_t k = 0; k < steps; k++, a += a_step, b += b_step) {
    typename S::Vector columns[V];
    UNROLL for (int j = 0; j < V; j++) columns[j] = S::columns(b + j * W * S::K);
    UNROLL for (int i = 0; i < M; i++) {
      typename S::Vector row = S::row(a + i * a_row);
      UNROLL for (int j = 0; j < V; j++) sum[i * V + j] = S::add(sum[i * V + j], row, columns[j]);
    }
  }
  UNROLL for (int i = 0; i < M * V; i++) store(c + i / V * c_row + i % V * W, sum[i]);
}

template <class T>
struct Piece {
  using S = Step<T>;
  static constexpr int K = S::K;
  const AttentionBackward& b;
  Place at;
  Work<T> w;
  int64_t width, wide, steps, begin, end;  // positions of the strip
  float *sums, *parts;

  Piece(const AttentionBackward& backward, int64_t item, void* scratch)
      : b(backward), at(b, item / strips(b)), w(b, scratch), width(b.width), wide(padded(width)),
        steps((width + K - 1) / K), begin(item % strips(b) * b.strip), end(smaller_of(begin + b.strip, b.positions)),
        sums(b.sums + item * 2 * b.strip * wide), parts(b.parts + item * b.slab * wide) {}

  // K rows as one step, zeros behind their `width` numbers and for those that are null.
  void lay(bf16* to, const bf16* const* rows) const {
    memset(to, 0, 2 * wide * sizeof(bf16));
    if (rows[0]) zip(to, rows[0], rows[1], width);
  }
  void lay(float* to, const float* const* rows) const { lay_row(to, *rows); }
  void lay_row(T* to, const T* row) const {
    memset(to, 0, wide * sizeof(T));
    if (row) memcpy(to, row, width * sizeof(T));
  }

  void open_strip() {
    for (int64_t tile = begin; tile < end; tile += TILE) {
      const T *k[TILE], *v[TILE];
      for (int64_t s = 0; s < TILE; s++) {
        int64_t offset = at.key(tile + s) * width;
        k[s] = tile + s < end ? static_cast<const T*>(b.k) + offset : nullptr;
        v[s] = tile + s < end ? static_cast<const T*>(b.v) + offset : nullptr;
      }
      int64_t place = (tile - begin) * wide;
      columns(w.keys + place, k);
      columns(w.values + place, v);
      for (int64_t s = 0; s < TILE; s += K) lay(w.key_steps + place + s * wide, k + s);
    }
  }
  // The positions of a tile as columns; the last ones may be null.
  void columns(T* to, const T* const* from) const {
    memset(to, 0, steps * K * TILE * sizeof(T));
    for (int64_t c = 0; c < width; c += K)
      for (int64_t s = 0; s < TILE && from[s]; s++) memcpy(to + c * TILE + s * K, from[s] + c, K * sizeof(T));
  }

  void open_block(int64_t first) {
    for (int64_t m = 0; m < BLOCK; m += K) {
      const T *q[K] = {}, *dout[K] = {};
      for (int64_t i = m; i < m + K; i++) {
        // A row of zeros that sees nothing, where there is none.
        w.low[i] = INT64_MAX;
        w.last[i] = -1;
        w.lse[i] = w.delta[i] = 0.0f;
        if (first + i < at.rows()) {
          int64_t query = at.query(first + i);
          q[i - m] = static_cast<const T*>(b.q) + query * width;
          dout[i - m] = static_cast<const T*>(b.dout) + query * width;
          w.low[i] = at.low(first + i);
          w.last[i] = at.last(first + i);
          w.lse[i] = b.lse[query];
          w.delta[i] = inner(dout[i - m], static_cast<const T*>(b.out) + query * width);
        }
        if (K > 1) lay_row(w.q + i * wide, q[i - m]);
        if (K > 1) lay_row(w.dout + i * wide, dout[i - m]);
      }
      lay(w.q_steps + m * wide, q);
      lay(w.dout_steps + m * wide, dout);
    }
  }
  float inner(const T* x, const T* y) const {
    F sum = set(0.0f);
    for (int64_t c = 0; c < width; c += W) sum = fma(load(x + c, width - c), load(y + c, width - c), sum);
    return sum_lanes(sum);
  }

  void run(int64_t from) {
    open_strip();
    for (int64_t m = from; m < smaller_of(from + b.slab, at.rows()); m += BLOCK) {
      Place::Reach reach = at.reach(m);
      int64_t low = larger_of(reach.low / TILE * TILE, begin), high = smaller_of(reach.end, end);
      if (low >= high) continue;
      open_block(m);
      float* dq = parts + (m - from) * wide;
      memset(dq, 0, BLOCK * wide * sizeof(float));
      for (int64_t tile = low; tile < high; tile += TILE) meet(tile, dq);
    }
  }

  // The block against one tile of keys.
  void meet(int64_t tile, float* dq) {
    int64_t from = BLOCK, to = 0, place = (tile - begin) * wide;
    for (int64_t m = 0; m < BLOCK; m++)
      if (w.low[m] < tile + TILE && w.last[m] >= tile) {
        from = smaller_of(from, m / UNIT * UNIT);
        to = (m / UNIT + 1) * UNIT;
      }
    if (from >= to) return;
    for (int64_t m = from; m < to; m += SCORE_ROWS<T>) soften(m, tile);
    const T *p = w.p_steps + from * TILE, *ds = w.ds_steps + from * TILE;
    const T *q = w.q_steps + from * wide, *dout = w.dout_steps + from * wide;
    int64_t rows = to - from;
    add(TILE, ds, K, TILE * K, q, rows / K, sums + place);
    add(TILE, p, K, TILE * K, dout, rows / K, sums + b.strip * wide + place);
    add(rows, w.ds + from * TILE, TILE, K, w.key_steps + place, TILE / K, dq + from * wide);
  }

  // c[row][channel] += sum_k a[row][k] b[k][channel]
  void add(int64_t rows, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ks, float* c) {
    constexpr int M = S::ROWS, V = TILE_VECTORS, N = NARROW_ROWS;
    int64_t n = 0;
    for (; n + V * W <= wide; n += V * W)
      for (int64_t m = 0; m < rows; m += M)
        product<T, M, V>(a + m * a_row, a_row, a_step, b + n * K, wide * K, ks, c + m * wide + n, wide, true);
    for (; n < wide; n += W)
      for (int64_t m = 0; m < rows; m += N)
        product<T, N, 1>(a + m * a_row, a_row, a_step, b + n * K, wide * K, ks, c + m * wide + n, wide, true);
  }

  // p and ds of some rows.
  void soften(int64_t m, int64_t tile) {
    constexpr int M = SCORE_ROWS<T>, V = SCORE_VECTORS;
    const T *q = w.q + m * wide, *dout = w.dout + m * wide;
    for (int s = 0; s < TILE; s += V * W) {
      int64_t place = (tile - begin) * wide + s * K;
      product<T, M, V>(q, wide, K, w.keys + place, TILE * K, steps, w.score + s, TILE, false);
      product<T, M, V>(dout, wide, K, w.values + place, TILE * K, steps, w.dweight + s, TILE, false);
    }
    bool all = true;
    for (int64_t i = m; i < m + M; i++) all = all && w.low[i] <= tile && w.last[i] >= tile + TILE - 1;
    for (int64_t i = 0; i < M; i += K) all ? soften_rows<false>(m, i, tile) : soften_rows<true>(m, i, tile);
  }
  template <bool MASKED>
  void soften_rows(int64_t m, int64_t i, int64_t tile) {
    for (int s = 0; s < TILE; s += W) {
      int64_t at = (m + i) * TILE;
      F p = weight<MASKED>(m, i, tile, s), ds = p * dscore(m, i, s);
      if constexpr (K == 1) {
        store(w.p_steps + at + s, p);
        store(w.ds + at + s, ds);
      } else {
        F next_p = weight<MASKED>(m, i + 1, tile, s), next_ds = next_p * dscore(m, i + 1, s);
        store_pairs(w.p_steps + at + K * s, p, next_p);
        store_pairs(w.ds_steps + at + K * s, ds, next_ds);
        store(w.ds + at + s, ds);
        store(w.ds + at + TILE + s, next_ds);
      }
    }
  }
  template <bool MASKED>
  F weight(int64_t m, int64_t i, int64_t tile, int64_t s) const {
    F p = exp(fma(load(w.score + i * TILE + s), set(b.scale), set(-w.lse[m + i])));
    return MASKED ? p * seen(m + i, tile, s) : p;
  }
  F dscore(int64_t m, int64_t i, int64_t s) const { return load(w.dweight + i * TILE + s) - set(w.delta[m + i]); }
  F seen(int64_t m, int64_t tile, int64_t s) const {
    int64_t low = smaller_of(larger_of(w.low[m] - tile, 0), TILE);
    int64_t end = smaller_of(larger_of(w.last[m] + 1 - tile, low), TILE);
    return load(edge.seen + TILE - low + s) - load(edge.seen + TILE - end + s);
  }
};

void backward_piece(const AttentionBackward* b, int64_t item, int64_t from, void* scratch) {
  b->bf16 ? Piece<bf16>(*b, item, scratch).run(from) : Piece<float>(*b, item, scratch).run(from);
}
int64_t backward_scratch(const AttentionBackward* b) {
  return b->bf16 ? Work<bf16>(*b, nullptr).pieces.bytes : Work<float>(*b, nullptr).pieces.bytes;
}

// dq of a block of rows: what the strips found.
template <class T>
void gather(const AttentionBackward& b, const Place& at, int64_t pair, int64_t from, int64_t m) {
  int64_t wide = padded(b.width);
  Place::Reach reach = at.reach(m);
  for (int64_t i = m; i < smaller_of(m + BLOCK, at.rows()); i++)
    for (int64_t c = 0; c < b.width; c += W) {
      F sum = set(0.0f);
      for (int64_t strip = reach.low / b.strip; strip * b.strip < reach.end; strip++)
        sum = sum + load(b.parts + ((pair * strips(b) + strip) * b.slab + i - from) * wide + c);
      store(static_cast<T*>(b.dq) + at.query(i) * b.width + c, sum * set(b.scale), b.width - c);
    }
}
void backward_queries(const AttentionBackward* b, int64_t item, int64_t from) {
  int64_t each = b->slab / BLOCK, pair = item / each, m = from + item % each * BLOCK;
  Place at(*b, pair);
  if (m >= at.rows()) return;
  b->bf16 ? gather<bf16>(*b, at, pair, from, m) : gather<float>(*b, at, pair, from, m);
}

// dk and dv of a strip.
template <class T>
void finish(const AttentionBackward& b, int64_t item) {
  Place at(b, item / strips(b));
  int64_t begin = item % strips(b) * b.strip, end = smaller_of(begin + b.strip, b.positions), wide = padded(b.width);
  const float *dk = b.sums + item * 2 * b.strip * wide, *dv = dk + b.strip * wide;
  for (int64_t s = begin; s < end; s++, dk += wide, dv += wide)
    for (int64_t c = 0; c < b.width; c += W) {
      int64_t to = at.key(s) * b.width + c;
      store(static_cast<T*>(b.dk) + to, load(dk + c) * set(b.scale), b.width - c);
      store(static_cast<T*>(b.dv) + to, load(dv + c), b.width - c);
    }
}
void backward_keys(const AttentionBackward* b, int64_t item) {
  b->bf16 ? finish<bf16>(*b, item) : finish<float>(*b, item);
}

}  // namespace

void NAUTILUS_FILL(attention_backward)(Kernels* k) {
  k->attention_backward_piece = backward_piece;
  k->attention_backward_scratch = backward_scratch;
  k->attention_backward_queries = backward_queries;
  k->attention_backward_keys = backward_keys;
}
