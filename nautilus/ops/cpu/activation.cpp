// silu(gate) up, number by number, and its backward, a block at a time.
#include "activation.h"
#include "kernels.h"

namespace {

using bf16 = uint16_t;

int64_t end_of(const Swiglu* f, int64_t block) {
  int64_t end = (block + 1) * ADD_BLOCK;
  return end < f->count ? end : f->count;
}

template <class X, class Y>
void forward(const Swiglu* f, int64_t block) {
  const X *gate = static_cast<const X*>(f->gate), *up = static_cast<const X*>(f->up);
  for (int64_t i = block * ADD_BLOCK, end = end_of(f, block); i < end; i += W)
    store(static_cast<Y*>(f->y) + i, silu(load(gate + i, end - i)) * load(up + i, end - i), end - i);
}
void swiglu(const Swiglu* f, int64_t block) {
  if (f->bf16)
    forward<bf16, bf16>(f, block);
  else
    f->y_bf16 ? forward<float, bf16>(f, block) : forward<float, float>(f, block);
}

template <class T>
void backward(const SwigluBackward* g, int64_t block) {
  const Swiglu* f = &g->forward;
  const T *gate = static_cast<const T*>(f->gate), *up = static_cast<const T*>(f->up), *dy = static_cast<const T*>(g->dy);
  for (int64_t i = block * ADD_BLOCK, end = end_of(f, block); i < end; i += W) {
    F open = load(gate + i, end - i), push = load(dy + i, end - i);
    store(static_cast<T*>(g->dup) + i, push * silu(open), end - i);
    store(static_cast<T*>(g->dgate) + i, push * load(up + i, end - i) * silu_slope(open), end - i);
  }
}
void swiglu_backward(const SwigluBackward* g, int64_t block) {
  g->forward.bf16 ? backward<bf16>(g, block) : backward<float>(g, block);
}

}  // namespace

void NAUTILUS_FILL(activation)(Kernels* k) {
  k->swiglu = swiglu;
  k->swiglu_backward = swiglu_backward;
}
