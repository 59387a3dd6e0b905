// Causal grouped attention over keys and values in pages, for one new token and for thousands: one kernel.
//
//     out_t = sum_s w_s v_s / sum_s w_s,    w_s = exp(scale q_t . k_s - top),    over first_t <= s <= t, s > t - window
//
// Positions are taken in tiles of KV_TILE at fixed places, in ascending order, with one online softmax for each query
// and head: `top` is the largest score so far, and what was summed under a smaller one is scaled down. A score is one
// chain over pairs of channels, an output one chain over pairs of positions. A position that a query must not see has a
// weight of exactly 0, and a tile of nothing else is left out, which changes no bit. Hence a query's output does not
// depend on the other tokens of the call, on the page numbers, or on the number of threads.
//
// A page of 16 tokens in bf16, with P rounded up to a multiple of 16 so that any vector may be loaded whole:
//
//     keys    [P / 2][16 tokens][2 channels]    one dot instruction takes 16 keys on by two channels,
//     values  [16 / 2][P][2 tokens]             or a vector of channels by two tokens
//
// Floats lie in the same order, not in twos. FP8 (E4M3) and int8 are laid out as bf16, one byte each; int8 has the
// tokens' scales, 16 floats, behind its codes. Every code is a bf16 number, so a page of bytes becomes one of bf16
// without any rounding, once for all queries and heads of a piece of work. Softmax weights are rounded to bf16 for the
// second product; those of int8 values after they were multiplied by the token's scale.
//
// A page is cleared when its first token is written. Behind a row's last token there may be others, rejected ones for
// example: they are not seen, but they must be finite, for a weight of 0 times NaN is NaN.
#include <float.h>

#include <type_traits>

#include "gemm.h"
#include "kernels.h"
#include "scratch.h"

namespace {

using bf16 = uint16_t;
constexpr int PAGE = KV_PAGE, TILE = KV_TILE, PAGES = TILE / PAGE, VECTORS = TILE / W;
constexpr int64_t ROWS = 96;  // queries times heads in a piece of work: they share what is read of keys and values

int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }
int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// ----- numbers of one byte -------------------------------------------------------------------------------------------

// magnitude 2^exponent, magnitude <= 128, as bf16.
constexpr bf16 bf16_of(bool negative, int magnitude, int exponent) {
  int bits = 0;
  if (magnitude) {
    for (; magnitude < 128; magnitude *= 2) exponent--;
    bits = (exponent + 7 + 127) << 7 | (magnitude & 127);
  }
  return static_cast<bf16>(bits | negative << 15);
}

// The bf16 number of each byte, low and high bytes apart.
struct Codes {
  uint8_t low[256], high[256];
  int format;
  constexpr explicit Codes(int of) : low{}, high{}, format(of) {
    for (int code = 0; code < 256; code++) {
      int exponent = code >> 3 & 15, mantissa = code & 7;
      bf16 number = format == KV_INT8 ? bf16_of(code > 127, code > 127 ? 256 - code : code, 0)
                    : (code & 127) == 127 ? bf16{0x7FC0}
                    : exponent ? bf16_of(code > 127, 8 + mantissa, exponent - 10)
                               : bf16_of(code > 127, mantissa, -9);
      low[code] = number & 255;
      high[code] = number >> 8;
    }
  }
};
alignas(64) constexpr Codes fp8_codes(KV_FP8), int8_codes(KV_INT8);

// `count` is a multiple of 256.
void decode(bf16* to, const uint8_t* from, int64_t count, const Codes& codes) {
#if defined(__AVX512VBMI__)
  __m512i low[4], high[4];
  UNROLL for (int i = 0; i < 4; i++) {
    low[i] = _mm512_loadu_si512(codes.low + 64 * i);
    high[i] = _mm512_loadu_si512(codes.high + 64 * i);
  }
  // What `unpack` takes from each quarter of a vector, in order of the results.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < count; i += 64) {
    __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
    __mmask64 upper = _mm512_movepi8_mask(code);
    auto look_up = [&](const __m512i* table) {
      return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], code, table[1]),
                                    _mm512_permutex2var_epi8(table[2], code, table[3]));
    };
    __m512i lows = look_up(low), highs = look_up(high);
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(lows, highs));
    _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(lows, highs));
  }
#elif defined(NAUTILUS_NEON)
  for (int64_t i = 0; i < count; i += 16)
    codes.format == KV_INT8 ? unpack_int8(to + i, to + i + 8, from + i)
                            : unpack_e4m3(to + i, to + i + 8, from + i, codes.low, codes.high);
#else
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<bf16>(codes.low[from[i]] | codes.high[from[i]] << 8);
#endif
}

// The nearest E4M3 number, of two the even one; 448 for all that are larger.
uint8_t e4m3(float x) {
  uint32_t bits, sign;
  memcpy(&bits, &x, 4);
  sign = bits >> 31 << 7;
  x = fabsf(x);
  if (x != x) return 0x7F;
  if (x >= 448.0f) return static_cast<uint8_t>(sign | 0x7E);
  if (x < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<uint32_t>(nearbyintf(x * 0x1p9f)));
  memcpy(&bits, &x, 4);
  bits += 0x7FFFF + (bits >> 20 & 1);
  return static_cast<uint8_t>(sign | ((bits >> 20) - (120 << 3)));
}

// ----- pages ---------------------------------------------------------------------------------------------------------

int64_t code_bytes(const KvPages& at) { return at.format == KV_F32 ? 4 : at.format == KV_BF16 ? 2 : 1; }
int64_t page_bytes(const KvPages& at) {
  return PAGE * (padded(at.width) * code_bytes(at) + (at.format == KV_INT8 ? 4 : 0));
}
uint8_t* page(const KvPages& at, uint8_t* pool, int64_t row, int64_t group, int64_t number) {
  return pool + (at.table[row * at.most + number] * at.groups + group) * page_bytes(at);
}
float* token_scales(const KvPages& at, uint8_t* page) {
  return reinterpret_cast<float*>(page + PAGE * padded(at.width));
}
int64_t position(const KvPages& at, int64_t row, int64_t token) { return at.length[row] - at.begin[row + 1] + token; }

// Whether every new token belongs to a row, and stands at a position for which the row's table has a page.
bool rows_fit(const KvPages& at) {
  if (at.begin[0] != 0 || at.begin[at.rows] != at.tokens) return false;
  for (int64_t row = 0; row < at.rows; row++)
    if (at.begin[row + 1] < at.begin[row] || position(at, row, at.begin[row]) < 0 || at.length[row] > at.most * PAGE)
      return false;
  return true;
}
// Whether the row's pages from position `low` on lie in the pool.
bool pages_fit(const KvPages& at, int64_t row, int64_t low) {
  for (int64_t i = low / PAGE; i * PAGE < at.length[row]; i++) {
    int32_t number = at.table[row * at.most + i];
    if (number < 0 || number >= at.pages) return false;
  }
  return true;
}

// ----- writing -------------------------------------------------------------------------------------------------------

int kv_check(const KvWrite* f) {
  bool fit = rows_fit(f->at);
  for (int64_t row = 0; row < f->at.rows && fit; row++)
    fit = pages_fit(f->at, row, position(f->at, row, f->at.begin[row]));
  return fit ? 0 : 2;
}

// One token's numbers of a group, as floats and as codes.
struct Token {
  float *x, *codes;
  Scratch pieces;
  Token(const KvPages& at, void* scratch) : pieces{static_cast<char*>(scratch)} {
    x = pieces.take<float>(at.width);
    codes = pieces.take<float>(at.width);
  }
};
int64_t kv_scratch(const KvWrite* f) { return Token(f->at, nullptr).pieces.bytes; }

// One token's numbers into its place among those of a page.
template <class Code>
void place_key(uint8_t* page, const Code* codes, int64_t width, int64_t slot) {
  constexpr int K = sizeof(Code) == 4 ? 1 : 2;
  Code* to = reinterpret_cast<Code*>(page) + slot * K;
  for (int64_t c = 0; c < width; c += K) memcpy(to + c * PAGE, codes + c, K * sizeof(Code));
}
template <class Code>
void place_value(uint8_t* page, const Code* codes, int64_t width, int64_t slot) {
  constexpr int K = sizeof(Code) == 4 ? 1 : 2;
  Code* to = reinterpret_cast<Code*>(page) + slot / K * padded(width) * K + slot % K;
  for (int64_t c = 0; c < width; c++) to[c * K] = codes[c];
}

// Writes the codes of x and gives their scale, of int8: NaN or inf where x is not finite, so that it is not lost.
float encode(const float* x, void* codes, int64_t width, int64_t format, float scale) {
  if (format == KV_F32) memcpy(codes, x, width * sizeof(float));
  if (format == KV_BF16) copy(static_cast<bf16*>(codes), x, width);
  if (format == KV_FP8)
    for (int64_t c = 0; c < width; c++) static_cast<uint8_t*>(codes)[c] = e4m3(x[c] / scale);
  if (format != KV_INT8) return scale;
  float most = 0.0f;
  for (int64_t c = 0; c < width; c++) most = fabsf(x[c]) > most || x[c] != x[c] ? fabsf(x[c]) : most;
  bool usable = most > 1e-30f && most <= FLT_MAX;
  float inverse = usable ? 127.0f / most : 0.0f;
  for (int64_t c = 0; c < width; c++)
    static_cast<int8_t*>(codes)[c] = usable ? static_cast<int8_t>(nearbyintf(x[c] * inverse)) : 0;
  return most / 127.0f;
}

template <class T>
void write(const KvWrite& f, int64_t row, int64_t group, Token w) {
  const KvPages& at = f.at;
  for (int64_t token = at.begin[row]; token < at.begin[row + 1]; token++) {
    int64_t there = position(at, row, token), slot = there % PAGE, number = (token * at.groups + group) * at.width;
    auto put = [&](const void* from, uint8_t* pool, float scale, auto place) {
      uint8_t* to = page(at, pool, row, group, there / PAGE);
      if (slot == 0) memset(to, 0, page_bytes(at));
      copy(w.x, static_cast<const T*>(from) + number, at.width);
      scale = encode(w.x, w.codes, at.width, at.format, scale);
      if (at.format == KV_INT8) token_scales(at, to)[slot] = scale;
      if (at.format == KV_F32)
        place(to, w.codes, at.width, slot);
      else if (at.format == KV_BF16)
        place(to, reinterpret_cast<bf16*>(w.codes), at.width, slot);
      else
        place(to, reinterpret_cast<uint8_t*>(w.codes), at.width, slot);
    };
    put(f.k, at.keys, f.k_scale, [](auto... given) { place_key(given...); });
    put(f.v, at.values, f.v_scale, [](auto... given) { place_value(given...); });
  }
}
void kv_write(const KvWrite* f, int64_t item, void* scratch) {
  Token w(f->at, scratch);
  f->bf16 ? write<bf16>(*f, item / f->at.groups, item % f->at.groups, w)
          : write<float>(*f, item / f->at.groups, item % f->at.groups, w);
}

// ----- attention -----------------------------------------------------------------------------------------------------

// The first position that a token may see.
int64_t lowest(const AttentionForward& f, int64_t row, int64_t token) {
  int64_t first = f.first ? f.first[token] : 0;
  return f.window ? larger_of(first, position(f.at, row, token) - f.window + 1) : first;
}

int attention_check(const AttentionForward* f) {
  const KvPages& at = f->at;
  bool fit = rows_fit(at);
  for (int64_t row = 0; row < at.rows && fit; row++) {
    int64_t low = at.length[row];
    for (int64_t token = at.begin[row]; token < at.begin[row + 1] && fit; token++) {
      int64_t mine = lowest(*f, row, token);
      fit = mine <= position(at, row, token) && (!f->first || f->first[token] >= 0);
      low = smaller_of(low, mine);
    }
    fit = fit && pages_fit(at, row, low);
  }
  return fit ? 0 : 2;
}

// Heads, and queries, of one piece of work.
int64_t heads_together(const AttentionForward& f) { return f.heads / f.at.groups / f.parts; }
int64_t queries_together(const AttentionForward& f) { return larger_of(ROWS / heads_together(f), 1); }
int64_t blocks(const AttentionForward& f, int64_t row) {
  int64_t block = queries_together(f);
  return (f.at.begin[row + 1] - f.at.begin[row] + block - 1) / block;
}
int64_t attention_items(const AttentionForward* f) {
  int64_t count = 0;
  for (int64_t row = 0; row < f->at.rows; row++) count += blocks(*f, row);
  return count * f->at.groups * f->parts;
}

// Scratch of one thread; M rows: a row is a query and a head.
template <class T>
struct Work {
  T *q, *weight;           // (M, P), (M, TILE)
  T *keys, *values;        // (PAGES, page): pages of bytes in bf16
  float *score, *out;      // (M, TILE), (M, padded P)
  float *top, *keep, *sum; // (M), (M), (M, W): largest score, what becomes of sums under an earlier one, sum of weights
  float *k_scale, *v_scale, *limit, *seen;  // (TILE): factors of scores and weights, and the mask of a query
  Scratch pieces;

  Work(const AttentionForward& f, void* scratch) : pieces{static_cast<char*>(scratch)} {
    int64_t rows = heads_together(f) * queries_together(f), wide = padded(f.at.width);
    int64_t decoded = code_bytes(f.at) == 1 ? TILE * wide : 0;
    q = pieces.take<T>(rows * f.at.width);
    weight = pieces.take<T>(rows * TILE);
    keys = pieces.take<T>(decoded);
    values = pieces.take<T>(decoded);
    score = pieces.take<float>(rows * TILE);
    out = pieces.take<float>(rows * wide);
    top = pieces.take<float>(rows);
    keep = pieces.take<float>(rows);
    sum = pieces.take<float>(rows * W);
    k_scale = pieces.take<float>(TILE);
    v_scale = pieces.take<float>(TILE);
    limit = pieces.take<float>(TILE);
    seen = pieces.take<float>(TILE);
  }
};

// go(some), where `some` is rows but at most MOST, and known to the compiler.
template <int MOST, class Go>
void with_count(int64_t rows, Go go) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_count<MOST - 1>(rows, go);
  go(std::integral_constant<int, MOST>());
}

float exp_of(float x) {
  float lane[W];
  store(lane, exp(set(x)));
  return lane[0];
}

template <class T>
struct Block {
  using S = Step<T>;
  static constexpr int K = S::K;
  const AttentionForward& f;
  const KvPages& at;
  Work<T> w;
  int64_t width, wide, bytes, heads, row, group, head, token, rows;  // head, token: the first ones
  const T *key_page[PAGES], *value_page[PAGES];
  const uint8_t *next_key[PAGES], *next_value[PAGES];  // of the next tile

  Block(const AttentionForward& forward, int64_t item, void* scratch)
      : f(forward), at(forward.at), w(forward, scratch), width(at.width), wide(padded(width)),
        bytes(code_bytes(at)), heads(heads_together(f)), row(0), group(item / f.parts % at.groups),
        head(group * (f.heads / at.groups) + item % f.parts * heads) {
    int64_t block = item / f.parts / at.groups;
    while (block >= blocks(f, row)) block -= blocks(f, row++);
    token = at.begin[row] + block * queries_together(f);
    rows = heads * smaller_of(at.begin[row + 1] - token, queries_together(f));
  }

  int64_t offset(int64_t m) const { return ((token + m / heads) * f.heads + head + m % heads) * width; }

  void forward() {
    int64_t low = at.length[row], end = position(at, row, token + rows / heads);
    for (int64_t m = 0; m < rows; m++) {
      memcpy(w.q + m * width, static_cast<const T*>(f.q) + offset(m), width * sizeof(T));
      low = smaller_of(low, lowest(f, row, token + m / heads));
      w.top[m] = -FLT_MAX;
    }
    memset(w.sum, 0, rows * W * sizeof(float));
    memset(w.out, 0, rows * wide * sizeof(float));
    for (int64_t tile = low / TILE * TILE; tile < end; tile += TILE) {
      open(tile, low, end);
      each_row_tile([&](int64_t m, auto some) { score<some()>(m); });
      for (int64_t m = 0; m < rows; m += heads) soften(tile, m);
      each_row_tile([&](int64_t m, auto some) { weigh<some()>(m); });
    }
    for (int64_t m = 0; m < rows; m++) finish(m);
  }

  // The pages of a tile. For those that hold no position below `end`, or only some before `low`, a neighbour stands in:
  // nobody sees their positions.
  void open(int64_t tile, int64_t low, int64_t end) {
    for (int i = 0; i < PAGES; i++) {
      int64_t number = smaller_of(larger_of(tile / PAGE + i, low / PAGE), (end - 1) / PAGE);
      uint8_t *key = page(at, at.keys, row, group, number), *value = page(at, at.values, row, group, number);
      for (int j = i * PAGE; j < (i + 1) * PAGE; j++) {
        w.k_scale[j] = f.scale * (at.format == KV_INT8 ? token_scales(at, key)[j % PAGE] : 1.0f);
        w.v_scale[j] = at.format == KV_INT8 ? token_scales(at, value)[j % PAGE] : 1.0f;
      }
      int64_t next = smaller_of(number + PAGES, (end - 1) / PAGE);
      next_key[i] = page(at, at.keys, row, group, next);
      next_value[i] = page(at, at.values, row, group, next);
      key_page[i] = numbers(key, w.keys + i * PAGE * wide);
      value_page[i] = numbers(value, w.values + i * PAGE * wide);
    }
  }
  const float* numbers(const uint8_t* page, float*) const { return reinterpret_cast<const float*>(page); }
  const bf16* numbers(const uint8_t* page, bf16* decoded) const {
    if (at.format == KV_BF16) return reinterpret_cast<const bf16*>(page);
    decode(decoded, page, PAGE * wide, at.format == KV_FP8 ? fp8_codes : int8_codes);
    return decoded;
  }

  template <class Go>
  void each_row_tile(Go go) {
    for (int64_t m = 0; m < rows; m += S::ROWS) with_count<S::ROWS>(rows - m, [&](auto some) { go(m, some); });
  }

  // Pages lie anywhere, so no hardware guesses the next one. The tiles of rows take turns, step by step, in asking for
  // the place of the next tile that they are at in this one: all at once would be more than a core can have under way.
  int64_t row_tiles() const { return (rows + S::ROWS - 1) / S::ROWS; }
  void fetch(const uint8_t* page, int64_t number) const { __builtin_prefetch(page + number * bytes); }

  // q . k of M rows with the keys of the tile.
  template <int M>
  void score(int64_t m) {
    for (int v = 0; v < VECTORS; v += TILE_VECTORS) {
      const T *q = w.q + m * width, *keys[TILE_VECTORS];
      int64_t turn = m / S::ROWS * K;
      F sum[M * TILE_VECTORS];
      UNROLL for (F& s : sum) s = set(0.0f);
      for (int j = 0; j < TILE_VECTORS; j++) keys[j] = key_page[(v + j) * W / PAGE] + (v + j) * W % PAGE * K;
      for (int64_t c = 0; c < width; c += K) {
        typename S::Vector columns[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) columns[j] = S::columns(keys[j] + c * PAGE);
        if (c == turn) {
          UNROLL for (int j = 0; j < TILE_VECTORS; j++) fetch(next_key[(v + j) * W / PAGE], c * PAGE);
          turn += row_tiles() * K;
        }
        UNROLL for (int i = 0; i < M; i++) {
          typename S::Vector query = S::row(q + i * width + c);
          UNROLL for (int j = 0; j < TILE_VECTORS; j++)
            sum[i * TILE_VECTORS + j] = S::add(sum[i * TILE_VECTORS + j], query, columns[j]);
        }
      }
      UNROLL for (int i = 0; i < M * TILE_VECTORS; i++)
        store(w.score + (m + i / TILE_VECTORS) * TILE + (v + i % TILE_VECTORS) * W, sum[i]);
    }
  }

  // From scores to weights, for the heads of the query at row m.
  void soften(int64_t tile, int64_t m) {
    int64_t mine = token + m / heads, low = lowest(f, row, mine) - tile, last = position(at, row, mine) - tile;
    bool all = low <= 0 && last >= TILE - 1, none = low >= TILE || last < 0;
    for (int i = 0; i < TILE && !all && !none; i++) {
      w.seen[i] = i >= low && i <= last ? 1.0f : 0.0f;
      w.limit[i] = i >= low && i <= last ? INFINITY : -FLT_MAX;
    }
    for (int64_t end = m + heads; m < end; m++) all ? soften_row<false>(m) : none ? skip_row(m) : soften_row<true>(m);
  }
  void skip_row(int64_t m) {
    memset(w.weight + m * TILE, 0, TILE * sizeof(T));
    w.keep[m] = 1.0f;
  }
  template <bool MASKED>
  void soften_row(int64_t m) {
    F score[VECTORS], most = set(-FLT_MAX), sum = load(w.sum + m * W);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      score[v] = load(w.score + m * TILE + v * W) * load(w.k_scale + v * W);
      // Whatever lies in an unseen place, NaN included, is replaced.
      if (MASKED) score[v] = smaller(score[v], load(w.limit + v * W));
      most = larger(most, score[v]);
    }
    float before = w.top[m], now = largest_lane(most);
    w.keep[m] = 1.0f;
    if (now > before) {
      w.top[m] = now;
      w.keep[m] = exp_of(before - now);
      sum = sum * set(w.keep[m]);
    }
    F top = set(w.top[m]);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      F weight = exp(score[v] - top);
      if (MASKED) weight = weight * load(w.seen + v * W);
      sum = sum + weight;
      store(w.weight + m * TILE + v * W, weight * load(w.v_scale + v * W));
    }
    store(w.sum + m * W, sum);
  }

  // Adds the tile's values, times their weights, to the outputs of M rows.
  template <int M>
  void weigh(int64_t m) {
    int64_t c = 0;
    for (; c + TILE_VECTORS * W <= wide; c += TILE_VECTORS * W) weigh_columns<M, TILE_VECTORS>(m, c);
    for (; c < wide; c += W) weigh_columns<M, 1>(m, c);
  }
  template <int M, int V>
  void weigh_columns(int64_t m, int64_t c) {
    float* out = w.out + m * wide + c;
    int64_t turn = m / S::ROWS * K;
    F sum[M * V];
    UNROLL for (int i = 0; i < M * V; i++) sum[i] = load(out + i / V * wide + i % V * W) * set(w.keep[m + i / V]);
    for (int i = 0; i < PAGES; i++) {
      const T *value = value_page[i] + c * K, *weight = w.weight + m * TILE + i * PAGE;
      for (int s = 0; s < PAGE; s += K, value += wide * K) {
        typename S::Vector columns[V];
        UNROLL for (int j = 0; j < V; j++) columns[j] = S::columns(value + j * W * K);
        if (i * PAGE + s == turn) {
          UNROLL for (int j = 0; j < V; j++) fetch(next_value[i], s * wide + (c + j * W) * K);
          turn += row_tiles() * K;
        }
        UNROLL for (int r = 0; r < M; r++) {
          typename S::Vector both = S::row(weight + r * TILE + s);
          UNROLL for (int j = 0; j < V; j++) sum[r * V + j] = S::add(sum[r * V + j], both, columns[j]);
        }
      }
    }
    UNROLL for (int i = 0; i < M * V; i++) store(out + i / V * wide + i % V * W, sum[i]);
  }

  void finish(int64_t m) {
    float sum = sum_lanes(load(w.sum + m * W));
    F factor = set(f.v_scale / sum);
    T* out = static_cast<T*>(f.out) + offset(m);
    // In double: logarithms of float differ among libraries of C.
    if (f.lse) f.lse[offset(m) / width] = w.top[m] + static_cast<float>(log(static_cast<double>(sum)));
    for (int64_t c = 0; c < width; c += W) store(out + c, load(w.out + m * wide + c) * factor, width - c);
  }
};

void attention_forward(const AttentionForward* f, int64_t item, void* scratch) {
  f->at.format == KV_F32 ? Block<float>(*f, item, scratch).forward() : Block<bf16>(*f, item, scratch).forward();
}
int64_t attention_scratch(const AttentionForward* f) {
  return f->at.format == KV_F32 ? Work<float>(*f, nullptr).pieces.bytes : Work<bf16>(*f, nullptr).pieces.bytes;
}

}  // namespace

void NAUTILUS_FILL(attention)(Kernels* k) {
  k->kv_check = kv_check;
  k->kv_write = kv_write;
  k->kv_scratch = kv_scratch;
  k->attention_check = attention_check;
  k->attention_items = attention_items;
  k->attention_forward = attention_forward;
  k->attention_scratch = attention_scratch;
}
