// Threads that share the pieces of a layer's work with the threads that call.
//
// OpenMP's threads all meet at the end of a layer, and one that the system has given no core holds up everybody for a
// time slice. Here any thread takes the next piece, and the caller waits only for pieces that somebody has begun.
#pragma once

#include <cstdint>

namespace spikeloom {

// Runs run(body, i) once for every i of [0, pieces), on the caller and on at most threads - 1 others, in any order;
// returns when all have run. Threads may call at the same time. In a forked process `threads` must be 1: the others
// do not survive the fork.
void share_pieces(int64_t pieces, int threads, void (*run)(const void* body, int64_t piece), const void* body);

}  // namespace spikeloom
