// The functions of spikeloom.h: no exception leaves them, and every argument is checked.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>

#include "include/spikeloom.h"
#include "runtime/network.hpp"

using namespace spikeloom;
using runtime::need;
using runtime::Network;
using runtime::refuse;

struct spikeloom_network {
  std::shared_ptr<const Network> network;
};

struct spikeloom_stream {
  std::shared_ptr<const Network> network;
  int64_t images;
  runtime::Potentials potentials;
};

namespace {

constexpr double MAX_BYTES = 2. * (1 << 30), MAX_OPERATIONS = 200e9;
constexpr long long FILE_BYTES = 1LL << 34;

thread_local char error_text[400] = "";

// One line, whatever a file has put into it; cut between characters.
void set_error(const char* text) {
  size_t length = 0;
  for (; text[length] != '\0' && length + 1 < sizeof error_text; length++) {
    const unsigned char c = static_cast<unsigned char>(text[length]);
    error_text[length] = c < 0x20 || c == 0x7f ? ' ' : static_cast<char>(c);
  }
  if (text[length] != '\0')
    while (length > 0 && (static_cast<unsigned char>(error_text[length - 1]) & 0xc0) == 0x80) length--;
  if (text[length] != '\0' && length > 0 && (static_cast<unsigned char>(error_text[length - 1]) & 0xc0) == 0xc0)
    length--;
  error_text[length] = '\0';
}

// Neurons would take a sum that is no number for silence: `steps` steps of `images` inputs that hold one are refused.
void need_numbers(const float* x, int64_t steps, int64_t images, const runtime::Value& input) {
  constexpr uint32_t EXPONENT = 0x7f800000;
  uint32_t wrong = 0;
  const int64_t count = steps * images * input.size();
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    wrong |= (bits & EXPONENT) == EXPONENT;
  }
  need(wrong == 0, "the input holds NaN or infinite numbers");
}

// What the body returns, or `failed` where it throws.
template <class Result, class Body>
Result guarded(Result failed, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    set_error("out of memory");
  } catch (const std::length_error&) {
    set_error("out of memory");
  } catch (const std::exception& error) {
    set_error(error.what());
  } catch (...) {
    set_error("an unknown error");
  }
  return failed;
}

spikeloom_network* make(std::string_view file, double max_bytes, double max_operations) {
  need(max_bytes >= 0 && max_operations >= 0, "limits must be 0 or more");
  const double bytes = max_bytes == 0 ? MAX_BYTES : max_bytes;
  const double operations = max_operations == 0 ? MAX_OPERATIONS : max_operations;
  return new spikeloom_network{std::make_shared<const Network>(file, bytes, operations)};
}

struct Closer {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

struct Memory {
  runtime::Buffer buffer;
  size_t size = 0;
};

void read_file(const char* path, Memory& memory) {
  const std::unique_ptr<std::FILE, Closer> file(std::fopen(path, "rb"));
  need(file != nullptr, "no such file, or it may not be read");
  need(std::fseek(file.get(), 0, SEEK_END) == 0, "it cannot be read");
  const long long size = std::ftell(file.get());
  need(size >= 0 && size <= FILE_BYTES && std::fseek(file.get(), 0, SEEK_SET) == 0, "no file of up to 16 GiB");
  memory.size = static_cast<size_t>(size);
  void* to = memory.buffer.of(memory.size + 1);
  need(std::fread(to, 1, memory.size, file.get()) == memory.size, "it cannot be read");
}

}  // namespace

spikeloom_network* spikeloom_load(const char* path, double max_bytes, double max_operations) {
  return guarded<spikeloom_network*>(nullptr, [&] {
    need(path != nullptr, "no path");
    try {
      Memory memory;
      read_file(path, memory);
      const char* text = static_cast<const char*>(memory.buffer.of(0));
      return make({text, memory.size}, max_bytes, max_operations);
    } catch (const runtime::Refused& error) {
      refuse(std::string(path) + ": " + error.what());
    }
  });
}

spikeloom_network* spikeloom_load_memory(const void* file, size_t size, double max_bytes, double max_operations) {
  return guarded<spikeloom_network*>(nullptr, [&] {
    need(file != nullptr, "no file");
    return make({static_cast<const char*>(file), size}, max_bytes, max_operations);
  });
}

void spikeloom_free(spikeloom_network* network) { delete network; }

int spikeloom_describe(const spikeloom_network* network, spikeloom_info* info) {
  return guarded(-1, [&] {
    need(network != nullptr && info != nullptr, "no network, or no place for what it is");
    const auto& known = *network->network;
    const runtime::Plan& plan = known.plan();
    *info = spikeloom_info{};
    info->channels = plan.input.channels, info->height = plan.input.height, info->width = plan.input.width;
    info->classes = known.values().back().channels, info->steps = plan.T;
    info->is_static = plan.input.is_static, info->per_step = plan.per_step, info->fixed_steps = plan.fixed_T;
    info->bytes = known.cost().bytes, info->operations = known.cost().operations;
    return 0;
  });
}

int64_t spikeloom_count(const spikeloom_network* network, int64_t steps, int64_t images) {
  return guarded(int64_t{-1}, [&] {
    need(network != nullptr, "no network");
    return network->network->count(steps, images);
  });
}

int spikeloom_run(const spikeloom_network* network, const float* x, int64_t steps, int64_t images, float* logits,
                  int64_t count) {
  return guarded(-1, [&] {
    need(network != nullptr && x != nullptr && logits != nullptr, "no network, no input or no place for logits");
    need(count >= network->network->count(steps, images), "not enough room for the logits");
    need_numbers(x, steps, images, network->network->plan().input);
    network->network->run(x, steps, images, logits);
    return 0;
  });
}

spikeloom_stream* spikeloom_stream_new(const spikeloom_network* network, int64_t images) {
  return guarded<spikeloom_stream*>(nullptr, [&] {
    need(network != nullptr && images >= 1 && images <= 1 << 24, "no network, or no images");
    return new spikeloom_stream{network->network, images, {}};
  });
}

int spikeloom_stream_run(spikeloom_stream* stream, const float* x, int64_t steps, float* logits, int64_t count) {
  return guarded(-1, [&] {
    need(stream != nullptr && x != nullptr && logits != nullptr, "no stream, no input or no place for logits");
    const Network& network = *stream->network;
    network.count(steps, stream->images);
    const int64_t wanted = (network.plan().per_step ? steps : 1) * stream->images * network.values().back().channels;
    need(count >= wanted, "not enough room for the logits");
    need_numbers(x, steps, stream->images, network.plan().input);
    network.advance(x, steps, stream->images, logits, stream->potentials);
    return 0;
  });
}

void spikeloom_stream_free(spikeloom_stream* stream) { delete stream; }

const char* spikeloom_error(void) { return error_text; }

int spikeloom_threads(int threads) {
  return guarded(-1, [&] {
    need(threads >= 0 && threads <= runtime::MOST_THREADS, "threads must be 0 to 1024");
    runtime::set_threads(threads);
    return 0;
  });
}

const char* spikeloom_level(const char* level) {
  return guarded<const char*>(nullptr, [&]() -> const char* {
    if (level == nullptr) return active()->level;
    for (const Kernels* known : levels())
      if (std::strcmp(level, known->level) == 0) return (active() = known)->level;
    refuse("this processor has no instruction level " + std::string(level));
  });
}
