// Mixture of experts: out = sum_k w_k down_k act_k(x), with squared ReLU, act = relu(up x)^2, or gated, act = silu(gate x)
// up x; one expert at a time over the tokens that chose it. Activations A are bf16 or float, sums float; weights may be
// float32 masters beside bf16 activations and are rounded as they are packed.
#include <type_traits>

#include "activation.h"
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"

namespace {

using bf16 = uint16_t;
// Pairs of an expert worked on at a time. Even, and no matter of registers: gradients of weights are sums over chunks.
constexpr int64_t CHUNK = 192;

template <class A>
struct Work {
  const A *up, *down, *gate;   // packed; gate and what is made of it only where there are gates
  A *act, *dup, *dgate;        // (CHUNK, F)
  A *act_steps, *dup_steps, *dgate_steps;  // the same in steps, for products over tokens: bf16 rows are zipped in twos
  A *x_steps, *dout_steps;     // (CHUNK, X) in steps
  A* scaled;                   // (2, X)
  const A **rows, **gate_rows; // (larger of CHUNK and the widths): pointers to rows
  float* dweight;              // (CHUNK)
  Scratch pieces;

  Work(const ExpertsSizes& s, void* scratch, bool backward) : pieces{static_cast<char*>(scratch)} {
    auto numbers = [&](int64_t count) { return pieces.take<A>(count); };
    int64_t widest = s.hidden > s.width ? s.hidden : s.width;
    // Each matrix is packed along one axis in the forward and along the other in the backward.
    int64_t size = s.packed ? 0 : packed_size<A>(widest, widest);
    up = numbers(size);
    down = numbers(size);
    gate = numbers(s.gated ? size : 0);
    act = numbers(CHUNK * s.hidden);
    rows = pieces.take<const A*>(CHUNK > widest ? CHUNK : widest);
    if (!backward) return;
    dup = numbers(CHUNK * s.hidden);
    act_steps = numbers(CHUNK * s.hidden + 2 * W);
    dup_steps = numbers(CHUNK * s.hidden + 2 * W);
    x_steps = numbers(CHUNK * s.width + 2 * W);
    dout_steps = numbers(CHUNK * s.width + 2 * W);
    scaled = numbers(2 * s.width);
    dweight = pieces.take<float>(CHUNK);
    dgate = numbers(s.gated ? CHUNK * s.hidden : 0);
    dgate_steps = numbers(s.gated ? CHUNK * s.hidden + 2 * W : 0);
    gate_rows = pieces.take<const A*>(CHUNK);
  }
};

// What is stored and read again, so that later passes see the same number.
template <class A>
F kept(A* to, F value, int64_t count) {
  store(to, value, count);
  return load(to, count);
}

// Two rows in steps along the rows; `second` may be null.
void in_steps(bf16* to, const bf16* first, const bf16* second, int64_t count) { zip(to, first, second, count); }
void in_steps(float* to, const float* first, const float* second, int64_t count) {
  memcpy(to, first, count * sizeof(float));
  if (second) memcpy(to + count, second, count * sizeof(float));
}

template <class A, class T>
struct Expert {
  static constexpr int K = Step<A>::K;
  const ExpertsForward& f;
  const ExpertsSizes& s;
  int64_t expert, begin, end;
  Work<A> w;

  Expert(const ExpertsForward& forward, int64_t which, void* scratch, bool backward)
      : f(forward), s(forward.sizes), expert(which), begin(f.first[which]), end(f.first[which + 1]),
        w(s, scratch, backward) {}

  const T* up() const { return static_cast<const T*>(f.up) + expert * s.hidden * s.width; }
  const T* down() const { return static_cast<const T*>(f.down) + expert * s.hidden * s.width; }
  const T* gate() const { return static_cast<const T*>(f.gate) + expert * s.hidden * s.width; }
  int64_t token(int64_t z) const { return f.pair[z] / s.active; }
  A* hidden(int64_t z) const { return static_cast<A*>(f.hidden) + z * s.hidden; }
  A* gate_hidden(int64_t z) const { return static_cast<A*>(f.gate_hidden) + z * s.hidden; }
  A* y(int64_t z) const { return static_cast<A*>(f.y) + z * s.width; }
  int64_t chunk(int64_t z) const { return end - z < CHUNK ? end - z : CHUNK; }

  Rows<A> token_rows(const void* matrix, int64_t z, int64_t count) const {
    for (int64_t i = 0; i < count; i++) w.rows[i] = static_cast<const A*>(matrix) + token(z + i) * s.width;
    return {w.rows, K};
  }
  Rows<A> rows_of(const A** rows, const A* matrix, int64_t width, int64_t count, int64_t step) const {
    for (int64_t i = 0; i < count; i++) rows[i] = matrix + i * width;
    return {rows, step};
  }
  Rows<A> own_rows(const A* matrix, int64_t width, int64_t count, int64_t step) const {
    return rows_of(w.rows, matrix, width, count, step);
  }

  // This expert's matrix (n, k) in panels: where they lie, or made in `scratch`.
  void in_columns(const A*& scratch, const void* all, const T* matrix, int64_t k, int64_t n) const {
    if (s.packed)
      scratch = static_cast<const A*>(all) + expert * packed_size<A>(k, n);
    else
      pack_columns(const_cast<A*>(scratch), matrix, k, n);
  }

  void forward() {
    if (begin == end) return;
    in_columns(w.up, f.up, up(), s.width, s.hidden);
    in_columns(w.down, f.down, down(), s.hidden, s.width);
    if (s.gated) in_columns(w.gate, f.gate, gate(), s.width, s.hidden);
    for (int64_t z = begin; z < end; z += CHUNK) {
      int64_t count = chunk(z);
      Rows<A> x = token_rows(f.x, z, count);
      if (s.gated)
        gemm(x, count, packed<A>(w.gate, s.width), s.width, s.hidden,
             [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
               for (int64_t r = 0; r < rows; r++) copy(gate_hidden(z + m + r) + n, c + r * PANEL, columns);
             });
      gemm(x, count, packed<A>(w.up, s.width), s.width, s.hidden,
           [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
             for (int64_t r = 0; r < rows; r++)
               for (int64_t j = 0; j < columns; j += W) {
                 F h = kept(hidden(z + m + r) + n + j, load(c + r * PANEL + j), columns - j);
                 store(w.act + (m + r) * s.hidden + n + j, activated(z + m + r, n + j, h, columns - j), columns - j);
               }
           });
      gemm(own_rows(w.act, s.hidden, count, K), count, packed<A>(w.down, s.hidden), s.hidden, s.width,
           [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
             for (int64_t r = 0; r < rows; r++) copy(y(z + m + r) + n, c + r * PANEL, columns);
           });
    }
  }

  // What meets `down`, of some numbers h of up x.
  F activated(int64_t z, int64_t column, F h, int64_t count) const {
    if (s.gated) return silu(load(gate_hidden(z) + column, count)) * h;
    h = larger(h, set(0.0f));
    return h * h;
  }

  void backward(const ExpertsBackward& g) {
    int64_t size = s.hidden * s.width;
    float *dup = g.dup + expert * size, *ddown = g.ddown + expert * size, *dgate = s.gated ? g.dgate + expert * size : nullptr;
    if (begin == end) {
      memset(dup, 0, size * sizeof(float));
      memset(ddown, 0, size * sizeof(float));
      if (s.gated) memset(dgate, 0, size * sizeof(float));
      return;
    }
    pack_rows(const_cast<A*>(w.down), down(), s.width, s.hidden);
    pack_rows(const_cast<A*>(w.up), up(), s.hidden, s.width);
    if (s.gated) pack_rows(const_cast<A*>(w.gate), gate(), s.hidden, s.width);
    for (int64_t z = begin; z < end; z += CHUNK) {
      int64_t count = chunk(z);
      through_activation(g, z, count);
      zip_chunk(g, z, count);
      bool first = z == begin;
      outer(ddown, w.dout_steps, s.width, w.act_steps, s.hidden, count, first);
      outer(dup, w.dup_steps, s.hidden, w.x_steps, s.width, count, first);
      if (s.gated) outer(dgate, w.dgate_steps, s.hidden, w.x_steps, s.width, count, first);
      through_input(z, count);
    }
  }

  // up^T d(up x) + gate^T d(gate x). The pairs' outputs are not needed any more: the gradients of the pairs' inputs take
  // their place.
  void through_input(int64_t z, int64_t count) {
    Columns<A> up = packed<A>(w.up, s.hidden), gate = packed<A>(w.gate, s.hidden);
    Rows<A> dup = own_rows(w.dup, s.hidden, count, K), dgate{};
    if (s.gated) dgate = rows_of(w.gate_rows, w.dgate, s.hidden, count, K);
    gemm(dup, count, up, s.hidden, s.width, [&](int64_t m, int64_t rows, int64_t n, int64_t columns, float* c) {
      if (s.gated)
        gemm_block<A>({dgate.row + m, K}, rows, gate.base + n / PANEL * gate.panel, gate.step, steps<A>(s.hidden), columns, c,
                      true);
      for (int64_t r = 0; r < rows; r++) copy(y(z + m + r) + n, c + r * PANEL, columns);
    });
  }

  // dact = down^T dout; the weight's gradient is <act, dact>; d(up x) = weight dact 2 relu(up x), or where there are gates
  // weight dact silu(gate x), and d(gate x) = weight dact up x silu'(gate x).
  void through_activation(const ExpertsBackward& g, int64_t z, int64_t count) {
    for (int64_t i = 0; i < count; i++) w.dweight[i] = 0.0f;
    gemm(token_rows(g.doutput, z, count), count, packed<A>(w.down, s.width), s.width, s.hidden,
         [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
           for (int64_t i = m; i < m + rows; i++) {
             F inner = set(0.0f), weight = set(f.weight[f.pair[z + i]]);
             for (int64_t j = 0; j < columns; j += W) {
               int64_t at = i * s.hidden + n + j, left = columns - j;
               F h = load(hidden(z + i) + n + j, left), dact = load(c + (i - m) * PANEL + j);
               inner = fma(kept(w.act + at, activated(z + i, n + j, h, left), left), dact, inner);
               dact = weight * dact;
               if (s.gated) {
                 F gate = load(gate_hidden(z + i) + n + j, left);
                 store(w.dup + at, dact * silu(gate), left);
                 store(w.dgate + at, dact * h * silu_slope(gate), left);
               } else {
                 F open = larger(h, set(0.0f));
                 store(w.dup + at, dact * (open + open), left);
               }
             }
             w.dweight[i] += sum_lanes(inner);
           }
         });
    for (int64_t i = 0; i < count; i++) g.dweight[f.pair[z + i]] = w.dweight[i];
  }

  void zip_chunk(const ExpertsBackward& g, int64_t z, int64_t count) {
    const A *x = static_cast<const A*>(f.x), *dout = static_cast<const A*>(g.doutput);
    for (int64_t i = 0; i < count; i += 2) {
      bool both = i + 1 < count;
      in_steps(w.act_steps + i * s.hidden, w.act + i * s.hidden, both ? w.act + (i + 1) * s.hidden : nullptr, s.hidden);
      in_steps(w.dup_steps + i * s.hidden, w.dup + i * s.hidden, both ? w.dup + (i + 1) * s.hidden : nullptr, s.hidden);
      if (s.gated)
        in_steps(w.dgate_steps + i * s.hidden, w.dgate + i * s.hidden, both ? w.dgate + (i + 1) * s.hidden : nullptr,
                 s.hidden);
      in_steps(w.x_steps + i * s.width, x + token(z + i) * s.width, both ? x + token(z + i + 1) * s.width : nullptr, s.width);
      for (int64_t r = 0; r < 1 + both; r++) {
        F weight = set(f.weight[f.pair[z + i + r]]);
        const A* row = dout + token(z + i + r) * s.width;
        for (int64_t j = 0; j < s.width; j += W)
          store(w.scaled + r * s.width + j, weight * load(row + j, s.width - j), s.width - j);
      }
      in_steps(w.dout_steps + i * s.width, w.scaled, both ? w.scaled + s.width : nullptr, s.width);
    }
  }

  // to[m][n] (+)= sum over tokens of left[token][m] right[token][n], both in steps.
  void outer(float* to, const A* left, int64_t m_count, const A* right, int64_t n_count, int64_t tokens, bool first) {
    gemm(own_rows(left, K, m_count, K * m_count), m_count, Columns<A>{right, K * PANEL, K * n_count}, tokens, n_count,
         [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
           for (int64_t r = 0; r < rows; r++)
             for (int64_t j = 0; j < columns; j += W) {
               float* at = to + (m + r) * n_count + n + j;
               F sum = load(c + r * PANEL + j);
               store(at, first ? sum : sum + load(at, columns - j), columns - j);
             }
         });
  }
};

// A counting sort: stable, so that an expert sees its tokens in order.
int experts_sort(const ExpertsForward* f) {
  const ExpertsSizes& s = f->sizes;
  int64_t pairs = s.tokens * s.active;
  for (int64_t i = 0; i < pairs; i++)
    if (f->index[i] < 0 || f->index[i] >= s.experts) return 2;
  memset(f->first, 0, (s.experts + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < pairs; i++) f->first[f->index[i] + 1]++;
  for (int64_t e = 0; e < s.experts; e++) f->first[e + 1] += f->first[e];
  for (int64_t i = 0; i < pairs; i++) {
    int32_t z = f->first[f->index[i]]++;
    f->pair[z] = static_cast<int32_t>(i);
    f->place[i] = z;
  }
  for (int64_t e = s.experts; e > 0; e--) f->first[e] = f->first[e - 1];
  f->first[0] = 0;
  return 0;
}

// Each token's pairs are added up in the order of their experts, whatever order the router named them in. An item is some
// columns of some tokens.
template <class A>
void combine(const ExpertsForward* f, const void* pairs, void* output, int weighted, int64_t item) {
  const ExpertsSizes& s = f->sizes;
  int64_t parts = (s.width + EXPERTS_COLUMNS - 1) / EXPERTS_COLUMNS, begin = item % parts * EXPERTS_COLUMNS;
  int64_t end = begin + EXPERTS_COLUMNS < s.width ? begin + EXPERTS_COLUMNS : s.width;
  int64_t first = item / parts * EXPERTS_TOKENS, last = first + EXPERTS_TOKENS < s.tokens ? first + EXPERTS_TOKENS : s.tokens;
  for (int64_t t = first; t < last; t++) {
    const int32_t* place = f->place + t * s.active;
    // Sorted by insertion: a token has few pairs.
    int64_t order[EXPERTS_ACTIVE];
    for (int64_t k = 0; k < s.active; k++) {
      int64_t at = k;
      for (; at > 0 && place[order[at - 1]] > place[k]; at--) order[at] = order[at - 1];
      order[at] = k;
    }
    for (int64_t j = begin; j < end; j += W) {
      F sum = set(0.0f);
      for (int64_t i = 0; i < s.active; i++) {
        int64_t k = order[i];
        F y = load(static_cast<const A*>(pairs) + place[k] * s.width + j, end - j);
        sum = fma(set(weighted ? f->weight[t * s.active + k] : 1.0f), y, sum);
      }
      store(static_cast<A*>(output) + t * s.width + j, sum, end - j);
    }
  }
}
void experts_combine(const ExpertsForward* f, const void* pairs, void* output, int weighted, int64_t item) {
  f->sizes.bf16 ? combine<bf16>(f, pairs, output, weighted, item) : combine<float>(f, pairs, output, weighted, item);
}

// Calls with<A, T>(): the types of activations and weights.
template <class With>
void with_types(const ExpertsSizes& s, With with) {
  if (s.bf16)
    s.weights_bf16 ? with(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr))
                   : with(static_cast<bf16*>(nullptr), static_cast<float*>(nullptr));
  else
    s.weights_bf16 ? with(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr))
                   : with(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
}
void experts_forward(const ExpertsForward* f, int64_t expert, void* scratch) {
  with_types(f->sizes, [&](auto* activation, auto* weight) {
    Expert<std::remove_pointer_t<decltype(activation)>, std::remove_pointer_t<decltype(weight)>>(*f, expert, scratch, false)
        .forward();
  });
}
void experts_backward(const ExpertsBackward* g, int64_t expert, void* scratch) {
  with_types(g->forward.sizes, [&](auto* activation, auto* weight) {
    Expert<std::remove_pointer_t<decltype(activation)>, std::remove_pointer_t<decltype(weight)>>(g->forward, expert,
                                                                                                scratch, true)
        .backward(*g);
  });
}
int64_t experts_scratch(const ExpertsSizes* sizes, int backward) {
  return sizes->bf16 ? Work<bf16>(*sizes, nullptr, backward).pieces.bytes
                     : Work<float>(*sizes, nullptr, backward).pieces.bytes;
}

}  // namespace

void NAUTILUS_FILL(experts)(Kernels* k) {
  k->experts_sort = experts_sort;
  k->experts_forward = experts_forward;
  k->experts_backward = experts_backward;
  k->experts_combine = experts_combine;
  k->experts_scratch = experts_scratch;
}
