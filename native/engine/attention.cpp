// Attention of spikes without a softmax:
//
//   for every map and head:  state = sum over tokens l of k[l, :]' v[l, :],  y[l, :] = scale q[l, :] state
//
// Rows of k and q that are zero are left out.
#include "engine/index_lists.hpp"
#include "engine/items.hpp"
#include "engine/partial.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {

int engine_attention(const EngineAttention& a) {
  const int64_t C = a.channels, d = C / a.heads, L = a.tokens, wide = round_up(d, LANES);
  return for_items(a.maps * a.heads, (d + 1) * wide * 4, a.threads, [&](int64_t item, float* scratch) {
    const int64_t map = item / a.heads, head = item % a.heads, first = map * L * C + head * d;
    const auto rows_of = [&](const uint8_t* token, const auto& body) {
      for (int64_t c = 0; c < d; c += 64)
        for (uint64_t word = nonzero_bytes(token + c, smaller(64, d - c)); word != 0; word &= word - 1) {
          const int64_t row = c + __builtin_ctzll(word);
          body(row, static_cast<float>(token[row]));
        }
    };
    float *state = scratch + wide, *sum = scratch;
    std::memset(scratch, 0, (d + 1) * wide * 4);
    for (int64_t l = 0; l < L; l++) {
      const uint8_t* v = a.v + first + l * C;
      rows_of(a.k + first + l * C, [&](int64_t row, float k) {
        for (int64_t c = 0; c < d; c += LANES) {
          float* to = state + row * wide + c;
          put(to, get(to) + k * get_some(v + c, smaller(LANES, d - c)));
        }
      });
    }
    for (int64_t l = 0; l < L; l++) {
      std::memset(sum, 0, wide * 4);
      rows_of(a.q + first + l * C, [&](int64_t row, float q) {
        for (int64_t c = 0; c < d; c += LANES) put(sum + c, get(sum + c) + q * get(state + row * wide + c));
      });
      for (int64_t c = 0; c < d; c++) a.y[first + l * C + c] = sum[c] * a.scale;
    }
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
