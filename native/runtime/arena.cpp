#include "runtime/arena.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace spikeloom::runtime {
namespace {

Map map_of(void* first, bool bytes, int64_t T, int64_t N, const Value& value) {
  Map map{first, bytes, {T, N, value.height, value.width, value.channels}, {}};
  int64_t stride = 1;
  for (int axis = 4; axis >= 0; axis--) map.stride[axis] = stride, stride *= map.size[axis];
  return map;
}

// x, or bytes: the fields of that name.
template <class Arguments>
void set_x(Arguments& a, const Map& x) {
  a.x = x.bytes ? nullptr : static_cast<const float*>(x.first);
  a.x_bytes = x.bytes ? static_cast<const uint8_t*>(x.first) : nullptr;
}

template <class Number>
const Number* pointer(const std::vector<Number>& numbers) {
  return numbers.empty() ? nullptr : numbers.data();
}

template <class Arguments>
void set_shape(Arguments& a, const Step& step, const Map& x, const Packed& layer) {
  a.images = x.size[1], a.height = x.size[2], a.width = x.size[3], a.in = x.size[4], a.out = layer.shape[0];
  a.kernel_height = layer.shape[2], a.kernel_width = layer.shape[3], a.stride = step.stride;
  a.padding_y = step.padding[0], a.padding_x = step.padding[1];
  a.weight = pointer(layer.weight), a.bias = layer.bias.data();
}

}  // namespace

void* Buffer::of(size_t bytes) {
  if (memory_ == nullptr || bytes > size_) {
    std::free(memory_);
    size_ = 0;
    memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
  }
  return memory_;
}

void Arena::run(const Input& input, int64_t T, int threads, float* logits, Potentials* potentials) {
  if (T != T_ || input.N != N_ || threads != threads_) bind(T, input.N, threads);
  put_input(input);
  for (const auto& [i, call] : calls_) {
    const int status = call(potentials_of(i, potentials));
    if (status == OUT_OF_MEMORY) throw std::bad_alloc();
    need(status == OK, "a layer that no kernel runs");
  }
  const Map& last = maps_.back();
  const int64_t classes = last.size[4], steps = network_.plan().per_step ? T : 1;
  for (int64_t t = 0; t < steps; t++) {
    const int64_t from = last.size[0] == 1 ? 0 : t * last.stride[0];
    float* to = logits + (t * input.images + input.first) * classes;
    for (int64_t k = 0; k < input.N * classes; k++)
      to[k] = last.bytes ? static_cast<const uint8_t*>(last.first)[from + k]
                         : static_cast<const float*>(last.first)[from + k];
  }
}

void Arena::bind(int64_t T, int64_t N, int threads) {
  T_ = 0;  // so that a call that fails here is not taken for one that is ready
  const auto& values = network_.values();
  calls_.clear(), maps_.clear();
  for (size_t i = 0; i < values.size(); i++) {
    const int64_t steps = values[i].is_static ? 1 : T, place = network_.places_[i];
    const double bytes = static_cast<double>(steps) * static_cast<double>(N) * static_cast<double>(values[i].bytes());
    if (bytes > 0x1p45) throw std::bad_alloc();
    void* first = place == static_cast<int64_t>(i) ? buffers_[i].of(static_cast<size_t>(bytes)) : maps_[place].first;
    maps_.push_back(map_of(first, values[i].spikes(), steps, N, values[i]));
  }
  threads_ = threads, N_ = N, T_ = T;
  try {
    for (size_t i = 0; i < network_.plan().steps.size(); i++) bind_step(i);
  } catch (...) {
    T_ = 0;
    throw;
  }
}

void Arena::put_input(const Input& input) {
  const Map& y = maps_[0];
  const int64_t H = y.size[2], W = y.size[3], C = y.size[4];
  const int64_t sizes[5] = {y.size[0], y.size[1], C, H, W};
  const int64_t strides[20] = {y.stride[0], y.stride[1], 1, W * C, C, input.images * C * H * W, C * H * W, H * W, W, 1};
  EngineElements a{};
  a.element = Element::copy, a.sizes = sizes, a.strides = strides, a.threads = threads_;
  a.y = y.first, a.y_bytes = y.bytes, a.a = input.x + input.first * C * H * W;
  network_.kernels_.engine_elements(a);
}

float* Arena::potentials_of(size_t i, Potentials* potentials) const {
  const Step& step = network_.plan().steps[i];
  if (potentials == nullptr || !step.neuron) return nullptr;
  std::vector<float>& v = (*potentials)[i];
  if (v.empty()) {
    const Map& spikes = maps_[step.out.back()];
    v.assign(step.neuron->threshold.size() * spikes.stride[0], step.neuron->v_reset.value_or(0.f));
  }
  return v.data();
}

void Arena::bind_step(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map &x = maps_[step.reads[0]], &y = maps_[step.out[0]];
  switch (step.op) {
    case Op::conv: return bind_conv(i);
    case Op::fire: return bind_fire(i);
    case Op::max_pool:
    case Op::avg_pool: return bind_pool(i);
    case Op::pad_channels: {
      const size_t size = static_cast<size_t>(y.size[0] * y.stride[0]);
      std::memset(y.first, 0, y.bytes ? size : 4 * size);  // once: nothing else is written there
      Map inner = y;
      inner.size[4] = x.size[4];
      inner.first = static_cast<char*>(y.first) + step.before * (y.bytes ? 1 : 4);
      return bind_elements(i, Element::copy, inner, x);
    }
    case Op::flatten: {
      Map flat = x;  // all of it is one row
      const int64_t size = x.size[0] * x.stride[0];
      flat = Map{x.first, x.bytes, {1, 1, 1, 1, size}, {size, size, size, size, 1}};
      Map to = flat;
      to.first = y.first;
      return bind_elements(i, Element::copy, to, flat);
    }
    case Op::mean:
    case Op::time_mean:
    case Op::time_sum: return bind_reduce(i);
    case Op::time_last: {
      Map last = x;
      last.size[0] = 1;
      last.first = static_cast<char*>(x.first) + (x.size[0] - 1) * x.stride[0] * (x.bytes ? 1 : 4);
      return bind_elements(i, Element::copy, y, last);
    }
    case Op::relu: return bind_elements(i, Element::relu, y, x);
    case Op::sigmoid: return bind_elements(i, Element::sigmoid, y, x);
    case Op::clamp: return bind_elements(i, Element::clamp, y, x);
    case Op::scale: return bind_elements(i, Element::scale, y, x);
    case Op::shift: return bind_elements(i, Element::shift, y, x);
    case Op::complement: return bind_elements(i, Element::complement, y, x);
    case Op::affine:
    case Op::divide: return bind_affine(i);
    case Op::add:
    case Op::mul:
    case Op::either:
    case Op::cat: return bind_joined(i);
    case Op::attention: return bind_attention(i);
  }
}

void Arena::epilogue(Epilogue& a, const Step& step) const {
  static const Neuron none;
  const Neuron& neuron = step.neuron ? *step.neuron : none;
  a.steps = T_, a.threads = threads_;
  if (step.residual) {
    const Map& residual = maps_[step.reads[1]];
    (residual.bytes ? a.residual_spikes = static_cast<const uint8_t*>(residual.first)
                    : (a.residual = static_cast<const float*>(residual.first), nullptr));
    a.residual_stride = residual.size[0] == T_ ? residual.stride[0] : 0;
  }
  if (step.keep_sum) a.sum = static_cast<float*>(maps_[step.out[0]].first);
  if (step.neuron) a.spikes = static_cast<uint8_t*>(maps_[step.out.back()].first);
  a.decay = neuron.decay, a.gain = neuron.gain, a.v_rest = neuron.v_reset.value_or(0.f);
  a.hard = neuron.v_reset.has_value(), a.levels = static_cast<int>(neuron.threshold.size());
  a.threshold = neuron.threshold.data(), a.fire_at = neuron.fire_at.data();
}

void Arena::bind_conv(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Packed& layer = network_.packed_[i];
  const Map& x = maps_[step.reads[0]];
  const Kernels& kernels = network_.kernels_;
  if (layer.direct) {
    EngineDirect a{};
    epilogue(a, step), set_shape(a, step, x, layer), set_x(a, x);
    a.x_steps = x.size[0], a.groups = step.groups;
    a.once = step.keep_sum && network_.values()[step.out[0]].is_static;
    calls_.emplace_back(i, [a, &kernels](float* v) mutable { return a.v = v, kernels.engine_direct(a); });
    return;
  }
  EngineConv a{};
  epilogue(a, step), set_shape(a, step, x, layer);
  a.depthwise = layer.depthwise, a.binary = network_.values()[step.reads[0]].most == 1;
  a.x = static_cast<const uint8_t*>(x.first);
  a.half = pointer(layer.half), a.shorts = pointer(layer.shorts), a.bytes = pointer(layer.bytes);
  if (a.shorts != nullptr || a.bytes != nullptr) a.scale = pointer(layer.scale), a.widen = pointer(layer.widen);
  calls_.emplace_back(i, [a, &kernels](float* v) mutable { return a.v = v, kernels.engine_conv(a); });
}

void Arena::bind_fire(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map& x = maps_[step.reads[0]];
  const Kernels& kernels = network_.kernels_;
  EngineFire a{};
  epilogue(a, step);
  a.size = x.stride[0], a.x_stride = x.size[0] == T_ && T_ > 1 ? a.size : 0;
  a.once = step.keep_sum && network_.values()[step.out[0]].is_static;
  a.x = static_cast<const float*>(x.first);
  calls_.emplace_back(i, [a, &kernels](float* v) mutable { return a.v = v, kernels.engine_fire(a); });
}

void Arena::bind_pool(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map &x = maps_[step.reads[0]], &y = maps_[step.out[0]];
  const Kernels& kernels = network_.kernels_;
  if (step.kernel == 1) {
    Map chosen = x;
    for (int axis = 2; axis < 4; axis++) chosen.size[axis] = y.size[axis], chosen.stride[axis] *= step.stride;
    return bind_elements(i, Element::copy, y, chosen);
  }
  const auto set = [&](auto& a) {
    a.images = x.size[0] * x.size[1], a.height = x.size[2], a.width = x.size[3], a.channels = x.size[4];
    a.kernel = step.kernel, a.stride = step.stride, a.padding = step.padding[0], a.threads = threads_;
  };
  if (y.bytes) {
    EnginePool a{};
    set(a), a.x = static_cast<const uint8_t*>(x.first), a.y = static_cast<uint8_t*>(y.first);
    calls_.emplace_back(i, [a, &kernels](float*) { return kernels.engine_max_pool(a); });
    return;
  }
  EngineWindows a{};
  set(a), set_x(a, x);
  a.out_height = y.size[2], a.out_width = y.size[3], a.mean = step.op == Op::avg_pool;
  a.count_padding = step.count_padding, a.y = static_cast<float*>(y.first);
  calls_.emplace_back(i, [a, &kernels](float*) { return kernels.engine_windows(a); });
}

void Arena::bind_reduce(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map &x = maps_[step.reads[0]], &y = maps_[step.out[0]];
  const Kernels& kernels = network_.kernels_;
  const bool places = step.op == Op::mean;
  EngineReduce a{};
  a.outer = places ? x.size[0] * x.size[1] : 1, a.count = places ? x.size[2] * x.size[3] : x.size[0];
  a.inner = places ? x.size[4] : x.stride[0];
  a.mean = step.op != Op::time_sum, a.y = static_cast<float*>(y.first), a.threads = threads_;
  set_x(a, x);
  calls_.emplace_back(i, [a, &kernels](float*) { return kernels.engine_reduce(a); });
}

Map Arena::constant(const std::string& name) const {
  const auto& sides = network_.sides_.at(name);
  // A kernel does not write to what it reads.
  auto* first = const_cast<float*>(network_.floats_.at(name).data());
  return map_of(first, false, 1, 1, {sides[0], sides[1], sides[2]});
}

void Arena::bind_affine(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map &x = maps_[step.reads[0]], &y = maps_[step.out[0]];
  if (!step.weight && !step.bias) return bind_elements(i, Element::copy, y, x);
  const Map first = constant(step.weight ? *step.weight : *step.bias);
  if (step.weight && step.bias) {
    const Map bias = constant(*step.bias);
    return bind_elements(i, Element::affine, y, x, &first, &bias);
  }
  const bool divides = step.op == Op::divide;
  bind_elements(i, divides ? Element::divide : step.weight ? Element::mul : Element::add, y, x, &first);
}

void Arena::bind_joined(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Map& y = maps_[step.out[0]];
  if (step.op != Op::cat) {
    const Element element = step.op == Op::add ? Element::add : step.op == Op::mul ? Element::mul : Element::largest;
    return bind_elements(i, element, y, maps_[step.reads[0]], &maps_[step.reads[1]]);
  }
  int64_t first = 0;
  for (const int64_t read : step.reads) {
    Map part = y;
    part.size[4] = maps_[read].size[4];
    part.first = static_cast<char*>(y.first) + first * (y.bytes ? 1 : 4);
    bind_elements(i, Element::copy, part, maps_[read]);
    first += part.size[4];
  }
}

void Arena::bind_attention(size_t i) {
  const Step& step = network_.plan().steps[i];
  const Kernels& kernels = network_.kernels_;
  const auto bytes = [&](size_t k) { return static_cast<const uint8_t*>(maps_[step.reads[k]].first); };
  const Map& q = maps_[step.reads[0]];
  EngineAttention a{};
  a.maps = q.size[0] * q.size[1], a.tokens = q.size[2] * q.size[3], a.channels = q.size[4], a.heads = step.heads;
  a.scale = step.high, a.q = bytes(0), a.k = bytes(1), a.v = bytes(2), a.threads = threads_;
  a.y = static_cast<float*>(maps_[step.out[0]].first);
  calls_.emplace_back(i, [a, &kernels](float*) { return kernels.engine_attention(a); });
}

void Arena::bind_elements(size_t i, Element element, Map y, const Map& a, const Map* b, const Map* c) {
  struct Bound {
    EngineElements arguments;
    int64_t sizes[5], strides[20];
  } bound{};
  const Step& step = network_.plan().steps[i];
  const Map* maps[] = {&y, &a, b, c};
  for (int axis = 0; axis < 5; axis++) {
    bound.sizes[axis] = y.size[axis];
    for (int k = 0; k < 4; k++)
      bound.strides[5 * k + axis] = maps[k] == nullptr || maps[k]->size[axis] == 1 ? 0 : maps[k]->stride[axis];
  }
  EngineElements& e = bound.arguments;
  e.element = element, e.low = step.low, e.high = step.high, e.threads = threads_;
  e.y = y.first, e.y_bytes = y.bytes, e.a = a.first, e.a_bytes = a.bytes;
  if (b != nullptr) e.b = b->first, e.b_bytes = b->bytes;
  if (c != nullptr) e.c = static_cast<const float*>(c->first);
  const Kernels& kernels = network_.kernels_;
  calls_.emplace_back(i, [bound, &kernels](float*) mutable {
    bound.arguments.sizes = bound.sizes, bound.arguments.strides = bound.strides;
    return kernels.engine_elements(bound.arguments);
  });
}

}  // namespace spikeloom::runtime
