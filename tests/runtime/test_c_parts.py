"""The parts that read a bundle in C, each against Python's own: JSON, SHA-256, 16-bit numbers."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import native
import numpy as np
import pytest

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


def compiled(folder: Path, source: str) -> ctypes.CDLL:
    (folder / "part.c").write_text(source)
    strict = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{native.NATIVE}"]
    command = ["cc", *strict, "-shared", "-fPIC", "part.c", "-o", "part.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "part.so"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ctypes.CDLL:
    c = compiled(tmp_path_factory.mktemp("json"), """
        #include "json.c"
        #include "sha256.c"
        #include <stdlib.h>
        int digest(const char* text, size_t length, char* hex);
        int digest(const char* text, size_t length, char* hex) {
          size_t at;
          json* value = json_read(text, length, &at);
          if (value) json_digest(value, "digest", hex);
          free(value);
          return value != NULL;
        }""")  # fmt: skip
    c.digest.argtypes = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p
    return c


def digest(reader: ctypes.CDLL, text: bytes) -> str | None:
    hex_ = ctypes.create_string_buffer(65)
    return hex_.value.decode() if reader.digest(text, len(text), hex_) else None


@needs_cc
def test_json_that_is_read(reader):
    values: list[object] = [
        {}, [], 0, -1, 1.5e-7, 10**17, True, False, None, "", "é ü 声 😀 \x7f",
        {"z": [1, [2, {"ß": None, "a": "\n\t\"\\/\b\f\r"}]], "é": 1, "~": 2, "\ud7ff": 3, "😀": 4},
        {"a" * n: list(range(n)) for n in range(70)},
        {"b": 1, "digest": 5, "inner": {"digest": 6}},
    ]  # fmt: skip
    for value in values:
        kept = {k: v for k, v in value.items() if k != "digest"} if type(value) is dict else value
        expected = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        for text in (
            json.dumps(value),
            json.dumps(value, indent=1),
            json.dumps(value, indent="\t"),
        ):
            assert digest(reader, b" \n" + text.encode() + b"\r\n") == expected, text
    deep = b"[" * 64 + b"]" * 64
    assert digest(reader, deep) == hashlib.sha256(deep).hexdigest()


@needs_cc
@pytest.mark.parametrize(
    "text",
    [b"", b" ", b"{", b"[1,]", b"[1 2]", b'{"a":1,}', b'{"a" 1}', b'{a:1}', b"{'a':1}",
     b"01", b"+1",
     b"1.", b".5", b"1e", b"-", b"nul", b"NaN", b"Infinity", b"True", b'"a', b'"\\x"', b'"\\u12g4"',
     b'"\\u00"', b'"\n"', b'"\\ud800"', b'"\\ud800\\u0041"', b'"\\udc00"', b'"\\u0000"', b"[]]",
     b"1 2", b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b"// 1", b"[" * 65 + b"]" * 65,
     b"\xef\xbb\xbf1",
     b"[" * 100_000, b'"\\'],
    ids=repr,
)  # fmt: skip
def test_json_that_is_refused(reader, text):
    assert digest(reader, text) is None


@needs_cc
def test_hashes_of_every_length_of_a_block(tmp_path):
    c = compiled(tmp_path, """
        #include "sha256.c"
        void hashed(const char* data, size_t length, size_t part, char* hex);
        void hashed(const char* data, size_t length, size_t part, char* hex) {
          sha256 hash;
          sha256_start(&hash);
          for (; length > part; data += part, length -= part) sha256_add(&hash, data, part);
          sha256_add(&hash, data, length);
          sha256_end(&hash, hex);
        }""")  # fmt: skip
    data = np.random.default_rng(0).bytes(1000)
    for length in [*range(130), 1000]:
        for part in (1, 63, 64, 2000):
            hex_ = ctypes.create_string_buffer(65)
            c.hashed(data, ctypes.c_size_t(length), ctypes.c_size_t(part), hex_)
            assert hex_.value.decode() == hashlib.sha256(data[:length]).hexdigest()


@needs_cc
def test_sixteen_bit_numbers_are_numpys(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    c = compiled(tmp_path, """
        #include "weights.c"
        #include "json.c"
        #include "sha256.c"
        void halves(const uint16_t* from, float* to, int count);
        void halves(const uint16_t* from, float* to, int count) {
          for (int i = 0; i < count; ++i) to[i] = half(from[i]);
        }
        void round_all(float* values, int count, int dtype);
        void round_all(float* values, int count, int dtype) {
          for (int i = 0; i < count; ++i) values[i] = rounded(values[i], (tvm_sepconv_dtype)dtype);
        }""")  # fmt: skip
    halves = np.arange(2**16, dtype=np.uint16)
    floats = np.empty(2**16, np.float32)
    c.halves(halves.ctypes.data_as(ctypes.c_void_p), floats.ctypes.data_as(ctypes.c_void_p), 2**16)
    exact = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(floats, exact)
    np.testing.assert_array_equal(np.signbit(floats), np.signbit(exact))
    # Everything between two neighbours: ties, just below, just above; and any bits at all.
    steps = np.append(exact[:0x7C00], np.float32(65536))
    ties = np.concatenate([(steps[1:] + steps[:-1]) / 2, (steps[1:] + steps[:-1]) / -2])
    any_ = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    around = [np.nextafter(ties, np.float32(way)) for way in (np.inf, -np.inf)]
    values = np.concatenate([exact, ties, *around, any_])
    for number, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16), (2, np.float32)):
        found = values.copy()
        c.round_all(found.ctypes.data_as(ctypes.c_void_p), found.size, number)
        with np.errstate(all="ignore"):
            expected = values.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found, expected)


@needs_cc
@pytest.mark.parametrize("compiler", [("cc", "-std=c99", "-xc"), ("g++", "-std=c++98", "-xc++")])
def test_the_header_is_plain_c_and_cpp(compiler, tmp_path):
    if not shutil.which(compiler[0]):
        pytest.skip(f"needs {compiler[0]}")
    (tmp_path / "a.c").write_text(
        '#include "tvm_sepconv.h"\nint f(void) { return TVM_SEPCONV_OK; }'
    )
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wno-long-long"]
    command = [*compiler, *strict, f"-I{native.NATIVE}", "-c", "a.c", "-o", "a.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
