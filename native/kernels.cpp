// The table of one instruction level's kernels.
#include "kernels.hpp"

#define SPIKELOOM_STRING_(x) #x
#define SPIKELOOM_STRING(x) SPIKELOOM_STRING_(x)

namespace spikeloom::SPIKELOOM_LEVEL {

extern const Kernels kernels{SPIKELOOM_STRING(SPIKELOOM_LEVEL),
                             scan_forward,
                             scan_backward,
                             moments,
                             affine,
                             band_forward,
                             band_backward,
                             filter_forward,
                             filter_backward,
                             filter_fire_forward,
                             filter_fire_backward,
                             estimate_forward,
                             estimate_backward,
                             gated_forward,
                             gated_backward,
                             conv_forward_sparse,
                             conv_forward_minimal,
                             conv_weight_sparse,
                             conv_weight_minimal,
                             conv_input_minimal,
                             conv_weight_strided,
                             conv_input_strided,
                             depthwise_forward,
                             depthwise_input,
                             depthwise_weight,
                             max_pool_forward,
                             max_pool_backward,
                             event_pack,
                             event_conv,
                             event_fire,
                             event_max_pool,
                             event_attention};

}  // namespace spikeloom::SPIKELOOM_LEVEL
