#include "runtime/tensors.hpp"

#include <algorithm>
#include <cstring>

namespace spikeloom::runtime {
namespace {

constexpr uint64_t MOST_HEADER = 64 << 20;

struct Known {
  std::string_view name;
  int64_t bytes;
  Type type;
};
constexpr Known KNOWN[] = {
    {"F32", 4, Type::float32}, {"BF16", 2, Type::bfloat16}, {"I8", 1, Type::int8},       {"BOOL", 1, Type::other},
    {"U8", 1, Type::other},    {"F8_E4M3", 1, Type::other}, {"F8_E5M2", 1, Type::other}, {"I16", 2, Type::other},
    {"U16", 2, Type::other},   {"F16", 2, Type::other},     {"I32", 4, Type::other},     {"U32", 4, Type::other},
    {"I64", 8, Type::other},   {"U64", 8, Type::other},     {"F64", 8, Type::other},
};

struct Span {
  int64_t begin, end;
};

int64_t size_of(const Json& value) {
  need(value.kind == Json::integer && value.whole >= 0, "a size in the header is no whole number");
  return value.whole;
}

Span read_tensor(const Json& entry, std::string_view data, Tensor& tensor) {
  const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
  need(entry.kind == Json::object && entry.keys.size() == 3 && dtype != nullptr && shape != nullptr &&
           offsets != nullptr && shape->kind == Json::list && offsets->kind == Json::list && offsets->items.size() == 2,
       "the header's entry of a tensor is not dtype, shape and data_offsets");
  const auto* known = std::find_if(std::begin(KNOWN), std::end(KNOWN), [&](const Known& k) {
    return dtype->kind == Json::text && k.name == dtype->string;
  });
  need(known != std::end(KNOWN), "a tensor of an unknown type");
  tensor.type = known->type;
  int64_t count = 1;
  for (const Json& side : shape->items) {
    tensor.shape.push_back(size_of(side));
    need(!__builtin_mul_overflow(count, side.whole, &count), "a tensor larger than any file");
  }
  const Span span{size_of(offsets->items[0]), size_of(offsets->items[1])};
  int64_t bytes = 0;
  need(!__builtin_mul_overflow(count, known->bytes, &bytes) && span.begin <= span.end &&
           span.end - span.begin == bytes && static_cast<uint64_t>(span.end) <= data.size(),
       "a tensor does not lie in the file");
  tensor.count = count, tensor.bytes = data.data() + span.begin;
  return span;
}

}  // namespace

std::vector<float> Tensor::floats() const {
  std::vector<float> found(static_cast<size_t>(count));
  if (type == Type::float32) {
    if (count > 0) std::memcpy(found.data(), bytes, found.size() * 4);
  } else if (type == Type::bfloat16) {
    for (size_t i = 0; i < found.size(); i++) {
      uint16_t half;
      std::memcpy(&half, bytes + 2 * i, 2);
      const uint32_t word = uint32_t{half} << 16;
      std::memcpy(&found[i], &word, 4);
    }
  } else {
    for (size_t i = 0; i < found.size(); i++) found[i] = static_cast<signed char>(bytes[i]);
  }
  return found;
}

File read_safetensors(std::string_view bytes) {
  uint64_t length = 0;
  for (size_t i = 0; bytes.size() >= 8 && i < 8; i++)
    length |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  need(bytes.size() >= 8 && length <= MOST_HEADER && length <= bytes.size() - 8,
       "truncated or not a safetensors file: its header does not lie in it");
  const Json header = parse_json(bytes.substr(8, length));
  need(header.kind == Json::object, "its header is no object");
  const std::string_view data = bytes.substr(8 + length);
  File file;
  file.metadata.kind = Json::object;
  std::vector<Span> spans;
  for (size_t i = 0; i < header.keys.size(); i++) {
    if (header.keys[i] != "__metadata__") {
      spans.push_back(read_tensor(header.items[i], data, file.tensors[header.keys[i]]));
      continue;
    }
    file.metadata = header.items[i];
    need(file.metadata.kind == Json::object, "its metadata are no object");
    for (const Json& value : file.metadata.items) need(value.kind == Json::text, "its metadata are no texts");
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  int64_t end = 0;
  for (const Span& span : spans) {
    need(span.begin == end, "its tensors overlap, or leave a gap");
    end = span.end;
  }
  need(static_cast<uint64_t>(end) == data.size(), "truncated or longer than its tensors");
  return file;
}

}  // namespace spikeloom::runtime
