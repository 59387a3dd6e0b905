// The Mamba-2 mixer between its two projections, one (row, group) at a time: convolution and SiLU, the scan, the skip,
// the gate and the group norm, in one pass over the tokens. A group's heads share B and C, and its channels share the
// norm, so the pieces of work never meet.
//
//     S_t = exp(dt_t a) S_{t-1} + b_t (dt_t x_t)^T      y_t = c_t^T S_t      out = norm((y + D x) silu(z)) weight
//
// The state lies as (N, P): lanes run over P, so y_t is one chain of multiply-adds in order of n, whatever the number of
// tokens in the call. Time is serial. Hence any cut of the text gives the same bits.
//
// Tokens that an earlier call kept and that are folded into the state now (kernels.h) stand before the call's own, at
// times -1, -2, ... Of them the scan reads dt x, b and the decay.
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace {

constexpr int Q = MAMBA_CHUNK;
// The state is worked on in tiles that stay in registers while time runs: so many values of n, so many vectors of P.
constexpr int ROWS = 4, VECTORS = W == 16 ? 4 : 2;
constexpr int BACK_ROWS = 2, BACK_VECTORS = VECTORS;

int64_t whole_vectors(int64_t count) { return (count + W - 1) / W * W; }

struct Shape {
  int64_t rows, time, heads, width, groups, state, taps, window, share, inner, channels, token;
  int64_t pad;     // P in whole vectors; the lanes beyond P stay zero
  int64_t mine;    // channels of one group's convolution: x of its heads, B, C
  int64_t stride;  // the same in whole vectors
  float eps;

  explicit Shape(const MambaSizes& s)
      : rows(s.rows), time(s.time), heads(s.heads), width(s.head_width), groups(s.groups), state(s.state),
        taps(s.taps), window(s.window), share(s.heads / s.groups), inner(s.heads * s.head_width),
        channels(inner + 2 * s.groups * s.state), token(inner + channels + s.heads), pad(whole_vectors(s.head_width)),
        mine(share * s.head_width + 2 * s.state), stride(whole_vectors(mine)), eps(s.eps) {}

  int64_t state_size() const { return state * pad; }
  int64_t tail_size() const { return taps - 1 + window; }  // tokens
  int64_t kept_size() const { return inner + groups * state + heads; }
};

// Scratch of one thread. Rows of x, u, y and their gradients are (share, pad). act, u and keep have room for `window`
// tokens before the first.
struct Work {
  float *raw, *pre, *act;    // (taps - 1 + Q, stride), (Q, stride), (Q, stride): input, sum and SiLU of the convolution
  float *x, *u, *y;          // (Q, share, pad): x, dt x, and the scan's output
  float *dt, *rate;          // (share, Q): softplus(v), sigmoid(v) for v = raw dt + bias
  float *keep;               // (share, window + Q): exp(dt a)
  float *state;              // (share, N, pad)
  float *weight, *bias;      // (taps, stride), (stride): the group's convolution
  float *post, *gate, *unit; // (inner of the group): y + D x, silu(z), their product
  float *dy, *du;            // gradients, laid out as y and u
  float *dstate, *dact, *draw, *dweight, *dbias, *dnorm;
  float *dkeep, *db, *dc;    // lanes are added up last: (share, Q, W), (Q, BACK_ROWS, W) twice
  float *past;               // (Q + 1, BACK_ROWS, BACK_VECTORS, W): the states of one tile, token after token
  Scratch pieces;

  Work(const Shape& s, void* scratch, bool backward) : pieces{static_cast<char*>(scratch)} {
    auto take = [&](int64_t count) { return pieces.take<float>(count); };
    int64_t wide = s.share * s.pad, slice = whole_vectors(s.share * s.width);
    raw = take((s.taps - 1 + Q) * s.stride);
    pre = take(Q * s.stride);
    act = take((s.window + Q) * s.stride);
    x = take(Q * wide);
    u = take((s.window + Q) * wide);
    y = take(Q * wide);
    dt = take(s.share * Q);
    rate = take(s.share * Q);
    keep = take(s.share * (s.window + Q));
    state = take(s.share * s.state_size());
    weight = take(s.taps * s.stride);
    bias = take(s.stride);
    post = take(slice);
    gate = take(slice);
    unit = take(slice);
    if (!backward) return;
    dy = take(Q * wide);
    du = take(Q * wide);
    dstate = take(s.share * s.state_size());
    dact = take(Q * s.stride);
    draw = take((s.taps - 1 + Q) * s.stride);
    dweight = take(s.taps * s.stride);
    dbias = take(s.stride);
    dnorm = take(slice);
    dkeep = take(s.share * Q * W);
    db = take(Q * BACK_ROWS * W);
    dc = take(Q * BACK_ROWS * W);
    past = take((Q + 1) * BACK_ROWS * BACK_VECTORS * W);
  }
};

void clear(float* p, int64_t count) { memset(p, 0, count * sizeof(float)); }

// A group's channels are short pieces of long rows: the hardware does not guess where the next one begins.
constexpr int64_t AHEAD = 8;  // tokens
// Of a state it guesses too short a way.
constexpr int64_t STATE_AHEAD = 2048;  // numbers
template <class T>
void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}
template <class T>
float scalar(const T* p) {
  float one;
  copy(&one, p, 1);
  return one;
}
// What a number becomes when it is stored as T.
inline F rounded(F a, const float*) { return a; }
inline F rounded(F a, const uint16_t*) {
  uint16_t narrow[W];
  store(narrow, a);
  return load(narrow);
}

// ----- the scan ------------------------------------------------------------------------------------------------------

// One head's scan: `past` tokens before token 0 only move the state, `time` tokens have an output too. The state is
// stored after all of them, or where these are `tentative` after those of the past. From one token to the next it is
// `step` numbers in u and y, `stride` in b and c.
struct Scan {
  float* state;  // (N, pad)
  const float *u, *b, *c, *keep;
  float* y;      // grows by what the state adds to it
  int64_t pad, step, stride, past, time, tentative;

  // N values of n by V vectors of P.
  template <int N, int V>
  inline void tile(int64_t n, int64_t p) const {
    F s[N * V];
    float* place = state + n * pad + p;
    for (int i = 0; i < N; i++) prefetch(place + i * pad + STATE_AHEAD, V * W);
    auto put = [&] { UNROLL for (int j = 0; j < N * V; j++) store(place + j / V * pad + j % V * W, s[j]); };
    UNROLL for (int j = 0; j < N * V; j++) s[j] = load(place + j / V * pad + j % V * W);
    for (int64_t t = -past; t < 0; t++) {
      F k = set(keep[t]);
      UNROLL for (int v = 0; v < V; v++) {
        F in = load(u + t * step + p + v * W);
        UNROLL for (int i = 0; i < N; i++) s[i * V + v] = fma(set(b[t * stride + n + i]), in, s[i * V + v] * k);
      }
    }
    if (tentative && past) put();
    for (int64_t t = 0; t < time; t++) {
      F k = set(keep[t]);
      UNROLL for (int v = 0; v < V; v++) {
        F in = load(u + t * step + p + v * W), sum = load(y + t * step + p + v * W);
        UNROLL for (int i = 0; i < N; i++) {
          int j = i * V + v;
          s[j] = fma(set(b[t * stride + n + i]), in, s[j] * k);
          sum = fma(set(c[t * stride + n + i]), s[j], sum);
        }
        store(y + t * step + p + v * W, sum);
      }
    }
    if (!tentative) put();
  }
  template <int N>
  inline void rows(int64_t n) const {
    int64_t p = 0;
    for (; p + VECTORS * W <= pad; p += VECTORS * W) tile<N, VECTORS>(n, p);
    for (; p < pad; p += W) tile<N, 1>(n, p);
  }
  void all(int64_t count) const {
    int64_t n = 0;
    for (; n + ROWS <= count; n += ROWS) rows<ROWS>(n);
    for (; n < count; n++) rows<1>(n);
  }
};

struct Gradients {
  float *du, *dkeep, *db, *dc, *dstate;
};

// A tile backwards: its states are built again from the one before the block, then dS runs from the end.
//     dS_t += c_t dy_t;  dc_t = S_t dy_t;  du_t += dS_t b_t;  db_t = dS_t u_t;  dkeep_t = <dS_t, S_{t-1}>;  dS *= keep_t
template <int N, int V>
void scan_tile_back(const float* state, int64_t pad, const float* u, const float* dy, int64_t step, const float* b,
                    const float* c, int64_t stride, const float* keep, int64_t time, float* past, Gradients g) {
  F s[N * V];
  UNROLL for (int j = 0; j < N * V; j++) store(past + j * W, s[j] = load(state + j / V * pad + j % V * W));
  for (int64_t t = 0; t < time; t++) {
    F k = set(keep[t]);
    UNROLL for (int v = 0; v < V; v++) {
      F in = load(u + t * step + v * W);
      UNROLL for (int n = 0; n < N; n++) {
        s[n * V + v] = fma(set(b[t * stride + n]), in, s[n * V + v] * k);
        store(past + ((t + 1) * N * V + n * V + v) * W, s[n * V + v]);
      }
    }
  }
  F d[N * V];
  UNROLL for (int j = 0; j < N * V; j++) d[j] = load(g.dstate + j / V * pad + j % V * W);
  for (int64_t t = time - 1; t >= 0; t--) {
    const float *before = past + t * N * V * W, *after = before + N * V * W;
    F k = set(keep[t]), dk = load(g.dkeep + t * W), db[N], dc[N];
    UNROLL for (int n = 0; n < N; n++) {
      db[n] = load(g.db + (t * BACK_ROWS + n) * W);
      dc[n] = load(g.dc + (t * BACK_ROWS + n) * W);
    }
    UNROLL for (int v = 0; v < V; v++) {
      F in = load(u + t * step + v * W), out = load(dy + t * step + v * W), du = load(g.du + t * step + v * W);
      UNROLL for (int n = 0; n < N; n++) {
        int j = n * V + v;
        d[j] = fma(set(c[t * stride + n]), out, d[j]);
        dc[n] = fma(load(after + j * W), out, dc[n]);
        du = fma(set(b[t * stride + n]), d[j], du);
        db[n] = fma(d[j], in, db[n]);
        dk = fma(d[j], load(before + j * W), dk);
        d[j] = d[j] * k;
      }
      store(g.du + t * step + v * W, du);
    }
    store(g.dkeep + t * W, dk);
    UNROLL for (int n = 0; n < N; n++) {
      store(g.db + (t * BACK_ROWS + n) * W, db[n]);
      store(g.dc + (t * BACK_ROWS + n) * W, dc[n]);
    }
  }
  UNROLL for (int j = 0; j < N * V; j++) store(g.dstate + j / V * pad + j % V * W, d[j]);
}

// ----- one group of one row ------------------------------------------------------------------------------------------

template <class T>
struct Group {
  const MambaForward& f;
  Shape s;
  int64_t row, group, head;  // head: the group's first
  int64_t start;             // the row's first token in the call; s.time: how many it has
  int64_t past;              // tokens to be folded before the first
  Work w;
  int64_t from[3], count[3];  // the group's channels of the convolution: x, B, C

  Group(const MambaForward& forward, int64_t item, void* scratch, bool backward)
      : f(forward), s(forward.sizes), row(item / s.groups), group(item % s.groups), head(group * s.share),
        start(f.first(row)), past(f.pending ? f.pending[slot()] : 0), w(s, scratch, backward),
        from{head * s.width, s.inner + group * s.state, s.inner + (s.groups + group) * s.state},
        count{s.share * s.width, s.state, s.state} {
    s.time = f.tokens(row);
    if (s.time == 0) return;
    read_channels(w.bias, f.conv_bias);
    for (int64_t tap = 0; tap < s.taps; tap++)
      read_channels(w.weight + tap * s.stride, f.conv_weight + tap * s.channels);
  }

  template <class Each>
  void each_channel(Each each) const {
    int64_t mine = 0;
    for (int part = 0; part < 3; part++)
      for (int64_t i = 0; i < count[part]; i++) each(mine++, from[part] + i);
  }
  const T* token(int64_t t) const { return static_cast<const T*>(f.input) + (start + t) * s.token; }
  float* raw(int64_t t) const { return w.raw + (s.taps - 1 + t) * s.stride; }
  float* act(int64_t t) const { return w.act + (s.window + t) * s.stride; }
  float* b(int64_t t) const { return act(t) + count[0]; }
  const float* c(int64_t t) const { return b(t) + s.state; }
  float* per_head(float* rows, int64_t t, int64_t h) const { return rows + (t * s.share + h) * s.pad; }
  float* u(int64_t t, int64_t h) const { return per_head(w.u, s.window + t, h); }
  float* keep(int64_t h) const { return w.keep + h * (s.window + Q) + s.window; }
  const int32_t* reach(int64_t t) const { return f.reach ? f.reach + start + t : nullptr; }
  // How many taps reach back from token t inside its document.
  int64_t back(int64_t t) const { return f.reach && *reach(t) < s.taps - 1 ? *reach(t) : s.taps - 1; }
  int64_t slot() const { return f.slot ? f.slot[row] : row; }
  int64_t state_at(int64_t h) const { return ((slot() * s.heads + head + h) * s.state) * s.width; }
  int64_t tail_at(int64_t r) const { return (slot() * s.tail_size() + r) * s.channels; }
  // The convolution's input at token t; before the first it lies in the tail, where there is one.
  const T* conv_input(int64_t t) const {
    if (t >= 0) return token(t) + s.inner;
    return f.tail ? static_cast<const T*>(f.tail) + tail_at(s.taps - 1 + past + t) : nullptr;
  }

  template <class X>
  void read_channels(float* to, const X* channels) const {
    for (int part = 0; part < 3; to += count[part++]) copy(to, channels + from[part], count[part]);
  }

  // The inputs of the convolution at the taps - 1 tokens before `begin`.
  void read_past(int64_t begin) {
    for (int64_t r = 1; r < s.taps; r++) {
      if (const T* channels = conv_input(begin - r))
        read_channels(raw(-r), channels);
      else
        clear(raw(-r), s.stride);
    }
  }

  // Convolution, SiLU, dt, and the scan's input for `time` tokens from `begin`.
  void prepare(int64_t begin, int64_t time) {
    read_past(begin);
    for (int64_t t = 0; t < time; t++) {
      if (begin + t + AHEAD < s.time) {
        for (int part = 0; part < 3; part++) prefetch(token(begin + t + AHEAD) + s.inner + from[part], count[part]);
        prefetch(token(begin + t + AHEAD) + from[0], count[0]);
      }
      read_channels(raw(t), token(begin + t) + s.inner);
      int64_t reaching = back(begin + t);
      float* pre = w.pre + t * s.stride;
      for (int64_t i = 0; i < s.mine; i += W) {
        F sum = load(w.bias + i);
        for (int64_t r = reaching; r >= 0; r--)
          sum = fma(load(w.weight + (s.taps - 1 - r) * s.stride + i), load(raw(t - r) + i), sum);
        store(pre + i, sum);
        store(act(t) + i, sum * sigmoid(sum));
      }
    }
    for (int64_t h = 0; h < s.share; h++) {
      steps(begin, time, h);
      for (int64_t t = 0; t < time; t++) {
        float* x = per_head(w.x, t, h);
        copy(x, act(t) + h * s.width, s.width);
        if (s.pad != s.width) clear(x + s.width, s.pad - s.width);
        for (int64_t p = 0; p < s.pad; p += W) store(u(t, h) + p, set(w.dt[h * Q + t]) * load(x + p));
      }
    }
  }

  // The step sizes of one head, its decays, and the derivative of the softplus.
  void steps(int64_t begin, int64_t time, int64_t h) {
    float *dt = w.dt + h * Q, *rate = w.rate + h * Q, *decay = keep(h), a = f.a[head + h];
    for (int64_t t = 0; t < time; t++)
      dt[t] = scalar(token(begin + t) + s.inner + s.channels + head + h) + f.dt_bias[head + h];
    for (int64_t t = 0; t < time; t += W) {
      F v = load(dt + t, time - t), step = softplus(v);
      store(rate + t, sigmoid(v));
      store(dt + t, step);
      store(decay + t, exp(step * set(a)));
    }
    for (int64_t t = 0; t < time && f.reach; t++)
      if (*reach(begin + t) == 0) decay[t] = 0.0f;
  }

  // ----- forward

  void forward() {
    for (int64_t h = 0; h < s.share; h++) read_state(h, f.state ? f.state + state_at(h) : nullptr);
    for (int64_t t = -past; t < 0; t++) recall(t);
    if (s.time == 0) scan(past, 0, false);
    for (int64_t begin = 0, chunk = 0; begin < s.time; begin += Q, chunk++) {
      int64_t time = s.time - begin < Q ? s.time - begin : Q;
      if (f.borders)
        for (int64_t h = 0; h < s.share; h++) copy_state(border(chunk, h), state_of(h), s.width, s.pad);
      prepare(begin, time);
      clear(w.y, time * s.share * s.pad);
      scan(begin ? 0 : past, time, f.tentative);
      for (int64_t t = 0; t < time; t++) finish(begin, t);
    }
    for (int64_t h = 0; h < s.share && s.pad != s.width; h++)
      copy_state(f.last_state + state_at(h), state_of(h), s.width, s.pad);
    if (f.last_tail) write_tail();
    for (int64_t t = 0; t < s.time && f.tentative; t++) keep_token(t);
  }

  // Each of three pieces of what is kept of a token, (kept, scratch, count): dt x of a head, b, the decay of a head.
  template <class Each>
  void each_kept(int64_t slot_token, int64_t t, Each each) const {
    float* kept = f.kept + (slot() * s.window + slot_token) * s.kept_size();
    for (int64_t h = 0; h < s.share; h++) each(kept + (head + h) * s.width, u(t, h), s.width);
    each(kept + s.inner + group * s.state, b(t), s.state);
    for (int64_t h = 0; h < s.share; h++) each(kept + s.inner + s.groups * s.state + head + h, keep(h) + t, 1);
  }
  void keep_token(int64_t t) const {
    each_kept(t, t, [](float* kept, const float* here, int64_t count) { copy(kept, here, count); });
  }
  void recall(int64_t t) const {
    clear(u(t, 0), s.share * s.pad);
    each_kept(past + t, t, [](const float* kept, float* here, int64_t count) { copy(here, kept, count); });
  }

  // The group's channels of the last taps - 1 inputs, and behind them those of tentative tokens. In order, so that a
  // tail may be moved within its own memory.
  void write_tail() const {
    int64_t first = (f.tentative ? 0 : s.time) - (s.taps - 1);
    for (int64_t t = first; t < s.time; t++) {
      T* to = static_cast<T*>(f.last_tail) + tail_at(t - first);
      const T* channels = conv_input(t);
      for (int part = 0; part < 3; part++)
        channels ? static_cast<void>(memmove(to + from[part], channels + from[part], count[part] * sizeof(T)))
                 : static_cast<void>(memset(to + from[part], 0, count[part] * sizeof(T)));
    }
  }

  // Where a head's state is while it changes: in place where its rows are whole vectors.
  float* state_of(int64_t h) const {
    return s.pad == s.width && f.last_state ? f.last_state + state_at(h) : w.state + h * s.state_size();
  }
  float* border(int64_t chunk, int64_t h) const {
    int64_t chunks = (s.time + Q - 1) / Q;
    return f.borders + ((row * chunks + chunk) * s.heads + head + h) * s.state * s.width;
  }
  void read_state(int64_t h, const float* from_state) {
    float* mine = state_of(h);
    if (mine == from_state) return;
    clear(mine, s.state_size());
    if (from_state) copy_state(mine, from_state, s.pad, s.width);
  }
  void copy_state(float* to, const float* source, int64_t to_width, int64_t source_width) const {
    for (int64_t n = 0; n < s.state; n++)
      copy(to + n * to_width, source + n * source_width, s.width);
  }

  void scan(int64_t before, int64_t time, bool tentative) {
    for (int64_t h = 0; h < s.share; h++) {
      Scan one{state_of(h), u(0, h), b(0), c(0), keep(h), per_head(w.y, 0, h), s.pad, s.share * s.pad, s.stride,
               before, time, tentative};
      one.all(s.state);
    }
  }

  // The skip and the gate of one token: fills post, gate and unit, and gives 1 / (root mean square of unit).
  float gated(int64_t begin, int64_t t) {
    int64_t inner = count[0];
    clear(w.post + inner, whole_vectors(inner) - inner);
    clear(w.gate + inner, whole_vectors(inner) - inner);
    copy(w.gate, token(begin + t) + from[0], inner);
    for (int64_t h = 0; h < s.share; h++) {
      const float *x = per_head(w.x, t, h), *y = per_head(w.y, t, h);
      for (int64_t p = 0; p < s.width; p += W)
        store(w.post + h * s.width + p, fma(set(f.skip[head + h]), load(x + p), load(y + p)), s.width - p);
    }
    F square = set(0.0f);
    for (int64_t i = 0; i < inner; i += W) {
      F z = load(w.gate + i), gate = z * sigmoid(z), v = load(w.post + i) * gate;
      store(w.gate + i, gate);
      store(w.unit + i, v);
      square = fma(v, v, square);
    }
    return 1.0f / ::sqrtf(sum_lanes(square) / static_cast<float>(inner) + s.eps);
  }

  void finish(int64_t begin, int64_t t) {
    int64_t at = (start + begin + t) * s.inner + from[0];
    T* output = static_cast<T*>(f.output) + at;
    if (f.y)
      for (int64_t h = 0; h < s.share; h++)
        copy(f.y + at + h * s.width, per_head(w.y, t, h), s.width);
    F scale = set(gated(begin, t));
    const float* weight = f.norm_weight + from[0];
    // Rounded before the weight is applied, as the published models do.
    for (int64_t i = 0; i < count[0]; i += W) {
      F unit = rounded(load(w.unit + i) * scale, output);
      store(output + i, unit * load(weight + i, count[0] - i), count[0] - i);
    }
  }

  // ----- backward

  void backward(const MambaBackward& g) {
    for (int64_t h = 0; h < s.share; h++) {
      float* mine = w.dstate + h * s.state_size();
      clear(mine, s.state_size());
      if (g.dlast_state) copy_state(mine, g.dlast_state + state_at(h), s.pad, s.width);
      g.da[row * s.heads + head + h] = g.dskip[row * s.heads + head + h] = g.ddt_bias[row * s.heads + head + h] = 0.0f;
    }
    clear(w.dweight, s.taps * s.stride);
    clear(w.dbias, s.stride);
    clear(w.dnorm, whole_vectors(count[0]));
    clear(w.draw, (s.taps - 1 + Q) * s.stride);
    clear(w.dact, Q * s.stride);
    clear(w.dy, Q * s.share * s.pad);
    for (int64_t chunk = (s.time + Q - 1) / Q - 1; chunk >= 0; chunk--) {
      int64_t begin = chunk * Q, time = s.time - begin < Q ? s.time - begin : Q;
      prepare(begin, time);
      for (int64_t h = 0; h < s.share; h++) read_state(h, border(chunk, h));
      for (int64_t t = 0; t < time; t++) finish_back(g, begin, t);
      scan_back(time);
      for (int64_t t = 0; t < time; t++)
        for (int64_t h = 0; h < s.share; h++) step_back(g, begin, t, h);
      convolve_back(g, begin, time);
    }
    write_gradients(g);
  }

  T* dtoken(const MambaBackward& g, int64_t t) const { return static_cast<T*>(g.dinput) + (start + t) * s.token; }

  // Through norm, gate and skip of one token: fills dy, writes dz, adds to the gradients of D and the norm's weight.
  void finish_back(const MambaBackward& g, int64_t begin, int64_t t) {
    int64_t at = (start + begin + t) * s.inner + from[0], inner = count[0];
    for (int64_t h = 0; h < s.share; h++) copy(per_head(w.y, t, h), f.y + at + h * s.width, s.width);
    F scale = set(gated(begin, t)), dot = set(0.0f);
    const T *dout = static_cast<const T*>(g.doutput) + at, *z_row = token(begin + t) + from[0];
    for (int64_t i = 0; i < inner; i += W) {
      F unit = load(w.unit + i) * scale, d = load(dout + i, inner - i);
      store(w.dnorm + i, fma(d, unit, load(w.dnorm + i)));
      dot = fma(d * load(f.norm_weight + from[0] + i, inner - i), unit, dot);
      store(w.unit + i, unit);
    }
    F mean = set(sum_lanes(dot) / static_cast<float>(inner));
    T* dz = dtoken(g, begin + t) + from[0];
    for (int64_t i = 0; i < inner; i += W) {
      F dunit = load(dout + i, inner - i) * load(f.norm_weight + from[0] + i, inner - i);
      F dv = scale * (dunit - load(w.unit + i) * mean), z = load(z_row + i, inner - i), open = sigmoid(z);
      F slope = open * fma(z, set(1.0f) - open, set(1.0f));
      store(dz + i, dv * load(w.post + i) * slope, inner - i);
      store(w.unit + i, dv * load(w.gate + i));
    }
    for (int64_t h = 0; h < s.share; h++) {
      copy(per_head(w.dy, t, h), w.unit + h * s.width, s.width);
      F sum = set(0.0f);
      for (int64_t p = 0; p < s.pad; p += W) sum = fma(load(per_head(w.dy, t, h) + p), load(per_head(w.x, t, h) + p), sum);
      g.dskip[row * s.heads + head + h] += sum_lanes(sum);
    }
  }

  void scan_back(int64_t time) {
    clear(w.du, time * s.share * s.pad);
    clear(w.dkeep, s.share * Q * W);
    int64_t n = 0;
    for (; n + BACK_ROWS <= s.state; n += BACK_ROWS) scan_back_rows<BACK_ROWS>(n, time);
    for (; n < s.state; n++) scan_back_rows<1>(n, time);
  }

  template <int N>
  void scan_back_rows(int64_t n, int64_t time) {
    clear(w.db, time * BACK_ROWS * W);
    clear(w.dc, time * BACK_ROWS * W);
    for (int64_t h = 0; h < s.share; h++) {
      int64_t p = 0;
      for (; p + BACK_VECTORS * W <= s.pad; p += BACK_VECTORS * W) scan_back_tile<N, BACK_VECTORS>(h, n, p, time);
      for (; p < s.pad; p += W) scan_back_tile<N, 1>(h, n, p, time);
    }
    for (int64_t t = 0; t < time; t++)
      for (int j = 0; j < N; j++) {
        float* dact = w.dact + t * s.stride + count[0] + n + j;
        dact[0] = sum_lanes(load(w.db + (t * BACK_ROWS + j) * W));
        dact[s.state] = sum_lanes(load(w.dc + (t * BACK_ROWS + j) * W));
      }
  }

  template <int N, int V>
  void scan_back_tile(int64_t h, int64_t n, int64_t p, int64_t time) {
    int64_t at = h * s.state_size() + n * s.pad + p;
    Gradients to{per_head(w.du, 0, h) + p, w.dkeep + h * Q * W, w.db, w.dc, w.dstate + at};
    scan_tile_back<N, V>(w.state + at, s.pad, u(0, h) + p, per_head(w.dy, 0, h) + p, s.share * s.pad,
                         b(0) + n, c(0) + n, s.stride, keep(h), time, w.past, to);
  }

  // Through u = dt x, keep = exp(dt a), dt = softplus(raw + bias), and the skip's share of dx.
  void step_back(const MambaBackward& g, int64_t begin, int64_t t, int64_t h) {
    int64_t at = row * s.heads + head + h;
    float dt = w.dt[h * Q + t], *dx = w.dact + t * s.stride + h * s.width;
    F sum = set(0.0f), skip = set(f.skip[head + h]);
    for (int64_t p = 0; p < s.pad; p += W) {
      F du = load(per_head(w.du, t, h) + p);
      sum = fma(du, load(per_head(w.x, t, h) + p), sum);
      F both = fma(du, set(dt), skip * load(per_head(w.dy, t, h) + p));
      store(dx + p, both, s.width - p);
    }
    float dlog = sum_lanes(load(w.dkeep + (h * Q + t) * W)) * keep(h)[t];
    float dv = (sum_lanes(sum) + dlog * f.a[head + h]) * w.rate[h * Q + t];
    g.da[at] += dlog * dt;
    g.ddt_bias[at] += dv;
    copy(dtoken(g, begin + t) + s.inner + s.channels + head + h, &dv, 1);
  }

  void convolve_back(const MambaBackward& g, int64_t begin, int64_t time) {
    // Rows -1, -2, ... of the later block, already in draw, are this block's last ones.
    float* draw = w.draw + (s.taps - 1) * s.stride;
    for (int64_t r = 1; r < s.taps && begin + time < s.time; r++)
      memcpy(draw + (time - r) * s.stride, draw - r * s.stride, s.stride * sizeof(float));
    clear(w.draw, (s.taps - 1) * s.stride);
    for (int64_t t = 0; t < time; t++) {
      int64_t reaching = back(begin + t);
      for (int64_t i = 0; i < s.mine; i += W) {
        F pre = load(w.pre + t * s.stride + i), open = sigmoid(pre);
        F d = load(w.dact + t * s.stride + i) * open * fma(pre, set(1.0f) - open, set(1.0f));
        store(w.dbias + i, d + load(w.dbias + i));
        for (int64_t r = 0; r <= reaching; r++) {
          int64_t tap = (s.taps - 1 - r) * s.stride + i, there = (t - r) * s.stride + i;
          store(draw + there, fma(load(w.weight + tap), d, load(draw + there)));
          store(w.dweight + tap, fma(load(raw(t - r) + i), d, load(w.dweight + tap)));
        }
      }
    }
    for (int64_t t = 0; t < time; t++) {
      const float* mine = draw + t * s.stride;
      for (int part = 0; part < 3; mine += count[part++])
        copy(dtoken(g, begin + t) + s.inner + from[part], mine, count[part]);
    }
    // What is left in the block's rows belongs to no other block.
    clear(draw, time * s.stride);
  }

  void write_gradients(const MambaBackward& g) {
    each_channel([&](int64_t mine, int64_t channel) {
      g.dconv_bias[row * s.channels + channel] = w.dbias[mine];
      for (int64_t tap = 0; tap < s.taps; tap++)
        g.dconv_weight[(row * s.taps + tap) * s.channels + channel] = w.dweight[tap * s.stride + mine];
      for (int64_t r = 1; r < s.taps && g.dtail; r++)
        g.dtail[(row * (s.taps - 1) + s.taps - 1 - r) * s.channels + channel] =
            w.draw[(s.taps - 1 - r) * s.stride + mine];
    });
    memcpy(g.dnorm_weight + row * s.inner + from[0], w.dnorm, count[0] * sizeof(float));
    for (int64_t h = 0; h < s.share && g.dstate; h++)
      copy_state(g.dstate + state_at(h), w.dstate + h * s.state_size(), s.width, s.pad);
  }
};

void mamba_forward(const MambaForward* f, int64_t item, void* scratch) {
  f->sizes.bf16 ? Group<uint16_t>(*f, item, scratch, false).forward() : Group<float>(*f, item, scratch, false).forward();
}
void mamba_backward(const MambaBackward* g, int64_t item, void* scratch) {
  g->forward.sizes.bf16 ? Group<uint16_t>(g->forward, item, scratch, true).backward(*g)
                        : Group<float>(g->forward, item, scratch, true).backward(*g);
}
int64_t mamba_scratch(const MambaSizes* sizes, int backward) {
  return Work(Shape(*sizes), nullptr, backward).pieces.bytes;
}

}  // namespace

void NAUTILUS_FILL(mamba)(Kernels* k) {
  k->mamba_forward = mamba_forward;
  k->mamba_backward = mamba_backward;
  k->mamba_scratch = mamba_scratch;
}
