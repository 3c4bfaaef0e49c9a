"""``tvm-sepconv cache``: what it counts, what it removes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import refused

from tvm_sepconv import SeparableConv1D, bundle, cli, jit, targets
from tvm_sepconv.commands import cache as command


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("TVM_SEPCONV_CACHE", str(root))
    jit.cache_root.cache_clear()
    yield root
    jit.cache_root.cache_clear()


def entry(cache: Path, number: int, target: str = "x86_64-avx2", idle_secs: float = 7200) -> Path:
    """What stands for a library of 1000 bytes, used last so long ago."""
    path = cache / f"{number:032x}"
    path.mkdir(mode=0o700, parents=True)
    cache.chmod(0o700)
    (path / jit.LIBRARY).write_bytes(bytes(900))
    (path / bundle.RUNTIME).write_bytes(bytes(100 - len(json.dumps({"target": target}))))
    (path / jit.ENTRY).write_text(json.dumps({"target": target}))
    age(path, idle_secs)
    return path


def age(path: Path, secs: float) -> None:
    os.utime(path, (time.time() - secs,) * 2)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["cache", *arguments]) == 0
    return capsys.readouterr().out


def test_what_is_there_is_shown_by_target(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show") == f"{cache}: 0 libraries, 0.0 MB\n"
    first = entry(cache, 0)
    for number in range(1, 300):
        last = entry(cache, number, "x86_64-avx512")
    (entry(cache, 400) / jit.ENTRY).unlink()
    (entry(cache, 401) / jit.ENTRY).write_text("[" * 9999)
    (cache / "peers").mkdir()
    days = [time.strftime("%Y-%m-%d", time.localtime(e.stat().st_mtime)) for e in (first, last)]
    lines = run(capsys, "show").splitlines()
    assert lines[0] == f"{cache}: 302 libraries, 0.3 MB"
    assert lines[1].startswith("  damaged, or of an earlier version: 2 libraries")
    assert lines[2].startswith(f"  x86_64-avx2: 1 library, 0.0 MB, last used {days[0]} ")
    assert lines[3].startswith(f"  x86_64-avx512: 299 libraries, 0.3 MB, last used {days[1]} ")
    assert lines[4] == "also there, and left by `clear`: peers"


def test_clearing_leaves_what_is_no_library_or_about_to_be_opened(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, used = entry(cache, 1), entry(cache, 2, idle_secs=-3600)  # used later than now, to be sure
    left = [cache / "peers", cache / "work", cache / "new-fresh"]
    for path in (*left, cache / "new-abandoned", cache / "old-abandoned"):
        (path / "inside").mkdir(parents=True)
    for name in ("new-abandoned", "old-abandoned", "peers"):
        age(cache / name, 4000)
    (cache / f"{3:032x}").symlink_to(left[0])
    out = run(capsys, "clear")
    assert out == (
        f"{cache}: removed 1 library, 0.0 MB\nkept 1 library, 0.0 MB, used in the last minute\n"
    )
    assert not old.exists()
    assert set(cache.iterdir()) == {used, cache / f"{3:032x}", *left}
    assert (left[0] / "inside").is_dir()


def test_clearing_what_was_not_used_for_days(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, newer = (entry(cache, days, idle_secs=days * 86400) for days in (31, 29))
    out = run(capsys, "clear", "--older-than", "30")
    assert "kept 1 library, 0.0 MB, used in the last 30 days" in out
    assert (old.exists(), newer.exists()) == (False, True)
    run(capsys, "clear", "--older-than", "0")
    assert not newer.exists()


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_a_number_of_days_is_needed(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`--older-than` must be a number of days" in refused(
        capsys, "cache", "clear", "--older-than", days
    )


@pytest.mark.parametrize("action", ["show", "clear"])
def test_a_cache_others_can_write_is_refused(
    action: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = entry(cache, 1)
    cache.chmod(0o777)
    assert "can be written by, another user" in refused(capsys, "cache", action)
    if os.geteuid() == 0:  # only root can give a folder away
        cache.chmod(0o700)
        os.chown(cache, 65534, 65534)
        assert "belongs to" in refused(capsys, "cache", action)
    assert kept.exists()


def test_the_cache_is_this_users_alone(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "show")
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not targets.runnable(), reason="no target is for this machine")
def test_a_layer_outlives_the_clearing_of_its_library(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm")
    layer, x = SeparableConv1D(3, 2), np.ones((1, 9, 4), np.float32)
    y = layer(x)
    (used,) = cache.iterdir()
    age(used, 61)
    run(capsys, "clear")
    assert not used.exists()
    assert (layer(x) == y).all()  # what is loaded stays
    layer.set_weights(layer.get_weights())  # loads it again
    assert (layer(x) == y).all()


CLEAR = """
import sys
from tvm_sepconv import cli
print("ready", flush=True)
while not sys.stdin.read(1): pass
sys.exit(cli.main(["cache", "clear"]))
"""


def test_several_clear_at_once(cache: Path) -> None:
    for number in range(200):
        entry(cache, number)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLEAR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert not list(cache.iterdir())


def test_an_entry_that_vanishes_while_it_is_counted_is_left_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = entry(cache, 1), entry(cache, 2)
    target_of = command._target

    def vanish(path: Path) -> str:
        if path == gone:
            command._remove(gone)
        return target_of(path)

    monkeypatch.setattr(command, "_target", vanish)
    assert [found.path for found in command.entries(cache)] == [stays]
