// The event engine's kernels on random shapes, in buffers of exactly the size that they may use, under sanitizers.
//
//     cmake -S native -B build -DSPIKELOOM_FUZZ=ON && cmake --build build --target events_fuzz_native
//     build/events_fuzz_native 2000
//
// Every result is compared with plain loops; the process ends with 1 where one differs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../kernels.hpp"

using namespace spikeloom;
namespace level = spikeloom::SPIKELOOM_LEVEL;

namespace {

std::mt19937 generator;

int64_t from_to(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin() { return from_to(0, 1) == 1; }

// Exactly n elements on the heap: one read or written beyond them is an error.
template <class T>
std::unique_ptr<T[]> exactly(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]());
}

std::unique_ptr<uint8_t[]> spikes_of(int64_t n, int64_t most) {
  auto x = exactly<uint8_t>(n);
  const int64_t silence = from_to(0, 10);
  for (int64_t i = 0; i < n; i++) x[i] = from_to(0, 9) < silence ? 0 : from_to(0, most);
  return x;
}

std::unique_ptr<float[]> grid_of(int64_t n) {
  auto x = exactly<float>(n);
  for (int64_t i = 0; i < n; i++) x[i] = from_to(-8, 8) / 16.f;
  return x;
}

bool fail(const char* what) {
  std::printf("%s differs\n", what);
  return false;
}

// What `Epilogue` says, in plain loops: u [steps, size] to spikes.
void fire_plainly(const Epilogue& a, int64_t size, const std::vector<float>& u, std::vector<uint8_t>& spikes,
                  std::vector<float>& v) {
  spikes.assign(a.steps * size, 0);
  for (int k = 0; k < a.levels; k++)
    for (int64_t i = 0; i < size; i++)
      for (int64_t t = 0; t < a.steps; t++) {
        const float h = a.decay * (v[k * size + i] - a.v_rest) + a.gain * u[t * size + i] + a.v_rest;
        const bool fires = h >= a.fire_at[k];
        v[k * size + i] = fires ? (a.hard ? a.v_rest : h - a.threshold[k]) : h;
        spikes[t * size + i] += fires;
      }
}

// Behind which groups sums leave 16 bits (`EngineConv::widen`), from packed integers; empty where one group cannot.
std::vector<uint8_t> widened(const float* packed, const int64_t* counts, int64_t most) {
  const int64_t groups = counts[1], rows = counts[2], block = counts[3], blocks = counts[0] / (groups * rows * block);
  std::vector<uint8_t> widen(groups, 0);
  std::vector<int64_t> up(blocks * block, 0), down(up);
  for (int64_t g = 0; g < groups; g++) {
    std::vector<int64_t> more(blocks * block, 0), less(more);
    for (int64_t i = 0; i < blocks * rows * block; i++) {
      const int64_t b = i / (rows * block), to = b * block + i % block;
      const int64_t w = most * static_cast<int64_t>(packed[(b * groups + g) * rows * block + i % (rows * block)]);
      (w > 0 ? more : less)[to] += std::abs(w);
    }
    bool exceeds = false;
    for (int64_t i = 0; i < blocks * block; i++) {
      if (std::max(more[i], less[i]) > INT16_MAX) return {};
      exceeds |= std::max(up[i] + more[i], down[i] + less[i]) > INT16_MAX;
    }
    if (exceeds) widen[g - 1] = 1;
    for (int64_t i = 0; i < blocks * block; i++) {
      up[i] = (exceeds ? 0 : up[i]) + more[i];
      down[i] = (exceeds ? 0 : down[i]) + less[i];
    }
  }
  return widen;
}

bool convolution() {
  EngineConv a{};
  a.steps = from_to(1, 4), a.images = from_to(1, 3), a.height = from_to(1, 9), a.width = from_to(1, 9);
  a.depthwise = from_to(0, 3) == 0, a.binary = coin(), a.stride = from_to(1, 3);
  a.in = from_to(0, 3) == 0 ? from_to(128, 600) : from_to(1, 70), a.out = a.depthwise ? a.in : from_to(1, 70);
  a.padding_y = from_to(0, 3), a.padding_x = from_to(0, 3);
  a.kernel_height = from_to(1, std::min<int64_t>(5, a.height + 2 * a.padding_y));
  a.kernel_width = from_to(1, std::min<int64_t>(5, a.width + 2 * a.padding_x));
  a.threads = 1;
  const int64_t high = (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1;
  const int64_t wide = (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1;
  const int64_t size = a.images * high * wide * a.out, inside = a.depthwise ? 1 : a.in;
  const auto x = spikes_of(a.steps * a.images * a.height * a.width * a.in, a.binary ? 1 : 9);
  const int64_t bytes = a.height * a.width * a.in;
  if (coin())  // silence: of some images at all steps, of others at some
    for (int64_t i = 0; i < a.steps * a.images; i++)
      if (i % a.images == 0 || coin()) std::memset(x.get() + i * bytes, 0, bytes);
  const int64_t weights = a.out * inside * a.kernel_height * a.kernel_width;
  const auto weight = grid_of(weights), bias = grid_of(a.out);
  const bool integers = !a.depthwise && coin();
  const int64_t largest = coin() ? 127 : 15;  // small ones rarely leave 16 bits
  for (int64_t i = 0; integers && i < weights; i++) weight[i] = from_to(-largest, largest);

  int64_t counts[4] = {};
  EnginePack pack{a.in,     a.out,    a.kernel_height, a.kernel_width, a.stride, a.depthwise,
                  a.binary, integers, weight.get(),    nullptr,        nullptr,  counts};
  level::engine_pack(pack);
  const auto packed = exactly<float>(counts[0]);
  const auto half = exactly<uint16_t>(counts[0]);
  const auto shorts = exactly<int16_t>(counts[0]);
  const auto bytes_of_weights = exactly<int8_t>(counts[0]);
  pack.packed = packed.get();
  if (!a.depthwise && !integers && coin()) pack.half = half.get(), a.half = half.get();
  level::engine_pack(pack);
  const auto scale = exactly<float>(a.out);
  std::vector<uint8_t> widen;
  for (int64_t o = 0; o < a.out; o++) scale[o] = integers ? std::ldexp(1.f, -static_cast<int>(from_to(4, 6))) : 1.f;
  if (integers) {
    widen = widened(packed.get(), counts, a.binary ? 1 : 9);
    if (widen.empty()) return true;  // its weights are float32
    for (int64_t i = 0; i < counts[0]; i++)
      shorts[i] = static_cast<int16_t>(packed[i]), bytes_of_weights[i] = static_cast<int8_t>(packed[i]);
    if (coin())
      a.shorts = shorts.get();
    else
      a.bytes = bytes_of_weights.get();
    a.scale = scale.get(), a.widen = widen.data();
  }

  const auto residual = grid_of(a.steps * size);
  const auto residual_spikes = spikes_of(a.steps * size, 3);
  a.residual_stride = coin() ? size : 0;
  if (coin())
    a.residual = residual.get();
  else if (coin())
    a.residual_spikes = residual_spikes.get();
  const auto sum = exactly<float>(a.steps * size), v = exactly<float>(3 * size);
  const auto spikes = exactly<uint8_t>(a.steps * size);
  const float threshold[] = {0.25f, 0.5f, 1.f};
  const bool fires = coin();
  a.decay = 0.5f, a.gain = coin() ? 1.f : 0.5f, a.hard = coin(), a.v_rest = a.hard && coin() ? -0.5f : 0.f;
  a.levels = coin() ? 1 : 3;
  a.threshold = a.fire_at = threshold;
  a.sum = !fires || coin() ? sum.get() : nullptr;
  a.spikes = fires ? spikes.get() : nullptr;
  std::vector<float> state(a.levels * size, a.v_rest);
  if (coin()) {
    a.v = v.get();
    for (int64_t i = 0; i < a.levels * size; i++) v[i] = state[i] = from_to(-4, 3) / 16.f;
  }
  a.x = x.get(), a.weight = packed.get(), a.bias = bias.get();
  if (level::engine_conv(a) != 0) return fail("the code of a convolution");

  std::vector<float> u(a.steps * size);
  for (int64_t i = 0; i < a.steps * size; i++) {
    const int64_t o = i % a.out, column = i / a.out % wide, row = i / a.out / wide % high,
                  map = i / a.out / wide / high;
    float total = 0.f;
    for (int64_t ky = 0; ky < a.kernel_height; ky++)
      for (int64_t kx = 0; kx < a.kernel_width; kx++) {
        const int64_t y = row * a.stride - a.padding_y + ky, z = column * a.stride - a.padding_x + kx;
        if (y < 0 || y >= a.height || z < 0 || z >= a.width) continue;
        for (int64_t c = 0; c < inside; c++)
          total += weight[((o * inside + c) * a.kernel_height + ky) * a.kernel_width + kx] *
                   x[((map * a.height + y) * a.width + z) * a.in + (a.depthwise ? o : c)];
      }
    const int64_t at = i / size * a.residual_stride + i % size;
    u[i] =
        total * scale[o] + bias[o] + (a.residual ? residual[at] : 0.f) + (a.residual_spikes ? residual_spikes[at] : 0);
  }
  for (int64_t i = 0; a.sum != nullptr && i < a.steps * size; i++)
    if (std::fabs(sum[i] - u[i]) > 1e-4f) return fail("a sum");
  if (!fires) return true;
  std::vector<uint8_t> expected;
  fire_plainly(a, size, u, expected, state);
  for (int64_t i = 0; i < a.steps * size; i++)
    if (spikes[i] != expected[i]) return fail("a spike");
  for (int64_t i = 0; a.v != nullptr && i < a.levels * size; i++)
    if (std::fabs(v[i] - state[i]) > 1e-4f) return fail("a potential");
  return true;
}

bool multiplied() {
  EngineDirect a{};
  a.steps = from_to(1, 4), a.images = from_to(1, 3), a.height = from_to(1, 9), a.width = from_to(1, 9), a.threads = 1;
  a.groups = coin() ? 1 : from_to(1, 20), a.stride = from_to(1, 3), a.x_steps = coin() ? 1 : a.steps;
  const int64_t inside = coin() ? 1 : from_to(1, 40), outside = coin() ? 1 : from_to(1, 70);
  a.in = a.groups * inside, a.out = a.groups * outside, a.padding_y = from_to(0, 3), a.padding_x = from_to(0, 3);
  a.kernel_height = from_to(1, std::min<int64_t>(5, a.height + 2 * a.padding_y));
  a.kernel_width = from_to(1, std::min<int64_t>(5, a.width + 2 * a.padding_x));
  const int64_t high = (a.height + 2 * a.padding_y - a.kernel_height) / a.stride + 1;
  const int64_t wide = (a.width + 2 * a.padding_x - a.kernel_width) / a.stride + 1;
  const int64_t size = a.images * high * wide * a.out, inputs = a.x_steps * a.images * a.height * a.width * a.in;
  const auto weight = grid_of(a.out * inside * a.kernel_height * a.kernel_width), bias = grid_of(a.out);
  const auto x = grid_of(inputs);
  const auto bytes = spikes_of(inputs, 3);
  int64_t floats = 0;
  EnginePackDirect pack{a.in, a.out, a.kernel_height, a.kernel_width, a.groups, weight.get(), nullptr, &floats};
  level::engine_pack_direct(pack);
  const auto packed = exactly<float>(floats);
  pack.packed = packed.get();
  level::engine_pack_direct(pack);
  (coin() ? a.x = x.get() : (a.x_bytes = bytes.get(), nullptr));
  a.once = a.x_steps == 1 && coin(), a.weight = packed.get(), a.bias = bias.get();
  const int64_t results = (a.once ? 1 : a.steps) * size;
  const auto sum = exactly<float>(results);
  const float threshold[] = {1.f};
  a.sum = sum.get(), a.levels = 1, a.threshold = a.fire_at = threshold;
  if (level::engine_direct(a) != 0) return fail("the code of a multiplied layer");
  for (int64_t i = 0; i < results; i++) {
    const int64_t o = i % a.out, column = i / a.out % wide, row = i / a.out / wide % high;
    const int64_t map = i / a.out / wide / high % (a.x_steps * a.images);
    float total = bias[o];
    for (int64_t ky = 0; ky < a.kernel_height; ky++)
      for (int64_t kx = 0; kx < a.kernel_width; kx++) {
        const int64_t y = row * a.stride - a.padding_y + ky, z = column * a.stride - a.padding_x + kx;
        if (y < 0 || y >= a.height || z < 0 || z >= a.width) continue;
        for (int64_t c = 0; c < inside; c++) {
          const int64_t at = ((map * a.height + y) * a.width + z) * a.in + o / outside * inside + c;
          total += weight[((o * inside + c) * a.kernel_height + ky) * a.kernel_width + kx] *
                   (a.x != nullptr ? x[at] : bytes[at]);
        }
      }
    if (std::fabs(sum[i] - total) > 1e-4f) return fail("a multiplied sum");
  }
  return true;
}

bool elements() {
  int64_t sizes[5], strides[4][5] = {}, counts[4] = {1, 1, 1, 1};
  for (int64_t& side : sizes) side = coin() ? 1 : from_to(1, 9);
  for (int k = 0; k < 4; k++)
    for (int axis = 4; axis >= 0; axis--) {
      if (k > 0 && coin()) continue;  // spread along this axis
      strides[k][axis] = counts[k], counts[k] *= sizes[axis];
    }
  const auto y = exactly<float>(counts[0]), c = grid_of(counts[3]), b = grid_of(counts[2]);
  const auto a = spikes_of(counts[1], 9);
  EngineElements e{};
  e.element = Element::affine, e.sizes = sizes, e.strides = strides[0], e.threads = 1;
  e.y = y.get(), e.a = a.get(), e.a_bytes = true, e.b = b.get(), e.c = c.get();
  level::engine_elements(e);
  for (int64_t i = 0; i < counts[0]; i++) {
    int64_t at[4] = {}, rest = i;
    for (int axis = 4; axis >= 0; rest /= sizes[axis], axis--)
      for (int k = 0; k < 4; k++) at[k] += rest % sizes[axis] * strides[k][axis];
    if (y[at[0]] != a[at[1]] * b[at[2]] + c[at[3]]) return fail("an element");
  }
  return true;
}

// Rows of bytes beside others: nothing between them is written.
bool copied() {
  const int64_t rows = from_to(1, 40), n = from_to(1, 90), before = from_to(0, 9), step = before + n + from_to(0, 9);
  const int64_t sizes[5] = {1, 1, 1, rows, n}, strides[4][5] = {{0, 0, 0, step, 1}, {0, 0, 0, n, 1}};
  const auto y = spikes_of(rows * step, 9), was = exactly<uint8_t>(rows * step), a = spikes_of(rows * n, 9);
  std::memcpy(was.get(), y.get(), rows * step);
  EngineElements e{};
  e.element = Element::copy, e.sizes = sizes, e.strides = strides[0], e.threads = 1;
  e.y = y.get() + before, e.y_bytes = true, e.a = a.get(), e.a_bytes = true;
  level::engine_elements(e);
  for (int64_t i = 0; i < rows * step; i++) {
    const int64_t column = i % step - before;
    if (y[i] != (column >= 0 && column < n ? a[i / step * n + column] : was[i])) return fail("a copied row");
  }
  return true;
}

bool reduced() {
  EngineReduce a{};
  a.outer = from_to(1, 4), a.count = from_to(1, 600), a.inner = from_to(1, 40), a.mean = coin(), a.threads = 1;
  const auto x = grid_of(a.outer * a.count * a.inner), y = exactly<float>(a.outer * a.inner);
  a.x = x.get(), a.y = y.get();
  level::engine_reduce(a);
  for (int64_t i = 0; i < a.outer * a.inner; i++) {
    float total = 0.f;
    for (int64_t k = 0; k < a.count; k++) total += x[(i / a.inner * a.count + k) * a.inner + i % a.inner];
    if (y[i] != (a.mean ? total / a.count : total)) return fail("a total");
  }
  return true;
}

bool averaged() {
  EngineWindows a{};
  a.images = from_to(1, 3), a.height = from_to(1, 9), a.width = from_to(1, 9), a.channels = from_to(1, 40);
  a.kernel = from_to(1, std::min(a.height, a.width)), a.stride = from_to(1, 3), a.padding = from_to(0, a.kernel / 2);
  a.mean = true, a.threads = 1;  // zeros around the input do not count
  a.out_height = (a.height + 2 * a.padding - a.kernel) / a.stride + 1;
  a.out_width = (a.width + 2 * a.padding - a.kernel) / a.stride + 1;
  const auto x = spikes_of(a.images * a.height * a.width * a.channels, 9);
  const int64_t results = a.images * a.out_height * a.out_width * a.channels;
  const auto y = exactly<float>(results);
  a.x_bytes = x.get(), a.y = y.get();
  level::engine_windows(a);
  for (int64_t i = 0; i < results; i++) {
    const int64_t c = i % a.channels, column = i / a.channels % a.out_width;
    const int64_t row = i / a.channels / a.out_width % a.out_height,
                  image = i / a.channels / a.out_width / a.out_height;
    int64_t total = 0, inside = 0;
    for (int64_t ky = 0; ky < a.kernel; ky++)
      for (int64_t kx = 0; kx < a.kernel; kx++) {
        const int64_t r = row * a.stride - a.padding + ky, z = column * a.stride - a.padding + kx;
        if (r < 0 || r >= a.height || z < 0 || z >= a.width) continue;
        total += x[((image * a.height + r) * a.width + z) * a.channels + c], inside++;
      }
    if (y[i] != static_cast<float>(total) / static_cast<float>(inside)) return fail("a mean of a window");
  }
  return true;
}

bool firing() {
  EngineFire a{};
  a.steps = from_to(1, 5), a.size = from_to(1, 3000), a.x_stride = coin() ? 0 : a.size;
  const auto x = grid_of(a.x_stride == 0 ? a.size : a.steps * a.size);
  const auto spikes = exactly<uint8_t>(a.steps * a.size);
  const float threshold[] = {0.25f};
  a.decay = 0.5f, a.gain = 1.f, a.hard = coin(), a.levels = 1, a.threshold = a.fire_at = threshold, a.threads = 1;
  a.x = x.get(), a.spikes = spikes.get();
  level::engine_fire(a);
  std::vector<float> u(a.steps * a.size), v(a.size, 0.f);
  for (int64_t i = 0; i < a.steps * a.size; i++) u[i] = x[i / a.size * a.x_stride + i % a.size];
  std::vector<uint8_t> expected;
  fire_plainly(a, a.size, u, expected, v);
  for (int64_t i = 0; i < a.steps * a.size; i++)
    if (spikes[i] != expected[i]) return fail("a spike of neurons alone");
  return true;
}

bool pool() {
  EnginePool a{};
  a.images = from_to(1, 3), a.height = from_to(1, 9), a.width = from_to(1, 9), a.channels = from_to(1, 70);
  a.kernel = from_to(1, std::min(a.height, a.width)), a.stride = from_to(1, 3), a.padding = from_to(0, a.kernel / 2);
  a.threads = 1;
  const int64_t high = (a.height + 2 * a.padding - a.kernel) / a.stride + 1;
  const int64_t wide = (a.width + 2 * a.padding - a.kernel) / a.stride + 1;
  const auto x = spikes_of(a.images * a.height * a.width * a.channels, 9);
  const auto y = exactly<uint8_t>(a.images * high * wide * a.channels);
  a.x = x.get(), a.y = y.get();
  level::engine_max_pool(a);
  for (int64_t i = 0; i < a.images * high * wide * a.channels; i++) {
    const int64_t c = i % a.channels, column = i / a.channels % wide, row = i / a.channels / wide % high;
    const int64_t image = i / a.channels / wide / high;
    uint8_t most = 0;
    for (int64_t ky = 0; ky < a.kernel; ky++)
      for (int64_t kx = 0; kx < a.kernel; kx++) {
        const int64_t r = row * a.stride - a.padding + ky, z = column * a.stride - a.padding + kx;
        if (r < 0 || r >= a.height || z < 0 || z >= a.width) continue;
        most = std::max(most, x[((image * a.height + r) * a.width + z) * a.channels + c]);
      }
    if (y[i] != most) return fail("a maximum");
  }
  return true;
}

bool attention() {
  EngineAttention a{};
  a.heads = from_to(1, 4), a.maps = from_to(1, 3), a.tokens = from_to(1, 20), a.scale = 0.125f, a.threads = 1;
  const int64_t d = from_to(1, 70);
  a.channels = a.heads * d;
  const int64_t size = a.maps * a.tokens * a.channels;
  const auto q = spikes_of(size, 2), k = spikes_of(size, 1), v = spikes_of(size, 1);
  const auto y = exactly<float>(size);
  a.q = q.get(), a.k = k.get(), a.v = v.get(), a.y = y.get();
  level::engine_attention(a);
  for (int64_t i = 0; i < size; i++) {
    const int64_t c = i % a.channels, head = c / d, token = i / a.channels % a.tokens, map = i / a.channels / a.tokens;
    const int64_t first = map * a.tokens * a.channels;
    int64_t total = 0;
    for (int64_t l = 0; l < a.tokens; l++) {
      int64_t alike = 0;
      for (int64_t j = head * d; j < (head + 1) * d; j++)
        alike += q[first + token * a.channels + j] * k[first + l * a.channels + j];
      total += alike * v[first + l * a.channels + c];
    }
    if (y[i] != total * a.scale) return fail("attention");
  }
  return true;
}

}  // namespace

int main(int count, char** words) {
  const int64_t cases = count > 1 ? std::atoll(words[1]) : 1000;
  for (int64_t i = 0; i < cases; i++) {
    generator.seed(i);
    const bool right = convolution() && firing() && pool() && attention() && multiplied() && elements() && copied() &&
                       reduced() && averaged();
    if (!right) {
      std::printf("case %lld\n", static_cast<long long>(i));
      return 1;
    }
  }
  std::printf("%lld cases\n", static_cast<long long>(cases));
  return 0;
}
