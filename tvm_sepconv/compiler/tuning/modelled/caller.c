/* Runs a compiled layer under emulation: each input once, the first one last and between two marks.
 *
 * usage: caller LIBRARY DEPTHWISE POINTWISE BIAS|- [BATCH STEPS X Y]...
 * All files are raw; X is read, Y is written, both compact. The padding is "same".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "marks.h"
#include "tvm_sepconv.h"

enum { ALIGNMENT = 64, FIRST_CASE = 5, WORDS = 4 };

static void fail(const char* what, const char* path) {
  fprintf(stderr, "%s %s\n", what, path);
  exit(3);
}

static void need(int status) {
  if (!status) return;
  fprintf(stderr, "%s\n", tvm_sepconv_last_error());
  exit(4);
}

static void* aligned(size_t size) {
  void* data = NULL;
  if (posix_memalign(&data, ALIGNMENT, size + ALIGNMENT)) fail("out of memory", "");
  return data;
}

static void* read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) fail("cannot read", path);
  const size_t size = (size_t)ftell(file);
  void* data = aligned(size);
  rewind(file);
  if (fread(data, 1, size, file) != size) fail("cannot read", path);
  fclose(file);
  return data;
}

static void run(const tvm_sepconv_layer* layer, char** words, int counted) {
  tvm_sepconv_layer_info info;
  tvm_sepconv_layer_describe(layer, &info);
  const int64_t batch = atoll(words[0]), steps = atoll(words[1]);
  const int64_t out_steps = tvm_sepconv_out_steps(layer, steps);
  const size_t size = (size_t)(batch * out_steps * info.filters * info.element_bytes);
  char* y = aligned(size);
  memset(y, 0xff, size); /* NaN: what is not written shows */
  const int first = info.channels_first;
  const tvm_sepconv_view from = {read_file(words[2]), steps * info.channels, first ? steps : info.channels};
  const tvm_sepconv_view to = {y, out_steps * info.filters, first ? out_steps : info.filters};
  if (counted) {
    MARK_BEGIN();
    const int status = tvm_sepconv_run(layer, batch, steps, from, to);
    MARK_END();
    need(status);
  } else {
    need(tvm_sepconv_run(layer, batch, steps, from, to));
  }
  FILE* file = fopen(words[3], "wb");
  if (!file || fwrite(y, 1, size, file) != size || fclose(file)) fail("cannot write", words[3]);
  free(from.data);
  free(y);
}

int main(int argc, char** argv) {
  if (argc < FIRST_CASE + WORDS || (argc - FIRST_CASE) % WORDS) return 2;
  void *depthwise = read_file(argv[2]), *pointwise = read_file(argv[3]);
  void* bias = strcmp(argv[4], "-") ? read_file(argv[4]) : NULL;
  tvm_sepconv_set_num_threads(1);
  tvm_sepconv_layer* layer;
  need(tvm_sepconv_layer_create(argv[1], depthwise, pointwise, bias, TVM_SEPCONV_SAME, 0, 0, &layer));
  need(tvm_sepconv_prepare(layer));
  for (int i = argc - WORDS; i >= FIRST_CASE; i -= WORDS) run(layer, argv + i, i == FIRST_CASE);
  tvm_sepconv_layer_destroy(layer);
  return 0;
}
