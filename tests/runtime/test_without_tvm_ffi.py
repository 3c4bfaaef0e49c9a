"""The C API in the place of tvm-ffi, which has no wheel for 32-bit ARM and musl."""

from __future__ import annotations

import native
import pytest
from test_runtime import CASES, python

import tvm_sepconv
from tvm_sepconv import jit, runtime, targets
from tvm_sepconv.config import SepConvConfig


def test_without_tvm_ffi_the_answers_are_the_same(tmp_path):
    code = """
        import hashlib, sys
        blocked = {blocked}
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in blocked:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocked())
        import numpy as np, tvm_sepconv
        from layers import FakeTensor
        digest = hashlib.sha256()
        for layer in tvm_sepconv.load({path!r}).values():
            for steps in (5, 300):
                x = np.random.default_rng(0).standard_normal((3, steps, layer.weights[0].shape[1]))
                x = x.astype(layer.dtype)
                y, out = layer(x), np.empty_like(layer(x))
                digest.update(y.tobytes())
                assert layer(x, out=out) is out and out.tobytes() == y.tobytes()
                tensor = layer(FakeTensor(x))
                assert type(tensor) is FakeTensor and tensor.array.tobytes() == y.tobytes()
                try:
                    layer(x, out=x)
                except ValueError:
                    pass
                else:
                    raise SystemExit("no error")
        assert ("tvm_ffi" in sys.modules) != ("tvm_ffi" in blocked)
        print(digest.hexdigest())
    """
    layers = {n: native.layer_of(CASES[n][1], **CASES[n][0]) for n in ("seed", "float64")}
    tvm_sepconv.save(layers, tmp_path / "two", targets.host_family()[-1:])
    path = str(tmp_path / "two")
    answers = [
        python(code.format(blocked=blocked, path=path)) for blocked in ({"tvm"}, {"tvm", "tvm_ffi"})
    ]
    assert answers[0] == answers[1] != ""


def test_what_else_fails_in_tvm_ffi_is_not_hidden(monkeypatch):
    def fail(path):
        raise OSError("libtvm_ffi.so: no")

    import tvm_ffi

    _, path = jit.library(SepConvConfig.parse(3, 2).kernel_config(12))
    monkeypatch.setattr(tvm_ffi, "load_module", fail)
    with pytest.raises(OSError, match=r"libtvm_ffi\.so: no"):
        runtime._Runtime(path)
