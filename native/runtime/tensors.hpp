// Tensors of a safetensors file: https://huggingface.co/docs/safetensors
#pragma once

#include <map>
#include <string>
#include <vector>

#include "runtime/json.hpp"

namespace spikeloom::runtime {

enum class Type { float32, bfloat16, int8, other };

struct Tensor {
  Type type = Type::other;
  std::vector<int64_t> shape;
  int64_t count = 0;
  const char* bytes = nullptr;  // of the file, which may lie anywhere

  bool is(Type wanted, const std::vector<int64_t>& sides) const { return type == wanted && shape == sides; }
  std::vector<float> floats() const;  // of any type but `other`
};

using Tensors = std::map<std::string, Tensor, std::less<>>;

struct File {
  Tensors tensors;  // point into the file's bytes
  Json metadata;    // an object of texts
};

// Bounds of everything are checked: what a tensor says it holds lies in the file.
File read_safetensors(std::string_view bytes);

}  // namespace spikeloom::runtime
