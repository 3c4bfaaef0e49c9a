/* https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header, the tensors. */
#include "weights.h"

#include <stdlib.h>
#include <string.h>

int weights_read(weights* w, const char* file, size_t bytes) {
  uint64_t length = 0;
  size_t at;
  w->header = NULL;
  if (bytes < 8) return 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | (uint8_t)file[i];
  if (length > bytes - 8) return 0;
  w->header = json_read(file + 8, (size_t)length, &at);
  w->data = file + 8 + length;
  w->bytes = bytes - 8 - (size_t)length;
  return w->header != NULL;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float half(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const float subnormal = (float)fraction / 16777216;
  if (exponent == 0) return sign ? -subnormal : subnormal;
  return float_of(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

/* The nearest float with `dropped` bits less, ties to even. */
static float shortened(float value, int dropped) {
  const uint32_t bits = bits_of(value), last = bits >> dropped & 1;
  return float_of((bits + (1u << (dropped - 1)) - 1 + last) & ~((1u << dropped) - 1));
}

static float rounded(float value, tvm_sepconv_dtype dtype) {
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const float size = float_of(bits_of(value) ^ sign);
  if (size != size || dtype > TVM_SEPCONV_BFLOAT16) return value;
  if (dtype == TVM_SEPCONV_BFLOAT16) return shortened(value, 16);
  float near = shortened(size, 13);
  if (size < 6.103515625e-05f) { /* subnormal: a multiple of 2**-24, which is the last bit of a half */
    const volatile float aligned = size + 0.5f;
    near = aligned - 0.5f;
  }
  return float_of(sign | (near > 65504 ? 0x7f800000 : bits_of(near)));
}

enum { F16, BF16, F32, F64, FORMATS };
static const char* const names[FORMATS] = {"F16", "BF16", "F32", "F64"};
static const int64_t sizes[FORMATS] = {2, 2, 4, 8};

static double element(const char* data, int64_t index, int format) {
  uint16_t bits;
  float value;
  double wide;
  memcpy(&bits, data + index * sizes[format], sizeof bits);
  if (format == F16) return half(bits);
  if (format == BF16) return float_of((uint32_t)bits << 16);
  if (format == F32) return memcpy(&value, data + index * 4, sizeof value), value;
  return memcpy(&wide, data + index * 8, sizeof wide), wide;
}

/* The header's entry for `<layer>/<name>`. */
static const json* entry_of(const json* header, const char* layer, const char* name) {
  const size_t length = strlen(layer);
  for (const json* m = header->first; m; m = m->next)
    if (!strncmp(m->key, layer, length) && m->key[length] == '/' && !strcmp(m->key + length + 1, name)) return m;
  return NULL;
}

void* weights_tensor(const weights* w, const char* layer, const char* name, int rank, const int64_t* shape,
                     tvm_sepconv_dtype dtype, int* found) {
  const json* entry = w->header->kind == JSON_OBJECT ? entry_of(w->header, layer, name) : NULL;
  const json *extents = json_member(entry, "shape"), *offsets = json_member(entry, "data_offsets");
  int64_t count = 1;
  int format = 0;
  *found = 0;
  while (format < FORMATS && strcmp(json_string(json_member(entry, "dtype")), names[format])) ++format;
  if (format == FORMATS || !extents || extents->kind != JSON_ARRAY || !offsets || !offsets->first) return NULL;
  const json* extent = extents->first;
  for (int i = 0; i < rank; ++i, extent = extent->next) {
    if (!extent || json_size(extent) != shape[i]) return NULL;
    count *= shape[i];
  }
  const int64_t begin = json_size(offsets->first), end = json_size(offsets->first->next);
  if (extent || begin < 0 || end - begin != count * sizes[format] || (uint64_t)end > w->bytes) return NULL;
  *found = 1;
  const int wide = dtype == TVM_SEPCONV_FLOAT64;
  void* tensor = malloc((size_t)count * (wide ? sizeof(double) : sizeof(float)));
  for (int64_t i = 0; tensor && i < count; ++i) {
    const double value = element(w->data + begin, i, format);
    if (wide) ((double*)tensor)[i] = value;
    else ((float*)tensor)[i] = rounded((float)value, dtype);
  }
  return tensor;
}
