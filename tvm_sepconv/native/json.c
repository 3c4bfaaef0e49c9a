/* One pass, recursive, into one block: values first, then the decoded strings, which are never longer than their
 * text. */
#include "json.h"

#include <stdlib.h>
#include <string.h>

#include "sha256.h"

enum { MOST_LEVELS = 64 };

typedef struct {
  const char *at, *end;
  json* values; /* the next to be filled */
  char* strings;
} reader;

static int read_value(reader* r, json* value, int level);

static void skip_blanks(reader* r) {
  while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r')) ++r->at;
}

static int take(reader* r, char expected) {
  if (r->at == r->end || *r->at != expected) return 0;
  ++r->at;
  return 1;
}

static int read_unit(reader* r, unsigned* unit) { /* the four digits behind \u */
  *unit = 0;
  if (r->end - r->at < 4) return 0;
  for (int i = 0; i < 4; ++i, ++r->at) {
    const char c = *r->at;
    if (c >= '0' && c <= '9') *unit = *unit * 16 + (unsigned)(c - '0');
    else if (c >= 'a' && c <= 'f') *unit = *unit * 16 + (unsigned)(c - 'a' + 10);
    else if (c >= 'A' && c <= 'F') *unit = *unit * 16 + (unsigned)(c - 'A' + 10);
    else return 0;
  }
  return 1;
}

static int read_code_point(reader* r) {
  unsigned code, low;
  if (!read_unit(r, &code) || code == 0 || (code >= 0xdc00 && code < 0xe000)) return 0;
  if (code >= 0xd800 && code < 0xdc00) { /* beyond the basic plane: two units */
    if (!take(r, '\\') || !take(r, 'u') || !read_unit(r, &low) || low < 0xdc00 || low >= 0xe000) return 0;
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  static const unsigned lead[] = {0, 0xc0, 0xe0, 0xf0};
  *r->strings++ = (char)(lead[more] | code >> 6 * more);
  for (int i = more - 1; i >= 0; --i) *r->strings++ = (char)(0x80 | (code >> 6 * i & 0x3f));
  return 1;
}

static int read_string(reader* r, const char** string) {
  static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
  if (!take(r, '"')) return 0;
  *string = r->strings;
  while (r->at < r->end && *r->at != '"') {
    if ((unsigned char)*r->at < 0x20) return 0;
    if (*r->at != '\\') {
      *r->strings++ = *r->at++;
      continue;
    }
    if (++r->at == r->end) return 0;
    const char* found = *r->at ? strchr(escapes, *r->at) : NULL;
    if (found) *r->strings++ = meant[found - escapes];
    else if (*r->at != 'u') return 0;
    ++r->at;
    if (!found && !read_code_point(r)) return 0;
  }
  *r->strings++ = 0; /* in the place of a quotation mark */
  return take(r, '"');
}

static int digits(reader* r) {
  const char* from = r->at;
  while (r->at < r->end && *r->at >= '0' && *r->at <= '9') ++r->at;
  return r->at > from;
}

static int read_number(reader* r) {
  take(r, '-');
  if (!take(r, '0') && !digits(r)) return 0;
  if (take(r, '.') && !digits(r)) return 0;
  if (take(r, 'e') || take(r, 'E')) {
    if (!take(r, '+')) take(r, '-');
    return digits(r);
  }
  return 1;
}

static int read_word(reader* r) {
  static const char* const words[] = {"true", "false", "null"};
  for (int i = 0; i < 3; ++i) {
    const size_t length = strlen(words[i]);
    if ((size_t)(r->end - r->at) < length || strncmp(r->at, words[i], length)) continue;
    r->at += length;
    return 1;
  }
  return 0;
}

static int read_members(reader* r, json* parent, int level) {
  const char end = parent->kind == JSON_OBJECT ? '}' : ']';
  const json** link = &parent->first;
  ++r->at;
  skip_blanks(r);
  if (take(r, end)) return 1;
  do {
    json* value = r->values++;
    skip_blanks(r);
    if (parent->kind == JSON_OBJECT) {
      value->raw_key = r->at;
      if (!read_string(r, &value->key) || json_member(parent, value->key)) return 0;
      value->raw_key_length = (size_t)(r->at - value->raw_key);
      skip_blanks(r);
      if (!take(r, ':')) return 0;
    }
    if (!read_value(r, value, level)) return 0;
    *link = value;
    link = &value->next;
    skip_blanks(r);
  } while (take(r, ','));
  return take(r, end);
}

static int read_value(reader* r, json* value, int level) {
  skip_blanks(r);
  if (r->at == r->end || level == MOST_LEVELS) return 0;
  value->raw = r->at;
  int read;
  switch (*r->at) {
    case '{':
    case '[':
      value->kind = *r->at == '{' ? JSON_OBJECT : JSON_ARRAY;
      read = read_members(r, value, level + 1);
      break;
    case '"':
      value->kind = JSON_STRING;
      read = read_string(r, &value->string);
      break;
    case 't':
    case 'f':
    case 'n':
      value->kind = JSON_WORD;
      read = read_word(r);
      break;
    default:
      value->kind = JSON_NUMBER;
      read = read_number(r);
  }
  value->raw_length = (size_t)(r->at - value->raw);
  return read;
}

json* json_read(const char* text, size_t length, size_t* at) {
  size_t values = 1; /* behind each of these characters begins at most one more */
  for (size_t i = 0; i < length; ++i) values += text[i] == ',' || text[i] == '[' || text[i] == '{';
  json* root = calloc(1, values * sizeof *root + length + 1);
  *at = length;
  if (!root) return NULL;
  reader r = {text, text + length, root + 1, (char*)(root + values)};
  const int read = read_value(&r, root, 0);
  if (read) skip_blanks(&r);
  if (read && r.at == r.end) return root;
  *at = (size_t)(r.at - text);
  free(root);
  return NULL;
}

const json* json_member(const json* object, const char* key) {
  if (!object || object->kind != JSON_OBJECT) return NULL;
  const json* member = object->first;
  while (member && strcmp(member->key, key)) member = member->next;
  return member;
}

const char* json_string(const json* value) { return value && value->kind == JSON_STRING ? value->string : ""; }

int64_t json_size(const json* value) {
  int64_t size = 0;
  if (!value || value->kind != JSON_NUMBER || value->raw_length > 18) return -1;
  for (size_t i = 0; i < value->raw_length; ++i) {
    if (value->raw[i] < '0' || value->raw[i] > '9') return -1;
    size = size * 10 + (value->raw[i] - '0');
  }
  return size;
}

/* The member whose key follows `after` in the order of code points, which is that of UTF-8's bytes. */
static const json* following(const json* object, const char* after) {
  const json* next = NULL;
  for (const json* m = object->first; m; m = m->next)
    if ((!after || strcmp(m->key, after) > 0) && (!next || strcmp(m->key, next->key) < 0)) next = m;
  return next;
}

static void add_value(sha256* hash, const json* value, const char* left_out) {
  const char* separator = "";
  if (value->kind == JSON_OBJECT) {
    sha256_add(hash, "{", 1);
    for (const json* m = following(value, NULL); m; m = following(value, m->key)) {
      if (left_out && !strcmp(m->key, left_out)) continue;
      sha256_add(hash, separator, strlen(separator));
      sha256_add(hash, m->raw_key, m->raw_key_length);
      sha256_add(hash, ": ", 2);
      add_value(hash, m, NULL);
      separator = ", ";
    }
    sha256_add(hash, "}", 1);
  } else if (value->kind == JSON_ARRAY) {
    sha256_add(hash, "[", 1);
    for (const json* m = value->first; m; m = m->next) {
      sha256_add(hash, separator, strlen(separator));
      add_value(hash, m, NULL);
      separator = ", ";
    }
    sha256_add(hash, "]", 1);
  } else {
    sha256_add(hash, value->raw, value->raw_length);
  }
}

void json_digest(const json* object, const char* left_out, char hex[65]) {
  sha256 hash;
  sha256_start(&hash);
  add_value(&hash, object, left_out);
  sha256_end(&hash, hex);
}
