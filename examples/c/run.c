/* A network of `spikeloom run RUN --portable --save FILE` in C: one image, or one step of a sequence.
 *
 *     cc run.c -I native/include -L FOLDER_OF_LIBSPIKELOOM -lspikeloom -o run
 *     ./run net.safetensors image.bin
 *
 * image.bin holds float32 numbers [channels, height, width]; without it all of them are 0. */
#include <stdio.h>
#include <stdlib.h>

#include "spikeloom.h"

/* What an image may cost here: larger networks are refused before they take memory or time. */
#ifndef MAX_BYTES
#define MAX_BYTES 1e9
#endif
#ifndef MAX_OPERATIONS
#define MAX_OPERATIONS 100e9
#endif

static int failed(const char* what) {
  fprintf(stderr, "error: %s\n", what);
  return 2;
}

static int read_image(const char* path, float* image, size_t numbers) {
  FILE* file = fopen(path, "rb");
  const int whole = file != NULL && fread(image, sizeof *image, numbers, file) == numbers;
  if (file != NULL) fclose(file);
  return whole ? 0 : failed("the image is not there, or too small");
}

int main(int count, char** words) {
  if (count != 2 && count != 3) return failed("usage: run FILE [IMAGE]");
  spikeloom_threads(1);
  spikeloom_network* network = spikeloom_load(words[1], MAX_BYTES, MAX_OPERATIONS);
  if (network == NULL) return failed(spikeloom_error());
  spikeloom_info info;
  spikeloom_describe(network, &info);
  const size_t numbers = (size_t)(info.channels * info.height * info.width);
  const int64_t steps = info.fixed_steps && !info.is_static ? info.steps : 1;
  const int64_t logits_count = spikeloom_count(network, steps, 1);
  float* image = calloc(numbers * (size_t)steps, sizeof *image);
  float* logits = logits_count < 0 ? NULL : calloc((size_t)logits_count, sizeof *logits);
  int status = image == NULL || logits == NULL ? failed("out of memory") : 0;
  if (status == 0 && count == 3) status = read_image(words[2], image, numbers);
  if (status == 0 && spikeloom_run(network, image, steps, 1, logits, logits_count) != 0)
    status = failed(spikeloom_error());
  for (int64_t i = 0; status == 0 && i < logits_count; i++) printf("%.9g\n", logits[i]);

  /* The same step by step: the potentials stay. */
  spikeloom_stream* stream = steps > 1 ? NULL : spikeloom_stream_new(network, 1);
  for (int step = 0; status == 0 && stream != NULL && step < 2; step++)
    if (spikeloom_stream_run(stream, image, 1, logits, logits_count) != 0) status = failed(spikeloom_error());
  spikeloom_stream_free(stream);
  spikeloom_free(network);
  free(image);
  free(logits);
  return status;
}
