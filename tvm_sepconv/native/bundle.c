/* Bundles as C programs open them: the checks of bundle.py, in the same order.
 *
 * Part of the runtime library, so that a host links one file. It needs nothing of the C library that the other files
 * do not need, reading files included: see tests/native.py for the list.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

#include "json.h"
#include "runtime.h"
#include "sha256.h"
#include "weights.h"

enum { FORMAT_VERSION = 1, LONGEST_PATH = 4096 };

struct tvm_sepconv_bundle {
  char *path, *manifest_text, *weights_file;
  json* manifest;
  const json *layers, *libraries; /* of the manifest; `libraries` of the target alone */
  weights weights;
};

/* ---- files ---------------------------------------------------------------------------------- */

/* A whole file for free(), or NULL. */
static char* read_file(const char* folder, const char* name, size_t* bytes) {
  char path[LONGEST_PATH];
  const int length = snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE* file = length < LONGEST_PATH ? fopen(path, "re") : NULL;
  if (!file) return NULL;
  const long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
  char* data = size < 0 || fseek(file, 0, SEEK_SET) ? NULL : malloc((size_t)size + 1);
  *bytes = data ? fread(data, 1, (size_t)size, file) : 0;
  fclose(file);
  if (data && *bytes == (size_t)size) return data;
  free(data);
  return NULL;
}

/* Read the file of a manifest's entry, which has its path and sha256. */
static int read_verified(const tvm_sepconv_bundle* b, const json* entry, char** data, size_t* bytes) {
  const char *name = json_string(json_member(entry, "path")), *expected = json_string(json_member(entry, "sha256"));
  char found[65];
  sha256 hash;
  *data = read_file(b->path, name, bytes);
  if (!*data) return fail(TVM_SEPCONV_ERROR_BUNDLE, "%s is incomplete: %s cannot be read.", b->path, name);
  sha256_start(&hash);
  sha256_add(&hash, *data, *bytes);
  sha256_end(&hash, found);
  if (!strcmp(found, expected)) return TVM_SEPCONV_OK;
  free(*data);
  *data = NULL;
  return fail(TVM_SEPCONV_ERROR_BUNDLE,
              "%s/%s is truncated or altered: its sha256 is %.16s..., the manifest says %.16s.... Copy the bundle "
              "again or save it anew.", b->path, name, found, expected);
}

static int read_manifest(tvm_sepconv_bundle* b) {
  size_t bytes, at;
  char digest[65];
  b->manifest_text = read_file(b->path, "manifest.json", &bytes);
  if (!b->manifest_text)
    return fail(TVM_SEPCONV_ERROR_BUNDLE, "%s is not a bundle: it has no manifest.json that can be read.", b->path);
  b->manifest = json_read(b->manifest_text, bytes, &at);
  if (!b->manifest)
    return fail(TVM_SEPCONV_ERROR_BUNDLE,
                "%s/manifest.json is damaged at byte %zu. Copy the bundle again or save it anew.", b->path, at);
  const int64_t version = json_size(json_member(b->manifest, "format_version"));
  if (version < 0)
    return fail(TVM_SEPCONV_ERROR_BUNDLE, "%s/manifest.json is no bundle's manifest: it has no `format_version`.",
                b->path);
  if (version > FORMAT_VERSION)
    return fail(TVM_SEPCONV_ERROR_BUNDLE,
                "%s has format version %lld; this runtime reads up to %d. Use the runtime of a newer tvm_sepconv, "
                "or save the layers with this one.", b->path, (long long)version, FORMAT_VERSION);
  json_digest(b->manifest, "digest", digest);
  if (strcmp(digest, json_string(json_member(b->manifest, "digest"))))
    return fail(TVM_SEPCONV_ERROR_BUNDLE,
                "%s/manifest.json was altered: it does not have the digest it names. Copy the bundle again or save "
                "it anew.", b->path);
  b->layers = json_member(b->manifest, "layers");
  return TVM_SEPCONV_OK;
}

/* ---- what this machine can run -------------------------------------------------------------- */

#if defined(__x86_64__)
#define ARCHITECTURE "x86_64"
static const char* const instruction_sets[] = {"x86_64-avx512", "x86_64-avx2", "x86_64-sse42"}; /* best first */
#elif defined(__aarch64__)
#define ARCHITECTURE "aarch64"
static const char* const instruction_sets[] = {"aarch64-fp16", "aarch64-neon"};
#elif defined(__arm__)
#define ARCHITECTURE "armv7"
static const char* const instruction_sets[] = {"armv7-neon"};
#else
#error "no instruction sets are known for this architecture"
#endif
enum { INSTRUCTION_SETS = sizeof instruction_sets / sizeof *instruction_sets };

typedef struct {
  const char* name;
  int bit; /* of AT_HWCAP on ARM */
} feature;

/* Whether the processor has a feature, named as /proc/cpuinfo does. */
static int has_feature(const char* name) {
#if defined(__x86_64__)
  /* The kernel's list, without what it does not let processes use. */
  char line[16384];
  FILE* file = fopen("/proc/cpuinfo", "re");
  const char* found = NULL;
  const size_t length = strlen(name);
  while (file && fgets(line, sizeof line, file))
    if (!strncmp(line, "flags", 5)) {
      for (found = strstr(line, name); found; found = strstr(found + 1, name))
        if (found[-1] == ' ' && (found[length] == ' ' || found[length] == '\n')) break;
      break;
    }
  if (file) fclose(file);
  return found != NULL;
#else
  /* Not from /proc/cpuinfo: to a 32-bit process a 64-bit kernel may show its own names there. */
#if defined(__aarch64__)
  static const feature features[] = {{"fp", 0}, {"asimd", 1}, {"fphp", 9}, {"asimdhp", 10}};
#else
  static const feature features[] = {{"neon", 12}, {"vfpv4", 16}};
#endif
  for (size_t i = 0; i < sizeof features / sizeof *features; ++i)
    if (!strcmp(features[i].name, name)) return getauxval(AT_HWCAP) >> features[i].bit & 1;
  return 0;
#endif
}

/* A library's feature that this machine lacks, "another instruction set", or NULL. `target` is an entry of the
 * manifest's libraries. */
static const char* lacking(const json* target) {
  int known = 0;
  for (int i = 0; i < INSTRUCTION_SETS; ++i) { /* a core, as in aarch64-neon@cortex-a53, tunes only */
    const size_t length = strlen(instruction_sets[i]);
    if (!strncmp(target->key, instruction_sets[i], length) && (!target->key[length] || target->key[length] == '@'))
      known = 1;
  }
  if (!known) return "another architecture, or a newer runtime";
  for (const json* library = target->first; library; library = library->next) {
    const json* features = json_member(library, "cpu_features");
    for (const json* f = features ? features->first : NULL; f; f = f->next)
      if (!has_feature(json_string(f))) return json_string(f);
  }
  return NULL;
}

static int choose(tvm_sepconv_bundle* b, const char* wanted) {
  const json *all = json_member(b->manifest, "libraries"), *best = NULL;
  int best_rank = INSTRUCTION_SETS;
  char reasons[300] = "";
  for (const json* target = all ? all->first : NULL; target; target = target->next) {
    if (wanted && strcmp(target->key, wanted)) continue;
    const char* reason = lacking(target);
    const size_t said = strlen(reasons);
    if (reason) {
      snprintf(reasons + said, sizeof reasons - said, "%s%s needs %s", said ? "; " : "", target->key, reason);
      continue;
    }
    int rank = 0;
    while (strncmp(target->key, instruction_sets[rank], strlen(instruction_sets[rank]))) ++rank;
    if (best && (rank > best_rank || (rank == best_rank && strcmp(target->key, best->key) > 0))) continue;
    best = target;
    best_rank = rank;
  }
  b->libraries = best;
  if (best) return TVM_SEPCONV_OK;
  if (!reasons[0])
    return fail(TVM_SEPCONV_ERROR_MACHINE, "%s has no library for %s.", b->path, wanted ? wanted : "any machine");
  return fail(TVM_SEPCONV_ERROR_MACHINE,
              "This machine (%s) cannot run the libraries in %s: %s. Save the layers with a target for it.",
              ARCHITECTURE, b->path, reasons);
}

/* ---- opening -------------------------------------------------------------------------------- */

static int read_files(tvm_sepconv_bundle* b) {
  const json* runtime = json_member(json_member(b->manifest, "runtimes"), ARCHITECTURE);
  const int64_t abi = json_size(json_member(runtime, "abi"));
  char* data;
  size_t bytes;
  if (abi != TVM_SEPCONV_ABI)
    return fail(TVM_SEPCONV_ERROR_ABI, "%s was built for runtime ABI %lld; the runtime library in this process has "
                "ABI %d. Link the one that is in the bundle.", b->path, (long long)abi, TVM_SEPCONV_ABI);
  for (const json* library = b->libraries->first; library; library = library->next) {
    const int status = read_verified(b, library, &data, &bytes);
    if (status) return status;
    free(data);
  }
  const json* file = json_member(json_member(b->manifest, "files"), "weights.safetensors");
  const int status = read_verified(b, file, &b->weights_file, &bytes);
  if (status || weights_read(&b->weights, b->weights_file, bytes)) return status;
  return fail(TVM_SEPCONV_ERROR_BUNDLE, "%s/weights.safetensors is not in the safetensors format.", b->path);
}

int tvm_sepconv_bundle_open(const char* path, const char* target, tvm_sepconv_bundle** out) {
  *out = NULL;
  const size_t length = path ? strlen(path) + 1 : 0;
  if (!length || length > LONGEST_PATH / 2)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`path` must name a folder, in less than %d bytes. Received: %s",
                LONGEST_PATH / 2, path ? "a longer one" : "NULL");
  tvm_sepconv_bundle* b = calloc(1, sizeof *b);
  if (b) b->path = malloc(length);
  if (!b || !b->path) {
    free(b);
    return fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory.");
  }
  memcpy(b->path, path, length);
  int status = read_manifest(b);
  if (!status) status = choose(b, target);
  if (!status) status = read_files(b);
  if (status) tvm_sepconv_bundle_close(b);
  else *out = b;
  return status;
}

void tvm_sepconv_bundle_close(tvm_sepconv_bundle* b) {
  if (!b) return;
  free(b->weights.header);
  free(b->weights_file);
  free(b->manifest);
  free(b->manifest_text);
  free(b->path);
  free(b);
}

/* ---- layers --------------------------------------------------------------------------------- */

const char* tvm_sepconv_bundle_target(const tvm_sepconv_bundle* b) { return b->libraries->key; }

int tvm_sepconv_bundle_layer_count(const tvm_sepconv_bundle* b) {
  int count = 0;
  for (const json* layer = b->layers ? b->layers->first : NULL; layer; layer = layer->next) ++count;
  return count;
}

const char* tvm_sepconv_bundle_layer_name(const tvm_sepconv_bundle* b, int index) {
  const json* layer = b->layers && index >= 0 ? b->layers->first : NULL;
  while (layer && index-- > 0) layer = layer->next;
  return layer ? layer->key : NULL;
}

/* Weights as the library wants them, packed into `layer`. */
static int give_weights(const tvm_sepconv_bundle* b, const char* name, tvm_sepconv_layer* layer) {
  static const char* const tensors[] = {"depthwise_kernel", "pointwise_kernel", "bias"};
  tvm_sepconv_layer_info info;
  tvm_sepconv_layer_describe(layer, &info);
  const int64_t shapes[3][3] = {{info.kernel_size, info.channels, info.depth_multiplier},
                                {1, info.channels * info.depth_multiplier, info.filters},
                                {info.filters}};
  void* values[3] = {NULL, NULL, NULL};
  int status = TVM_SEPCONV_OK, found;
  for (int i = 0; i < 2 + info.use_bias && !status; ++i) {
    values[i] = weights_tensor(&b->weights, name, tensors[i], i < 2 ? 3 : 1, shapes[i], info.dtype, &found);
    if (!found)
      status = fail(TVM_SEPCONV_ERROR_BUNDLE, "%s: weights.safetensors has no %s/%s of the shape its library takes.",
                    b->path, name, tensors[i]);
    else if (!values[i]) status = fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory for the weights.");
  }
  if (!status) status = layer_pack(layer, values[0], values[1], values[2]);
  for (int i = 0; i < 3; ++i) free(values[i]);
  return status;
}

int tvm_sepconv_bundle_layer(const tvm_sepconv_bundle* b, const char* name, tvm_sepconv_layer** out) {
  char path[LONGEST_PATH];
  *out = NULL;
  if (!name && tvm_sepconv_bundle_layer_count(b) != 1)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`name` must be given: %s has %d layers.", b->path,
                tvm_sepconv_bundle_layer_count(b));
  const json* entry = name ? json_member(b->layers, name) : b->layers->first;
  const json* library = json_member(b->libraries, json_string(json_member(entry, "library")));
  if (!entry || !library)
    return fail(TVM_SEPCONV_ERROR_BUNDLE, "%s has no layer '%s', or no library for it.", b->path, name ? name : "");
  const json *config = json_member(entry, "config"), *activation = json_member(config, "activation");
  const json* fused = json_member(json_member(library, "kernel"), "activation");
  if (strcmp(json_string(activation), json_string(fused)))
    return fail(TVM_SEPCONV_ERROR_BUNDLE,
                "The activation of layer '%s' is computed in Python, after the kernel: %.*s. Save the layer with "
                "activation=\"linear\" and apply it to the output.",
                entry->key, activation ? (int)activation->raw_length : 0, activation ? activation->raw : "");
  const json* amounts = json_member(config, "padding");
  const char* word = json_string(amounts);
  const json* left = amounts && amounts->kind == JSON_ARRAY ? amounts->first : NULL;
  const tvm_sepconv_padding padding = left                     ? TVM_SEPCONV_EXPLICIT
                                      : !strcmp(word, "same")  ? TVM_SEPCONV_SAME
                                      : !strcmp(word, "valid") ? TVM_SEPCONV_VALID : (tvm_sepconv_padding)-1;
  tvm_sepconv_layer* layer;
  snprintf(path, sizeof path, "%s/%s", b->path, json_string(json_member(library, "path")));
  int status = layer_open(path, padding, json_size(left), json_size(left ? left->next : NULL), &layer);
  if (!status) status = give_weights(b, entry->key, layer);
  if (status) tvm_sepconv_layer_destroy(layer);
  else *out = layer;
  return status;
}
