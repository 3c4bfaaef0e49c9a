/* A strict reader of JSON: what a manifest or a safetensors header holds, and nothing looser. */
#ifndef TVM_SEPCONV_JSON_H_
#define TVM_SEPCONV_JSON_H_

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

typedef enum { JSON_WORD, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_kind;

/* A value; `raw` and `raw_key` lie in the text that was read, which has to outlive it. */
typedef struct json {
  json_kind kind; /* JSON_WORD: true, false or null, as `raw` says */
  const char *key, *string; /* of an object's member, of a string: decoded, in UTF-8 */
  const char *raw_key, *raw;
  size_t raw_key_length, raw_length;
  const struct json *first, *next; /* of an array or object; its siblings, in the text's order */
} json;

/* The value that the text is, in one block for free(), or NULL: `*at` is then where it stops being JSON, or the
 * length if memory ran out. Refused beyond the grammar: equal keys, more than 64 levels, U+0000 and lone surrogates. */
json* json_read(const char* text, size_t length, size_t* at);

/* NULL for a NULL, for what is no object, and for one without that member. */
const json* json_member(const json* object, const char* key);

/* The string, or "" for a NULL and for anything else. */
const char* json_string(const json* value);

/* The integer, or -1 for anything else: nothing that is read here is negative. */
int64_t json_size(const json* value);

/* The hex SHA-256 of an object without the member `left_out`, in the form that Python's json.dumps(sort_keys=True)
 * gives it. Numbers and strings are taken as they are written: right for a text that json.dumps wrote. */
void json_digest(const json* object, const char* left_out, char hex[65]);

#pragma GCC visibility pop

#endif /* TVM_SEPCONV_JSON_H_ */
