// Which instruction level of the kernels runs.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace spikeloom {

// The levels that this processor has, the best of them last.
const std::vector<const Kernels*>& levels();

// The one whose kernels are called.
const Kernels*& active();

// Whether this process was forked from one that had loaded the kernels. Threads do not survive a fork, and the child
// would wait for them: it runs everything on the thread that it has.
bool forked();

}  // namespace spikeloom
