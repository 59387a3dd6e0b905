// A token for each row of logits, drawn in proportion to the exponentials of all of them.
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t PARTS = 512;  // at most, so that what each of them sums up to has its place

// Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the first word of a block. numpy's
// counts before it computes.
uint64_t philox(uint64_t key, uint64_t position) {
  uint64_t c[4] = {position + 1, position + 1 == 0, 0, 0}, k[2] = {key, 0};
  for (int round = 0; round < 10; round++) {
    auto first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
    auto second = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
    uint64_t next[4] = {static_cast<uint64_t>(second >> 64) ^ c[1] ^ k[0], static_cast<uint64_t>(second),
                        static_cast<uint64_t>(first >> 64) ^ c[3] ^ k[1], static_cast<uint64_t>(first)};
    memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B97F4A7C15u, k[1] += 0xBB67AE8584CAA73Bu;
  }
  return c[0];
}

struct Weights {
  const float* logits;
  int64_t vocab;
  F largest, temperature;

  F at(int64_t i) const {
    if (i + W <= vocab) return exp((load(logits + i) - largest) / temperature);
    alignas(64) float rest[W];
    for (float& number : rest) number = -INFINITY;
    memcpy(rest, logits + i, static_cast<size_t>(vocab - i) * sizeof(float));
    return exp((load(rest) - largest) / temperature);
  }
};

void draw(const Draw* d, int64_t row) {
  const float* x = d->logits + d->at[row];
  Weights weights = {x, d->vocab, set(x[d->best[row]]), set(static_cast<float>(d->temperature[row]))};
  int64_t vectors = (d->vocab + W - 1) / W, size = (vectors + PARTS - 1) / PARTS * W;
  if (size < 1024) size = 1024;
  double sums[PARTS], total = 0.0;
  int64_t parts = 0;
  for (int64_t from = 0; from < d->vocab; from += size) {
    F part = set(0.0f);
    for (int64_t i = from; i < d->vocab && i < from + size; i += W) part = part + weights.at(i);
    total += sums[parts++] = static_cast<double>(sum_lanes(part));
  }
  double target = static_cast<double>(philox(d->seed[row], d->position[row]) >> 12) * 0x1p-52 * total, sum = 0.0;
  int64_t at = 0;
  while (at < parts - 1 && sum + sums[at] <= target) sum += sums[at++];
  // Sums of other parts of the same numbers are rounded otherwise: where they do not reach the target, the last token
  // that may come at all is the one.
  int64_t found = d->best[row], end = (at + 1) * size < d->vocab ? (at + 1) * size : d->vocab;
  for (int64_t i = at * size; i < end; i += W) {
    alignas(64) float lanes[W];
    store(lanes, weights.at(i));
    for (int64_t lane = 0; lane < W && i + lane < end; lane++) {
      if (!(lanes[lane] > 0.0f)) continue;
      found = i + lane;
      if ((sum += static_cast<double>(lanes[lane])) > target) {
        d->token[row] = found;
        return;
      }
    }
  }
  d->token[row] = found;
}

}  // namespace

void NAUTILUS_FILL(draw)(Kernels* k) { k->draw = draw; }
