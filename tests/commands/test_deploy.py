"""``tvm-sepconv deploy``: to a device that is a folder here, behind stand-ins for ssh and rsync."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import native
import numpy as np
import pytest
from command_line import refused

import tvm_sepconv
from tvm_sepconv import bundle, cli, targets
from tvm_sepconv.commands import deploy

pytest.importorskip("tvm")

BEST = targets.host_family()[-1]
OTHER = "aarch64-neon" if targets.machine() == "x86_64" else "x86_64-avx2"
SAVED = [*targets.host_family()[-2:], OTHER]

# ssh [-o option]… host command: in the device's home, with what the device has before ours on PATH.
SSH = """#!/bin/sh
echo "ssh $*" >> "$DEVICE/log"
while [ "$1" = -o ]; do shift 2; done
if [ -e "$DEVICE/unreachable" ]; then
  echo "ssh: connect to host dev port 22: No route to host" >&2; exit 255
fi
shift
case "$1" in *"uname -m"*) cat "$DEVICE/answer"; exit 0;; esac
cd "$DEVICE/home" && PATH="$DEVICE/bin:$PATH" exec sh -c "$1"
"""
# rsync … source/ host:folder/
RSYNC = """#!/bin/sh
echo "rsync $*" >> "$DEVICE/log"
for last; do before=$now; now=$last; done
if [ -e "$DEVICE/full" ]; then
  cp "$before/manifest.json" "$DEVICE/home/${now#*:}"
  echo "rsync: write failed on \\"x\\": No space left on device (28)" >&2; exit 11
fi
cp -r "$before." "$DEVICE/home/${now#*:}"
"""
REFUSES = '#!/bin/sh\necho "{name}: cannot create directory: Permission denied" >&2\nexit 1\n'


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.sepconv"
    tvm_sepconv.save({"one": native.layer_of(12, filters=3, kernel_size=2)}, path, SAVED, True)
    return path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def device(tmp_path, monkeypatch) -> Path:
    """A device without rsync that is a machine such as this."""
    root = tmp_path / "device"
    (root / "home").mkdir(parents=True)
    (root / "bin").mkdir()
    put(tmp_path / "tools/ssh", SSH)
    monkeypatch.setenv("DEVICE", str(root))
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    (root / "answer").write_text(answer(targets.machine(), targets.cpu_features()))
    hide_rsync(monkeypatch)
    return root


def hide_rsync(monkeypatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda n, **k: None if n == "rsync" else which(n, **k))


@pytest.fixture
def rsync(device, tmp_path, monkeypatch) -> None:
    """On both sides."""
    put(tmp_path / "tools/rsync", RSYNC)
    monkeypatch.setattr(shutil, "which", lambda name, **k: f"/usr/bin/{name}")


def answer(machine: str, flags, bits: int = 64) -> str:
    key = "flags" if machine == "x86_64" else "Features"
    return f"machine: {machine}\nbits: {bits}\n{key}\t: {' '.join(flags)}\n"


def commands(device: Path) -> list[str]:
    return (device / "log").read_text().splitlines()


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def is_deployed(saved: Path, device: Path, target: str = BEST) -> None:
    """The bundle works there, and nothing but what `target` needs was copied."""
    there = device / "home/models/net.sepconv"
    arch = target.split("-")[0]
    ((key, _),) = bundle.read_manifest(saved)["libraries"][target].items()
    assert set(contents(there)) == {
        "manifest.json", "weights.safetensors", "selftest.safetensors",
        f"lib/{arch}/{bundle.RUNTIME}", f"lib/{target}/{key}.so",
    }  # fmt: skip
    assert os.listdir(there.parent) == ["net.sepconv"]  # nothing is left beside it
    assert there.stat().st_mode & 0o777 == 0o755
    for name, content in contents(there).items():
        assert name == "manifest.json" or content == (saved / name).read_bytes()
    if arch == targets.machine():
        loaded, original = tvm_sepconv.load(there), tvm_sepconv.load(saved, target)
        x = native.inputs(loaded.config, 2, 9, 12)
        np.testing.assert_array_equal(loaded(x), original(x))


# ---- what arrives -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["rsync", "tar"])
def test_a_device_gets_what_it_would_load(way, saved, device, request, capsys):
    if way == "rsync":
        request.getfixturevalue("rsync")
    assert cli.main(["deploy", str(saved), "pi@dev:models/net.sepconv"]) == 0
    is_deployed(saved, device)
    assert re.fullmatch(
        rf"{saved} -> pi@dev:models/net.sepconv: {BEST}; 5 files, \d+ kB\n", capsys.readouterr().out
    )
    assert any(line.startswith("rsync ") for line in commands(device)) == (way == "rsync")


def test_the_target_may_be_named(saved, device):
    (device / "answer").unlink()  # which would be asked for otherwise
    place = "pi@dev:~/models/net.sepconv"
    assert cli.main(["deploy", str(saved), place, "--target", OTHER]) == 0
    is_deployed(saved, device, OTHER)
    assert cli.main(["deploy", str(saved), place, "--target", OTHER, "--target", BEST]) == 0
    there = bundle.read_manifest(device / "home/models/net.sepconv")
    assert set(there["libraries"]) == {OTHER, BEST} and len(there["runtimes"]) == 2


def test_a_bundle_there_is_replaced_as_a_whole(saved, device):
    shutil.copytree(saved, device / "home/models/net.sepconv")
    (device / "home/models/net.sepconv/left.over").write_text("")
    assert cli.main(["deploy", str(saved), "dev:models/net.sepconv"]) == 0
    is_deployed(saved, device)


def test_names_that_a_shell_would_take_apart(saved, device, tmp_path):
    strange = "it's a $HOME; `net` & more"
    copy = Path(shutil.copytree(saved, tmp_path / strange))
    for _ in range(2):
        assert cli.main(["deploy", str(copy), f"dev:my models/{strange}"]) == 0
    assert os.listdir(device / "home") == ["my models"]
    assert os.listdir(device / "home/my models") == [strange]
    tvm_sepconv.load(device / "home/my models" / strange)


def test_dry_run_shows_and_changes_nothing(saved, device, capsys):
    arguments = ["deploy", str(saved), "pi@dev:models/net.sepconv", "--verify"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert commands(device) == [
        shlex.join(["ssh", *deploy.SSH[1:], "pi@dev"]) + " " + deploy.QUESTION
    ]
    assert os.listdir(device / "home") == []
    files = [line.split() for line in lines[1:6]]
    assert sum(int(size) for size, _ in files) > 10_000
    assert f"lib/{targets.machine()}/{bundle.RUNTIME}" in {name for _, name in files}
    assert "Nothing is copied" in lines[6]
    shown = [re.sub(r"tvm_sepconv-\w+|(new|old)-\w+", r"\1", line.strip()) for line in lines[7:]]
    put(device / "bin/tvm-sepconv", "#!/bin/sh\n")
    assert cli.main(arguments) == 0
    # The same commands are run then: as the shell splits them, for ssh does not show its quotes.
    run = [re.sub(r"tvm_sepconv-\w+|(new|old)-\w+", r"\1", line) for line in commands(device)[2:]]
    assert [" ".join(shlex.split(line.rpartition("| ")[2])) for line in shown] == run


def test_dry_run_shows_rsync_where_it_is(saved, rsync, device, capsys):
    arguments = ["deploy", str(saved), "pi@dev:models/net.sepconv", "--target", BEST, "--dry-run"]
    assert cli.main(arguments) == 0
    assert not (device / "log").exists()  # a named target: nobody is asked
    assert re.search(
        r"\n  rsync --recursive .* /\S+/ pi@dev:models/\.net\.sepconv\.new-\w{8}/\n",
        capsys.readouterr().out,
    )


# ---- the device's answer -------------------------------------------------------------------------


def test_this_machine_answers_the_question():
    done = subprocess.run(["sh", "-c", deploy.QUESTION], capture_output=True, text=True)
    arch, flags = deploy.machine_of("Welcome to Debian!\n" + done.stdout)
    assert arch == targets.machine()
    assert flags >= targets.cpu_features() > set()


FEATURES = {name: set(needed) for name, needed in targets.FEATURES.items()}
X86 = FEATURES["x86_64-sse42"] | FEATURES["x86_64-avx2"]
DEVICES = {  # what it answers, and what it is
    "avx2": (answer("x86_64", X86), ("x86_64", X86)),
    "arm64": (answer("aarch64", {"fp", "asimd"}), ("aarch64", {"fp", "asimd"})),
    "arm": (answer("armv7l", {"neon", "vfpv4"}, 32), ("armv7", {"neon", "vfpv4"})),
    "32-bit programs on arm64": (
        answer("aarch64", {"fp", "asimd"}, 32), ("armv7", {"fp", "asimd", "neon", "vfpv4"}),
    ),
    "says nothing": ("", ("", set())),
}  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), DEVICES.values(), ids=DEVICES)
def test_answers(said, expected):
    assert deploy.machine_of(said) == expected


def test_a_device_that_cannot_run_it(saved, device, capsys):
    for said, message in [
        (answer("riscv64", {"v"}), r"dev \(riscv64\) runs no instruction set known here"),
        (answer("armv7l", {"neon", "vfpv4"}, 32), r"dev \(armv7\) runs armv7-neon"),
        ("", r"dev \(of unknown architecture\) runs no instruction set known here"),
    ]:
        (device / "answer").write_text(said)
        text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
        assert re.search(f"{message}; {saved} has libraries for .*{BEST}", text)
    assert os.listdir(device / "home") == []


# ---- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["net.sepconv", "dev:", "dev:~", "dev:.", "dev:a/..", "dev:/", ":net", "-oProxy=x:net"]
)
def test_a_place_that_is_none(place, saved, device, capsys):
    with pytest.raises(ValueError, match=f"must be user@host:folder.*Received: {place}"):
        deploy.Place.parse(place)


@pytest.mark.parametrize(
    ("text", "host", "ssh", "folder"),
    [
        ("pi@dev:a/b", "pi@dev", "pi@dev", "a/b"),
        ("dev:/opt/net", "dev", "dev", "/opt/net"),
        ("pi@[fe80::1]:net", "pi@[fe80::1]", "pi@fe80::1", "net"),
        ("dev:C:\\net", "dev", "dev", "C:\\net"),
    ],
)
def test_places(text, host, ssh, folder):
    place = deploy.Place.parse(text)
    assert (place.host, place.ssh_host, str(place.folder)) == (host, ssh, folder)


def test_an_unreachable_host(saved, device, capsys):
    (device / "unreachable").write_text("")
    text = refused(capsys, "deploy", str(saved), "pi@dev:models/net.sepconv")
    assert "pi@dev cannot be reached or logged into. Try: ssh pi@dev (ssh: connect to host" in text


def test_no_ssh(saved, device, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
    assert "needs the ssh client, which is not installed: apt install openssh-client" in text


@pytest.fixture
def old(saved, device) -> dict[str, bytes]:
    """A bundle that is on the device already."""
    shutil.copytree(saved, device / "home/models/net.sepconv")
    return contents(device / "home/models")


def test_a_full_disk(saved, rsync, device, old, capsys):
    (device / "full").write_text("")
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
    assert "dev has no space left; what is there stays as it was. Make room" in text
    assert contents(device / "home/models") == old


@pytest.mark.parametrize("said", ["No space left on device", "Wrote only 4608 of 10240 bytes"])
def test_a_full_disk_without_rsync(said, saved, device, old, capsys):
    put(device / "bin/tar", f'#!/bin/sh\necho "tar: x: {said}" >&2\nexit 2\n')
    assert "dev has no space left" in refused(
        capsys, "deploy", str(saved), "dev:models/net.sepconv"
    )
    assert contents(device / "home/models") == old


def test_a_folder_that_may_not_be_written(saved, device, old, capsys):
    put(device / "bin/mkdir", REFUSES.format(name="mkdir"))
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
    assert "dev does not let this user write there. Name another folder or user (mkdir:" in text
    assert contents(device / "home/models") == old


def test_a_rename_that_fails_puts_the_old_bundle_back(saved, device, old, capsys):
    real = shutil.which("mv")
    put(device / "bin/mv", f'#!/bin/sh\ncase "$1" in *.new-*) exit 1;; esac\nexec {real} "$@"\n')
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
    assert "dev failed (exit status 1)" in text
    assert contents(device / "home/models") == old


def test_what_is_no_bundle_is_never_replaced(saved, device, capsys):
    (device / "home/models/net.sepconv").mkdir(parents=True)
    (device / "home/models/net.sepconv/thesis.tex").write_text("years of work")
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv")
    assert "it is there and is no bundle" in text
    assert contents(device / "home") == {"models/net.sepconv/thesis.tex": b"years of work"}


def test_ctrl_c_leaves_nothing_behind(saved, device, old, monkeypatch):
    run = subprocess.run

    def interrupt(command, **arguments):
        if command[0] == "sh":
            raise KeyboardInterrupt
        return run(command, **arguments)

    monkeypatch.setattr(subprocess, "run", interrupt)
    assert cli.main(["deploy", str(saved), "dev:models/net.sepconv"]) == 130
    assert contents(device / "home/models") == old
    assert os.listdir(device / "home/models") == ["net.sepconv"]


def test_a_damaged_or_unsuited_bundle_stays_here(saved, device, tmp_path, capsys):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copy / "weights.safetensors").write_bytes(b"")
    assert "is truncated or altered" in refused(capsys, "deploy", str(copy), "dev:net")
    assert "is not a bundle" in refused(capsys, "deploy", str(tmp_path), "dev:net")
    text = refused(capsys, "deploy", str(saved), "dev:net", "--target", "aarch64-fp16")
    assert "has no library for aarch64-fp16; it has" in text
    assert "Received: target=vax" in refused(
        capsys, "deploy", str(saved), "dev:net", "--target", "vax"
    )
    assert os.listdir(device / "home") == []


# ---- the self-test over there --------------------------------------------------------------------


def test_verify_runs_there_before_the_old_bundle_goes(saved, device, capsys):
    shutil.copytree(saved, device / "home/models/net.sepconv")
    put(
        device / "bin/tvm-sepconv", '#!/bin/sh\nls -d models/net.sepconv "$2"; echo "$1: 1 right"\n'
    )
    assert cli.main(["deploy", str(saved), "dev:models/net.sepconv", "--verify"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"models/\.net\.sepconv\.new-\w+\nmodels/net\.sepconv\nverify: 1 right", out)
    is_deployed(saved, device)


@pytest.mark.parametrize("why", ["FAILED", "missing"])
def test_a_bundle_that_fails_there_is_not_put_in_place(why, saved, device, old, capsys):
    missing = "#!/bin/sh\necho 'sh: tvm-sepconv: not found' >&2; exit 127\n"
    script = missing if why == "missing" else "#!/bin/sh\necho one FAILED\nexit 1\n"
    put(device / "bin/tvm-sepconv", script)
    text = refused(capsys, "deploy", str(saved), "dev:models/net.sepconv", "--verify")
    said = "tvm-sepconv: not found" if why == "missing" else "one FAILED"
    assert "failed the self-test, or has no tvm-sepconv on its PATH; nothing was replaced" in text
    assert said in text
    assert contents(device / "home/models") == old
