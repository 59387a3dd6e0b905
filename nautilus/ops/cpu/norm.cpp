// The residual stream: embedding, sums, and RMSNorm with its backward, a block of rows at a time. The sum of squares of a
// row is W chains added up at the end, the same for any number of rows.
#include "kernels.h"
#include "simd.h"

namespace {

int64_t last_row(const NormForward& f, int64_t block, int64_t size) {
  int64_t end = (block + 1) * size;
  return end < f.rows ? end : f.rows;
}

template <class T>
void forward(const NormForward& f, int64_t block) {
  for (int64_t row = block * NORM_ROWS; row < last_row(f, block, NORM_ROWS); row++) {
    const T* x = static_cast<const T*>(f.x) + row * f.width;
    T* y = static_cast<T*>(f.y) + row * f.pitch;
    F square = set(0.0f);
    for (int64_t i = 0; i < f.width; i += W) {
      F v = load(x + i, f.width - i);
      square = fma(v, v, square);
    }
    float scale = 1.0f / ::sqrtf(sum_lanes(square) / static_cast<float>(f.width) + f.eps);
    if (f.scale) f.scale[row] = scale;
    for (int64_t i = 0; i < f.width; i += W) {
      int64_t left = f.width - i;
      store(y + i, load(x + i, left) * set(scale) * load(f.weight + i, left), left);
    }
  }
}

// dx = scale (dy weight - unit mean(dy weight unit)), unit = x scale.
template <class T>
void backward(const NormBackward& g, int64_t block) {
  const NormForward& f = g.forward;
  float* dweight = g.dweight + block * f.width;
  memset(dweight, 0, f.width * sizeof(float));
  for (int64_t row = block * NORM_BLOCK; row < last_row(f, block, NORM_BLOCK); row++) {
    const T *x = static_cast<const T*>(f.x) + row * f.width, *dy = static_cast<const T*>(g.dy) + row * f.width;
    T* dx = static_cast<T*>(g.dx) + row * f.width;
    F scale = set(f.scale[row]), dot = set(0.0f);
    for (int64_t i = 0; i < f.width; i += W) {
      int64_t left = f.width - i;
      F product = load(dy + i, left) * (load(x + i, left) * scale);
      store(dweight + i, load(dweight + i, left) + product, left);
      dot = fma(product, load(f.weight + i, left), dot);
    }
    F mean = set(sum_lanes(dot) / static_cast<float>(f.width));
    for (int64_t i = 0; i < f.width; i += W) {
      int64_t left = f.width - i;
      F unit = load(x + i, left) * scale, dunit = load(dy + i, left) * load(f.weight + i, left);
      store(dx + i, scale * (dunit - unit * mean), left);
    }
  }
}

template <class T>
void add_block(const Add* s, int64_t block) {
  int64_t end = (block + 1) * ADD_BLOCK < s->count ? (block + 1) * ADD_BLOCK : s->count;
  const T *a = static_cast<const T*>(s->a), *b = static_cast<const T*>(s->b);
  for (int64_t i = block * ADD_BLOCK; i < end; i += W)
    store(static_cast<T*>(s->y) + i, load(a + i, end - i) + load(b + i, end - i), end - i);
}
void add(const Add* s, int64_t block) { s->bf16 ? add_block<uint16_t>(s, block) : add_block<float>(s, block); }

template <class To, class From>
void embed_row(const Embed* e, int64_t row) {
  copy(static_cast<To*>(e->y) + row * e->width, static_cast<const From*>(e->table) + e->index[row] * e->width, e->width);
}
void embed(const Embed* e, int64_t row) {
  if (e->bf16)
    e->table_bf16 ? embed_row<uint16_t, uint16_t>(e, row) : embed_row<uint16_t, float>(e, row);
  else
    e->table_bf16 ? embed_row<float, uint16_t>(e, row) : embed_row<float, float>(e, row);
}

void norm_forward(const NormForward* f, int64_t block) {
  f->bf16 ? forward<uint16_t>(*f, block) : forward<float>(*f, block);
}
void norm_backward(const NormBackward* g, int64_t block) {
  g->forward.bf16 ? backward<uint16_t>(*g, block) : backward<float>(*g, block);
}

}  // namespace

void NAUTILUS_FILL(norm)(Kernels* k) {
  k->norm_forward = norm_forward;
  k->norm_backward = norm_backward;
  k->add = add;
  k->embed = embed;
}
