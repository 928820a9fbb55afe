#include "runtime/json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace spikeloom::runtime {
namespace {

constexpr int DEEPEST = 32;
constexpr int64_t MOST_VALUES = 1 << 20;  // of a text: a plan of as many steps as there may be has fewer

// The length of the UTF-8 character at the beginning of a text; 0 where there is none.
size_t character(std::string_view s) {
  const auto byte = [&](size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0u; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4) return 0;
  for (size_t i = 1; i < length; i++)
    if ((byte(i) & 0xc0) != 0x80) return 0;
  const unsigned second = byte(1);
  const bool narrow = (first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) ||
                      (first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f);
  return narrow ? 0 : length;
}

void append(std::string& s, uint32_t code) {
  const auto put = [&](uint32_t byte) { s.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) return put(0xc0 | code >> 6), put(0x80 | (code & 63));
  if (code < 0x10000) return put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
  put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 63)), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json found = value(0);
    skip();
    if (at_ != text_.size()) fail("more than one value");
    return found;
  }

 private:
  std::string_view text_;
  size_t at_ = 0;
  int64_t values_ = 0;

  [[noreturn]] void fail(const char* what) const {
    refuse("it is not JSON: " + std::string(what) + " at character " + std::to_string(at_));
  }
  char look() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) at_++;
  }
  bool take(char c) {
    skip();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    at_++;
    return true;
  }
  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) fail("an unknown word");
    at_ += expected.size();
  }

  Json value(int depth) {
    if (depth > DEEPEST) fail("values inside values");
    if (++values_ > MOST_VALUES) fail("too many values");
    skip();
    Json found;
    switch (look()) {
      case '{': found.kind = Json::object, members(found, depth); break;
      case '[': found.kind = Json::list, items(found, depth); break;
      case '"': found.kind = Json::text, found.string = text(); break;
      case 't': word("true"), found.kind = Json::boolean, found.whole = 1; break;
      case 'f': word("false"), found.kind = Json::boolean; break;
      case 'n': word("null"); break;
      default: number(found);
    }
    return found;
  }

  void items(Json& found, int depth) {
    at_++;
    if (take(']')) return;
    do found.items.push_back(value(depth + 1));
    while (take(','));
    if (!take(']')) fail("a list without an end");
  }

  void members(Json& found, int depth) {
    at_++;
    if (take('}')) return;
    do {
      skip();
      if (look() != '"') fail("a key that is no text");
      found.keys.push_back(text());
      if (!take(':')) fail("a key without a value");
      found.items.push_back(value(depth + 1));
    } while (take(','));
    if (!take('}')) fail("an object without an end");
    std::vector<std::string_view> sorted(found.keys.begin(), found.keys.end());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) fail("a key twice, in the object that ends");
  }

  void digits() {
    const size_t first = at_;
    while (look() >= '0' && look() <= '9') at_++;
    if (at_ == first) fail("no value");
  }

  void number(Json& found) {
    const size_t first = at_;
    if (look() == '-') at_++;
    const size_t leading = at_;
    digits();
    if (text_[leading] == '0' && at_ > leading + 1) fail("a number that begins with 0");
    const size_t end = at_;
    if (look() == '.') at_++, digits();
    if (look() == 'e' || look() == 'E') {
      at_++;
      if (look() == '+' || look() == '-') at_++;
      digits();
    }
    const char *from = text_.data() + first, *to = text_.data() + at_;
    const auto [stop, error] = std::from_chars(from, to, found.number);
    if (error != std::errc{} || stop != to || !std::isfinite(found.number)) fail("a number out of range");
    found.kind = Json::real;
    if (end == at_ && std::from_chars(from, to, found.whole).ec == std::errc{}) found.kind = Json::integer;
  }

  uint32_t code_unit() {
    uint32_t code = 0;
    if (at_ + 4 > text_.size()) fail("half a character");
    const auto [stop, error] = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    if (error != std::errc{} || stop != text_.data() + at_ + 4) fail("half a character");
    at_ += 4;
    return code;
  }

  void escape(std::string& found) {
    static constexpr std::string_view NAMES = "\"\\/bfnrt", MEANT = "\"\\/\b\f\n\r\t";
    const char name = look();
    at_++;
    if (const size_t i = NAMES.find(name); i != std::string_view::npos) return found.push_back(MEANT[i]);
    if (name != 'u') fail("an unknown escape");
    uint32_t code = code_unit();
    if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = code_unit();
      if (low < 0xdc00 || low > 0xdfff) fail("half a character");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xd800 && code < 0xe000) {
      fail("half a character");
    }
    append(found, code);
  }

  std::string text() {
    std::string found;
    for (at_++; look() != '"';) {
      if (at_ >= text_.size()) fail("a text without an end");
      if (static_cast<unsigned char>(look()) < 0x20) fail("a control character in a text");
      if (look() == '\\') {
        at_++, escape(found);
        continue;
      }
      const size_t length = character(text_.substr(at_, 4));
      if (length == 0) fail("a character that is not UTF-8");
      found.append(text_.substr(at_, length));
      at_ += length;
    }
    at_++;
    return found;
  }
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (size_t i = 0; i < keys.size(); i++)
    if (keys[i] == key) return &items[i];
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

}  // namespace spikeloom::runtime
