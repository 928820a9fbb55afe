// The memory of one run at a time, and the calls of kernels that fill it.
#pragma once

#include "runtime/network.hpp"

namespace spikeloom::runtime {

// Numbers in memory, [T or 1, N, H, W, C] or an order of these.
struct Map {
  void* first;
  bool bytes;
  int64_t size[5], stride[5];
};

class Arena {
 public:
  explicit Arena(const Network& network) : network_(network), buffers_(network.values().size()) {}

  // Logits [T, images, classes], or [images, classes] of a network that joins its steps.
  void run(const Input& input, int64_t T, int threads, float* logits, Potentials* potentials);

 private:
  using Call = std::function<int(float* v)>;

  const Network& network_;
  std::vector<Buffer> buffers_;  // by value
  std::vector<Map> maps_;
  std::vector<std::pair<size_t, Call>> calls_;  // and the step that each belongs to
  int64_t T_ = 0, N_ = 0;
  int threads_ = 0;

  void bind(int64_t T, int64_t N, int threads);
  void bind_step(size_t i);
  void bind_conv(size_t i);
  void bind_fire(size_t i);
  void bind_pool(size_t i);
  void bind_reduce(size_t i);
  void bind_affine(size_t i);
  void bind_joined(size_t i);
  void bind_attention(size_t i);
  void bind_elements(size_t i, Element element, Map y, const Map& a, const Map* b = nullptr, const Map* c = nullptr);
  void epilogue(Epilogue& a, const Step& step) const;
  Map constant(const std::string& name) const;
  void put_input(const Input& input);
  float* potentials_of(size_t i, Potentials* potentials) const;
};

}  // namespace spikeloom::runtime
