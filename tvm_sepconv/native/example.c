/* Runs one layer of a bundle on a file of raw numbers: the example of tvm_sepconv.h.
 *
 * In the bundle's folder `c`, compiled on the device or with a cross compiler for it (ARCH: a folder of ../lib, such
 * as x86_64, aarch64 or armv7):
 *
 *   cc -std=c99 -o example example.c -L../lib/ARCH -Wl,-rpath,'$ORIGIN/../lib/ARCH' -ltvm_sepconv_runtime -ldl -lpthread
 *   ./example .. LAYER input.raw output.raw BATCH STEPS [THREADS]
 *
 * Input and output are compact arrays of the layer's dtype: (batch, steps, channels) to (batch, output steps, filters),
 * or with channels_first (batch, channels, steps) to (batch, filters, output steps).
 */
#include <stdio.h>
#include <stdlib.h>

#include "tvm_sepconv.h"

static int failed(const char* what) {
  fprintf(stderr, "example: %s\n", what);
  return 1;
}

static int read_exactly(const char* path, void* data, size_t bytes) {
  FILE* file = fopen(path, "rb");
  const int read = file && fread(data, 1, bytes, file) == bytes && fgetc(file) == EOF;
  if (file) fclose(file);
  return read;
}

static int write_all(const char* path, const void* data, size_t bytes) {
  FILE* file = fopen(path, "wb");
  const int written = file && fwrite(data, 1, bytes, file) == bytes;
  return file && fclose(file) == 0 && written;
}

/* Open the layer and say what it is. */
static int open_layer(const char* path, const char* name, tvm_sepconv_layer** layer, tvm_sepconv_layer_info* info) {
  static const char* const dtypes[] = {"float16", "bfloat16", "float32", "float64"};
  tvm_sepconv_bundle* bundle;
  if (tvm_sepconv_bundle_open(path, NULL, &bundle)) return 0;
  const int status = tvm_sepconv_bundle_layer(bundle, name, layer);
  if (status == TVM_SEPCONV_OK) {
    tvm_sepconv_layer_describe(*layer, info);
    printf("%s: %s, %lld channels to %lld filters, %s, kernel size %lld, %s\n", name,
           tvm_sepconv_bundle_target(bundle), (long long)info->channels, (long long)info->filters,
           info->channels_first ? "channels_first" : "channels_last", (long long)info->kernel_size,
           dtypes[info->dtype]);
  }
  tvm_sepconv_bundle_close(bundle);
  return status == TVM_SEPCONV_OK;
}

int main(int argc, char** argv) {
  if (argc != 7 && argc != 8) return failed("expected BUNDLE LAYER INPUT OUTPUT BATCH STEPS [THREADS]");
  const int64_t batch = atoll(argv[5]), steps = atoll(argv[6]);
  tvm_sepconv_layer* layer;
  tvm_sepconv_layer_info info;
  if (batch < 1 || steps < 1) return failed("BATCH and STEPS must be at least 1");
  if (argc == 8) tvm_sepconv_set_num_threads(atoi(argv[7]));
  if (!open_layer(argv[1], argv[2], &layer, &info)) return failed(tvm_sepconv_last_error());
  const int64_t out_steps = tvm_sepconv_out_steps(layer, steps);
  const size_t x_bytes = (size_t)(batch * steps * info.channels * info.element_bytes);
  const size_t y_bytes = (size_t)(batch * out_steps * info.filters * info.element_bytes);
  if (out_steps < 1) return failed("STEPS are fewer than the kernel needs");
  void *input = malloc(x_bytes), *output = malloc(y_bytes);
  if (!input || !output) return failed("out of memory");
  if (!read_exactly(argv[3], input, x_bytes)) return failed("INPUT is not a file of BATCH * STEPS * channels numbers");
  const tvm_sepconv_view x = {input, steps * info.channels, info.channels_first ? steps : info.channels};
  const tvm_sepconv_view y = {output, out_steps * info.filters, info.channels_first ? out_steps : info.filters};
  if (tvm_sepconv_prepare(layer) || tvm_sepconv_run(layer, batch, steps, x, y)) return failed(tvm_sepconv_last_error());
  if (!write_all(argv[4], output, y_bytes)) return failed("OUTPUT cannot be written");
  printf("%lld output steps, %d threads\n", (long long)out_steps, tvm_sepconv_num_threads());
  tvm_sepconv_layer_destroy(layer);
  free(input);
  free(output);
  return 0;
}
