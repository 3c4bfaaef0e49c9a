/* SHA-256 (FIPS 180-4), to find damage in a bundle's files. */
#ifndef TVM_SEPCONV_SHA256_H_
#define TVM_SEPCONV_SHA256_H_

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

typedef struct {
  uint32_t state[8];
  uint64_t bytes;
  uint8_t block[64];
} sha256;

void sha256_start(sha256* hash);
void sha256_add(sha256* hash, const void* data, size_t bytes);
void sha256_end(sha256* hash, char hex[65]);

#pragma GCC visibility pop

#endif /* TVM_SEPCONV_SHA256_H_ */
