// The choice of experts, a token at a time: the same bits for the same token in any company, ties included.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t PART = 16;  // neighbours of which the largest is known

// Marks the `count` largest of `value`, in which -infinity marks what may not be chosen; the first of equals. NaN is never
// larger, so that even broken scores leave `count` different marks. `best` has a place for each part.
void mark_largest(const float* value, int64_t size, int64_t count, bool* marked, int64_t* best) {
  auto larger = [&](int64_t i, int64_t than) {
    return than < 0 || value[i] > value[than] || (value[than] != value[than] && value[i] == value[i]);
  };
  auto look = [&](int64_t part) {
    int64_t end = (part + 1) * PART < size ? (part + 1) * PART : size;
    best[part] = -1;
    for (int64_t i = part * PART; i < end; i++)
      if (!marked[i] && larger(i, best[part])) best[part] = i;
  };
  int64_t parts = (size + PART - 1) / PART;
  for (int64_t i = 0; i < size; i++) marked[i] = false;
  for (int64_t part = 0; part < parts; part++) look(part);
  for (int64_t k = 0; k < count; k++) {
    int64_t first = -1;
    for (int64_t part = 0; part < parts; part++)
      if (best[part] >= 0 && larger(best[part], first)) first = best[part];
    marked[first] = true;
    look(first / PART);
  }
}

void score(const Route* r, const float* logits, float* to) {
  int64_t n = r->experts;
  if (!r->softmax) {
    for (int64_t i = 0; i < n; i += W) store(to + i, sigmoid(load(logits + i, n - i)), n - i);
    return;
  }
  float top = logits[0], sum = 0.0f;
  for (int64_t i = 1; i < n; i++) top = logits[i] > top ? logits[i] : top;
  for (int64_t i = 0; i < n; i += W) store(to + i, exp(load(logits + i, n - i) - set(top)), n - i);
  for (int64_t i = 0; i < n; i++) sum += to[i];
  for (int64_t i = 0; i < n; i++) to[i] /= sum;
}

// Closes the groups of experts that a token may not choose from.
void close_groups(const Route* r, float* choice, float* sums, bool* open, int64_t* best) {
  int64_t size = r->experts / r->groups;
  for (int64_t g = 0; g < r->groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = g * size; i < (g + 1) * size; i++)
      if (choice[i] > first) second = first, first = choice[i];
      else if (choice[i] > second) second = choice[i];
    sums[g] = size > 1 ? first + second : first;
  }
  mark_largest(sums, r->groups, r->active_groups, open, best);
  for (int64_t i = 0; i < r->experts; i++)
    if (!open[i / size]) choice[i] = -INFINITY;
}

void one_token(const Route* r, int64_t token, float* choice, float* sums, bool* chosen, int64_t* best) {
  int64_t n = r->experts;
  float* to = r->score + token * n;
  score(r, r->logits + token * n, to);
  for (int64_t i = 0; i < n; i++) choice[i] = to[i] + (r->bias ? r->bias[i] : 0.0f);
  if (r->active_groups < r->groups) close_groups(r, choice, sums, chosen, best);
  mark_largest(choice, n, r->active, chosen, best);
  float sum = 0.0f, *weight = r->weight + token * r->active;
  int64_t* index = r->index + token * r->active;
  for (int64_t i = 0, k = 0; i < n; i++)
    if (chosen[i]) index[k] = i, weight[k++] = to[i], sum += to[i];
  for (int64_t k = 0; k < r->active; k++) weight[k] = (r->normalise ? weight[k] / (sum + 1e-20f) : weight[k]) * r->scale;
}

int64_t route_scratch(const Route* r) {
  return r->experts * static_cast<int64_t>(sizeof(int64_t) + 2 * sizeof(float) + sizeof(bool));
}

void route(const Route* r, int64_t block, void* scratch) {
  auto* best = static_cast<int64_t*>(scratch);
  float *choice = reinterpret_cast<float*>(best + r->experts), *sums = choice + r->experts;
  bool* chosen = reinterpret_cast<bool*>(sums + r->experts);
  int64_t end = (block + 1) * ROUTE_BLOCK < r->tokens ? (block + 1) * ROUTE_BLOCK : r->tokens;
  for (int64_t token = block * ROUTE_BLOCK; token < end; token++) one_token(r, token, choice, sums, chosen, best);
}

}  // namespace

void NAUTILUS_FILL(route)(Kernels* k) {
  k->route = route;
  k->route_scratch = route_scratch;
}
