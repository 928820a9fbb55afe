// Threads that share the pieces of one layer after another.
//
// OpenMP's threads meet at the end of every layer. Where another process has one of the cores, a thread that was given
// a share of a layer's pieces does not come for milliseconds, and all others wait for it. Here whoever is free takes
// the next piece: a thread without a core takes none, and the caller waits only for pieces that were begun.
#pragma once

#include <cstdint>

namespace spikeloom {

using Piece = void (*)(const void* body, int64_t item);

// Runs piece(body, item) for all items of [0, items) on the calling thread and at most threads - 1 others.
void share(int64_t items, int threads, Piece piece, const void* body);

// While one lives, the threads that share work with this one look for it without falling asleep: waking one takes as
// long as a small layer. They leave their core to whoever wants it.
class Awake {
 public:
  explicit Awake(int threads);
  Awake(const Awake&) = delete;
  ~Awake();

 private:
  bool outermost_;
};

}  // namespace spikeloom
