/* Spikeloom's engine for C: networks that `Engine.save` wrote, run without Python and without PyTorch.
 *
 * A function that fails returns NULL or -1 and leaves one line of text for `spikeloom_error`. Nothing is thrown.
 * Several threads may run one network at the same time; a stream belongs to one thread at a time. */
#ifndef SPIKELOOM_H
#define SPIKELOOM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SPIKELOOM_API __declspec(dllexport)
#else
#define SPIKELOOM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct spikeloom_network spikeloom_network;
typedef struct spikeloom_stream spikeloom_stream;

typedef struct spikeloom_info {
  int64_t channels, height, width; /* of the input */
  int64_t classes;                 /* of the logits */
  int64_t steps;                   /* for which an image is repeated; of a sequence, those of the example */
  int32_t is_static;               /* takes images [N, C, H, W]; else sequences [T, N, C, H, W] */
  int32_t per_step;                /* gives logits [T, N, classes]; else [N, classes] */
  int32_t fixed_steps;             /* takes sequences of `steps` steps alone */
  int32_t unused;
  double bytes, operations; /* what an image costs: bytes of maps; operations, if no input were zero */
} spikeloom_info;

/* A network from a file, or from a copy of one in memory, which is not needed afterwards. A file that costs more bytes
 * or operations an image than is allowed is refused; 0 stands for 2 GiB and 200 billion. */
SPIKELOOM_API spikeloom_network* spikeloom_load(const char* path, double max_bytes, double max_operations);
SPIKELOOM_API spikeloom_network* spikeloom_load_memory(const void* file, size_t size, double max_bytes,
                                                       double max_operations);
SPIKELOOM_API void spikeloom_free(spikeloom_network* network);

SPIKELOOM_API int spikeloom_describe(const spikeloom_network* network, spikeloom_info* info);

/* How many logits `steps` steps of `images` images give, or -1. An image that is repeated is one step. */
SPIKELOOM_API int64_t spikeloom_count(const spikeloom_network* network, int64_t steps, int64_t images);

/* Logits of x [steps, images, channels, height, width]; NaN and infinite numbers are refused. `count` is the room in
 * `logits`, in numbers. Returns 0. */
SPIKELOOM_API int spikeloom_run(const spikeloom_network* network, const float* x, int64_t steps, int64_t images,
                                float* logits, int64_t count);

/* Neurons that remember: a call continues where the one before it ended, one step of an image or some of a sequence,
 * and gives `count` = (per_step ? steps : 1) images classes logits. The network may be freed before its streams. */
SPIKELOOM_API spikeloom_stream* spikeloom_stream_new(const spikeloom_network* network, int64_t images);
SPIKELOOM_API int spikeloom_stream_run(spikeloom_stream* stream, const float* x, int64_t steps, float* logits,
                                       int64_t count);
SPIKELOOM_API void spikeloom_stream_free(spikeloom_stream* stream);

/* Why the last call of this thread failed. */
SPIKELOOM_API const char* spikeloom_error(void);

/* Threads of all calls from here on; 0 for as many as there are cores. Returns 0, or -1 for other numbers. */
SPIKELOOM_API int spikeloom_threads(int threads);

/* The instruction level of networks that are loaded from here on: "baseline", "avx2", "avx512", or NULL to leave it.
 * Returns the one that is in use, or NULL for one that this processor lacks. */
SPIKELOOM_API const char* spikeloom_level(const char* level);

#ifdef __cplusplus
}
#endif

#endif
