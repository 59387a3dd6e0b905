// Mixture of experts with squared ReLU: out = sum_k w_k down_k relu(up_k x)^2, one expert at a time over the tokens that
// chose it. Activations are bf16, sums float32; weights may be float32 masters and are rounded as they are packed.
#include "gemm.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;
constexpr int64_t CHUNK = 32 * TILE_ROWS;  // pairs of an expert worked on at a time; even

struct Work {
  bf16 *up, *down;                // packed
  bf16 *act, *dup;                // (CHUNK, F)
  bf16 *act_pairs, *dup_pairs;    // (CHUNK / 2, F, 2): rows zipped, for products over tokens
  bf16 *x_pairs, *dout_pairs;     // (CHUNK / 2, X, 2)
  bf16* scaled;                   // (2, X)
  const bf16** rows;              // (CHUNK + E): pointers to rows of A
  float* dweight;                 // (CHUNK)
  int64_t bytes = 0;

  Work(const ExpertsSizes& s, void* scratch, bool backward) {
    char* base = static_cast<char*>(scratch);
    auto take = [&](int64_t size) {
      char* piece = base + bytes;
      bytes += (size + 63) / 64 * 64 + 64;
      return piece;
    };
    auto numbers = [&](int64_t count) { return reinterpret_cast<bf16*>(take(count * 2)); };
    int64_t widest = s.hidden > s.width ? s.hidden : s.width;
    // Each matrix is packed along one axis in the forward and along the other in the backward.
    up = numbers(packed_size(widest, widest));
    down = numbers(packed_size(widest, widest));
    act = numbers(CHUNK * s.hidden);
    rows = reinterpret_cast<const bf16**>(take((CHUNK > widest ? CHUNK : widest) * 8));
    if (!backward) return;
    dup = numbers(CHUNK * s.hidden);
    act_pairs = numbers(CHUNK * s.hidden + 2 * W);
    dup_pairs = numbers(CHUNK * s.hidden + 2 * W);
    x_pairs = numbers(CHUNK * s.width + 2 * W);
    dout_pairs = numbers(CHUNK * s.width + 2 * W);
    scaled = numbers(2 * s.width);
    dweight = reinterpret_cast<float*>(take(CHUNK * 4));
  }
};

// What is stored and read again, so that later passes see the same number.
F kept(bf16* to, F value, int64_t count) {
  store(to, value, count);
  return load(to, count);
}

template <class T>
struct Expert {
  const ExpertsForward& f;
  const ExpertsSizes& s;
  int64_t expert, begin, end;
  Work w;

  Expert(const ExpertsForward& forward, int64_t which, void* scratch, bool backward)
      : f(forward), s(forward.sizes), expert(which), begin(f.first[which]), end(f.first[which + 1]),
        w(s, scratch, backward) {}

  const T* up() const { return static_cast<const T*>(f.up) + expert * s.hidden * s.width; }
  const T* down() const { return static_cast<const T*>(f.down) + expert * s.hidden * s.width; }
  int64_t token(int64_t z) const { return f.pair[z] / s.active; }
  bf16* hidden(int64_t z) const { return static_cast<bf16*>(f.hidden) + z * s.hidden; }
  bf16* y(int64_t z) const { return static_cast<bf16*>(f.y) + z * s.width; }
  int64_t chunk(int64_t z) const { return end - z < CHUNK ? end - z : CHUNK; }

  Rows token_rows(const void* matrix, int64_t z, int64_t count) const {
    for (int64_t i = 0; i < count; i++) w.rows[i] = static_cast<const bf16*>(matrix) + token(z + i) * s.width;
    return {w.rows, 2};
  }
  Rows own_rows(const bf16* matrix, int64_t width, int64_t count, int64_t step) const {
    for (int64_t i = 0; i < count; i++) w.rows[i] = matrix + i * width;
    return {w.rows, step};
  }

  void forward() {
    if (begin == end) return;
    pack_columns(w.up, up(), s.width, s.hidden);
    pack_columns(w.down, down(), s.hidden, s.width);
    for (int64_t z = begin; z < end; z += CHUNK) {
      int64_t count = chunk(z);
      gemm(token_rows(f.x, z, count), count, packed(w.up, s.width), s.width, s.hidden,
           [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
             for (int64_t r = 0; r < rows; r++)
               for (int64_t j = 0; j < columns; j += W) {
                 F h = larger(kept(hidden(z + m + r) + n + j, load(c + r * PANEL + j), columns - j), set(0.0f));
                 store(w.act + (m + r) * s.hidden + n + j, h * h, columns - j);
               }
           });
      gemm(own_rows(w.act, s.hidden, count, 2), count, packed(w.down, s.hidden), s.hidden, s.width,
           [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
             for (int64_t r = 0; r < rows; r++) copy(y(z + m + r) + n, c + r * PANEL, columns);
           });
    }
  }

  void backward(const ExpertsBackward& g) {
    float *dup = g.dup + expert * s.hidden * s.width, *ddown = g.ddown + expert * s.hidden * s.width;
    if (begin == end) {
      memset(dup, 0, s.hidden * s.width * sizeof(float));
      memset(ddown, 0, s.hidden * s.width * sizeof(float));
      return;
    }
    pack_rows(w.down, down(), s.width, s.hidden);
    pack_rows(w.up, up(), s.hidden, s.width);
    for (int64_t z = begin; z < end; z += CHUNK) {
      int64_t count = chunk(z);
      through_activation(g, z, count);
      zip_chunk(g, z, count);
      bool first = z == begin;
      outer(ddown, w.dout_pairs, s.width, w.act_pairs, s.hidden, count, first);
      outer(dup, w.dup_pairs, s.hidden, w.x_pairs, s.width, count, first);
      // The pairs' outputs are not needed any more: their place takes the gradients of the pairs' inputs.
      gemm(own_rows(w.dup, s.hidden, count, 2), count, packed(w.up, s.hidden), s.hidden, s.width,
           [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
             for (int64_t r = 0; r < rows; r++) copy(y(z + m + r) + n, c + r * PANEL, columns);
           });
    }
  }

  // dact = down^T dout; the weight's gradient is <act, dact>; d(up x) = weight dact 2 relu(up x).
  void through_activation(const ExpertsBackward& g, int64_t z, int64_t count) {
    for (int64_t i = 0; i < count; i++) w.dweight[i] = 0.0f;
    gemm(token_rows(g.doutput, z, count), count, packed(w.down, s.width), s.width, s.hidden,
         [&](int64_t m, int64_t rows, int64_t n, int64_t columns, const float* c) {
           for (int64_t i = m; i < m + rows; i++) {
             F inner = set(0.0f), weight = set(f.weight[f.pair[z + i]]);
             for (int64_t j = 0; j < columns; j += W) {
               int64_t at = i * s.hidden + n + j, left = columns - j;
               F open = larger(load(hidden(z + i) + n + j, left), set(0.0f)), dact = load(c + (i - m) * PANEL + j);
               inner = fma(kept(w.act + at, open * open, left), dact, inner);
               store(w.dup + at, weight * dact * (open + open), left);
             }
             w.dweight[i] += sum_lanes(inner);
           }
         });
    for (int64_t i = 0; i < count; i++) g.dweight[f.pair[z + i]] = w.dweight[i];
  }

  void zip_chunk(const ExpertsBackward& g, int64_t z, int64_t count) {
    const bf16 *x = static_cast<const bf16*>(f.x), *dout = static_cast<const bf16*>(g.doutput);
    for (int64_t i = 0; i < count; i += 2) {
      bool both = i + 1 < count;
      zip(w.act_pairs + i * s.hidden, w.act + i * s.hidden, both ? w.act + (i + 1) * s.hidden : nullptr, s.hidden);
      zip(w.dup_pairs + i * s.hidden, w.dup + i * s.hidden, both ? w.dup + (i + 1) * s.hidden : nullptr, s.hidden);
      zip(w.x_pairs + i * s.width, x + token(z + i) * s.width, both ? x + token(z + i + 1) * s.width : nullptr, s.width);
      for (int64_t r = 0; r < 1 + both; r++) {
        F weight = set(f.weight[f.pair[z + i + r]]);
        const bf16* row = dout + token(z + i + r) * s.width;
        for (int64_t j = 0; j < s.width; j += W)
          store(w.scaled + r * s.width + j, weight * load(row + j, s.width - j), s.width - j);
      }
      zip(w.dout_pairs + i * s.width, w.scaled, both ? w.scaled + s.width : nullptr, s.width);
    }
  }

  // to[m][n] (+)= sum over tokens of left[token][m] right[token][n], both zipped.
  void outer(float* to, const bf16* left, int64_t m_count, const bf16* right, int64_t n_count, int64_t tokens, bool first) {
    gemm(own_rows(left, 2, m_count, 2 * m_count), m_count, Columns{right, 2 * PANEL, 2 * n_count}, tokens, n_count,
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
void experts_sort(const ExpertsForward* f) {
  const ExpertsSizes& s = f->sizes;
  int64_t pairs = s.tokens * s.active;
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
}

void experts_combine(const ExpertsForward* f, const void* pairs, void* output, int weighted, int64_t block) {
  const ExpertsSizes& s = f->sizes;
  int64_t end = (block + 1) * EXPERTS_BLOCK < s.tokens ? (block + 1) * EXPERTS_BLOCK : s.tokens;
  for (int64_t t = block * EXPERTS_BLOCK; t < end; t++)
    for (int64_t j = 0; j < s.width; j += W) {
      F sum = set(0.0f);
      for (int64_t k = t * s.active; k < (t + 1) * s.active; k++) {
        F y = load(static_cast<const bf16*>(pairs) + f->place[k] * s.width + j, s.width - j);
        sum = fma(set(weighted ? f->weight[k] : 1.0f), y, sum);
      }
      store(static_cast<bf16*>(output) + t * s.width + j, sum, s.width - j);
    }
}

void experts_forward(const ExpertsForward* f, int64_t expert, void* scratch) {
  f->sizes.weights_bf16 ? Expert<bf16>(*f, expert, scratch, false).forward()
                        : Expert<float>(*f, expert, scratch, false).forward();
}
void experts_backward(const ExpertsBackward* g, int64_t expert, void* scratch) {
  g->forward.sizes.weights_bf16 ? Expert<bf16>(g->forward, expert, scratch, true).backward(*g)
                                : Expert<float>(g->forward, expert, scratch, true).backward(*g);
}
int64_t experts_scratch(const ExpertsSizes* sizes, int backward) { return Work(*sizes, nullptr, backward).bytes; }

}  // namespace

void NAUTILUS_FILL(experts)(Kernels* k) {
  k->experts_sort = experts_sort;
  k->experts_forward = experts_forward;
  k->experts_backward = experts_backward;
  k->experts_combine = experts_combine;
  k->experts_scratch = experts_scratch;
}
