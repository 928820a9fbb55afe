// JSON as RFC 8259 has it, no more: one value of a text, every number finite, every key once.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace spikeloom::runtime {

// A file that is not what it should be, or a call that does not fit; what() says why.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void refuse(const std::string& why) { throw Refused(why); }
inline void need(bool fits, const char* why) {
  if (!fits) throw Refused(why);
}

struct Json {
  enum Kind { null, boolean, integer, real, text, list, object } kind = null;
  int64_t whole = 0;  // of an integer; 0 or 1 of a boolean
  double number = 0;  // of an integer or real one
  std::string string;
  std::vector<Json> items;        // of a list, or the values of an object
  std::vector<std::string> keys;  // of an object

  const Json* find(std::string_view key) const;
};

Json parse_json(std::string_view text);

}  // namespace spikeloom::runtime
