/* A host program without Python: creates a layer from raw weights, runs it on a raw input, writes the output.
 *
 * usage: c_host LIBRARY DEPTHWISE POINTWISE BIAS|- PADDING LEFT RIGHT THREADS
 *               BYTES BATCH STEPS CHANNELS FILTERS FIRST X Y
 * BYTES: of an element; FIRST: 1 for channels_first; X is read, Y is written, both compact.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm_sepconv.h"

static void* read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) exit(3);
  const long size = ftell(file);
  char* data = malloc((size_t)size + 64);
  rewind(file);
  if (!data || fread(data, 1, (size_t)size, file) != (size_t)size) exit(3);
  fclose(file);
  return data;
}

static void need(int status) {
  if (!status) return;
  fprintf(stderr, "status %d: %s\n", status, tvm_sepconv_last_error());
  exit(4);
}

int main(int argc, char** argv) {
  if (argc != 17) return 2;
  const int64_t left = atoll(argv[6]), right = atoll(argv[7]);
  const int64_t bytes = atoll(argv[9]), batch = atoll(argv[10]), steps = atoll(argv[11]);
  const int64_t channels = atoll(argv[12]), filters = atoll(argv[13]);
  const int first = atoi(argv[14]);
  void *depthwise = read_file(argv[2]), *pointwise = read_file(argv[3]);
  void* bias = strcmp(argv[4], "-") ? read_file(argv[4]) : NULL;
  void* x = read_file(argv[15]);
  tvm_sepconv_set_num_threads(atoi(argv[8]));
  tvm_sepconv_layer* layer;
  need(tvm_sepconv_layer_create(argv[1], depthwise, pointwise, bias, (tvm_sepconv_padding)atoi(argv[5]),
                                left, right, &layer));
  free(depthwise); /* they are copied */
  free(pointwise);
  free(bias);
  const int64_t out_steps = tvm_sepconv_out_steps(layer, steps);
  const size_t size = (size_t)(batch * out_steps * filters * bytes);
  char* y = malloc(size + 1);
  memset(y, 0xff, size + 1); /* NaN: what is not written shows */
  const tvm_sepconv_view from = {x, steps * channels, first ? steps : channels};
  const tvm_sepconv_view to = {y, out_steps * filters, first ? out_steps : filters};
  need(tvm_sepconv_run(layer, batch, steps, from, to));
  need(tvm_sepconv_run(layer, batch, steps, from, to)); /* again, with scratch and threads in place */
  FILE* file = fopen(argv[16], "wb");
  if (!file || fwrite(y, 1, size, file) != size || fclose(file)) return 3;
  printf("%lld output steps, %d threads\n", (long long)out_steps, tvm_sepconv_num_threads());
  tvm_sepconv_layer_destroy(layer);
  return 0;
}
