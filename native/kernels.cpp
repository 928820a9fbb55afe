// The table of one instruction level's kernels.
#include "kernels.hpp"

#define SPIKELOOM_STRING_(x) #x
#define SPIKELOOM_STRING(x) SPIKELOOM_STRING_(x)

namespace spikeloom::SPIKELOOM_LEVEL {

extern const Kernels kernels{
    SPIKELOOM_STRING(SPIKELOOM_LEVEL),
#define KERNEL(function, arguments, calls) function,
#include "kernels.def"
#undef KERNEL
};

}  // namespace spikeloom::SPIKELOOM_LEVEL
