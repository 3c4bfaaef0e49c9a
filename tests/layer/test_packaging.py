"""The wheel against the tree, the metadata against its reasons, imports, and the layout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Where the folders of the checkout lie in the wheel; no other folder is packed.
MAPPED = {
    "tvm_sepconv": "tvm_sepconv",
    "schedules": "tvm_sepconv/compiler/schedules",
    "tuning_logs": "tvm_sepconv/compiler/tuning_logs",
}
TOP_LEVEL = {"LICENSE", "Makefile", "README.md", "pyproject.toml", "tests", *MAPPED}
DOTTED = {".ci", ".gitignore"}
FRAMEWORKS = {"torch", "keras", "jax", "tensorflow", "onnx"}
EXTRAS = {"compiler", "tune", "cuda", "cross", "h5", "report", "bench", "test", "dev", *FRAMEWORKS}
# What a plain import must not need. numpy is all it may.
BLOCKED = {
    "tvm",
    "tvm_ffi",
    "h5py",
    "onnxruntime",
    "rich",
    "xgboost",
    "scipy",
    "ml_dtypes",
    *FRAMEWORKS,
}
# What only some calls need and takes milliseconds to import: imported inside those functions.
DEFERRED = {
    "argparse", "asyncio", "email", "importlib.metadata", "importlib.resources", "logging",
    "multiprocessing", "numpy.random", "numpy.testing", "random", "safetensors", "secrets",
    "socket", "subprocess", "tempfile", "unittest", "zipfile",
    "tvm_sepconv.bench", "tvm_sepconv.cli", "tvm_sepconv.compiler", "tvm_sepconv.interop",
    "tvm_sepconv.jit", "tvm_sepconv.workloads",
}  # fmt: skip


def _listed() -> list[Path]:
    """Files that git tracks or would track, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build from a copy: an earlier build/lib in the checkout would be packed too."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in _listed():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def _requirements(metadata: Message, extra: str = "", **machine: str) -> dict[str, Requirement]:
    """Return what the extra adds to the base, or the base itself, on x86-64 Linux or `machine`."""
    environment = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}

    def applies(requirement: Requirement, extra: str) -> bool:
        marker = requirement.marker
        return marker is None or marker.evaluate({**environment, **machine, "extra": extra})

    parsed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return {r.name: r for r in parsed if applies(r, extra) and not (extra and applies(r, ""))}


def test_the_wheel_holds_the_package_folders_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        "/".join((MAPPED[path.parts[0]], *path.parts[1:]))
        for path in _listed()
        if path.parts[0] in MAPPED
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.parametrize(
    "name",
    [
        "tvm_sepconv/py.typed",
        "tvm_sepconv/workloads.json",
        "tvm_sepconv/native/runtime.c",
        "tvm_sepconv/native/tvm_sepconv.h",
        "tvm_sepconv/compiler/schedules/x86.py",
        "tvm_sepconv/compiler/tuning_logs/__init__.py",
    ],
)
def test_the_wheel_holds_the_data_files(wheel: zipfile.ZipFile, name: str) -> None:
    assert name in wheel.namelist()


def test_the_wheel_holds_the_license(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("/licenses/LICENSE"))
    assert "Apache License" in wheel.read(name).decode()


def test_the_wheel_fits_any_platform(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")


def test_the_console_script(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "tvm-sepconv = tvm_sepconv.cli:main" in wheel.read(name).decode()


def test_the_base_dependencies_are_three(metadata: Message) -> None:
    assert set(_requirements(metadata, "")) == {"numpy", "apache-tvm-ffi", "safetensors"}
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_base_installs_on_32_bit_arm(metadata: Message) -> None:
    assert set(_requirements(metadata, platform_machine="armv7l")) == {"numpy", "safetensors"}


def test_the_extras(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


@pytest.mark.parametrize(
    ("extra", "name", "taken", "refused"),
    [
        ("", "apache-tvm-ffi", ["0.1.14.post0", "0.1.15.post2"], ["0.1.13.post3"]),
        (
            "compiler",
            "apache-tvm-ffi",
            ["0.1.14.post0", "0.1.14.post1"],
            ["0.1.15", "0.1.15.post2"],
        ),
        ("compiler", "apache-tvm", ["0.27.0", "0.27.0.post1"], ["0.26.0", "0.28.0"]),
        ("test", "keras", ["3.15.0", "3.15.1"], ["3.14.1", "3.16.0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pin_takes_and_refuses(
    metadata: Message, extra: str, name: str, taken: list[str], refused: list[str]
) -> None:
    specifier = _requirements(metadata, extra)[name].specifier
    assert [v for v in taken + refused if specifier.contains(v)] == taken


@pytest.mark.parametrize(
    ("machine", "platform", "name"),
    [
        ("x86_64", "linux", "xgboost-cpu"),
        ("aarch64", "linux", "xgboost-cpu"),
        ("ppc64le", "linux", "xgboost"),
        ("arm64", "darwin", "xgboost"),
    ],
)
def test_tuning_takes_the_xgboost_of_the_platform(
    metadata: Message, machine: str, platform: str, name: str
) -> None:
    added = _requirements(metadata, "tune", platform_machine=machine, sys_platform=platform)
    assert [added_name for added_name in added if "xgboost" in added_name] == [name]


IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
import tvm_sepconv
loaded = sorted({{name.partition(".")[0] for name in sys.modules}} & set({blocked}))
assert not loaded, loaded
assert "tvm_sepconv.compiler" not in sys.modules
names = [m.name for m in pkgutil.iter_modules(tvm_sepconv.__path__) if not m.ispkg]
for name in names:
    importlib.import_module(f"tvm_sepconv.{{name}}")
print(*names)
"""


def test_the_device_side_imports_with_everything_else_blocked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(blocked=BLOCKED)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modules = {path.stem for path in (ROOT / "tvm_sepconv").glob("*.py")} - {"__init__"}
    assert set(done.stdout.split()) == modules


def test_a_plain_import_loads_no_framework_that_is_installed() -> None:
    code = "import sys, tvm_sepconv; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & BLOCKED


def test_a_plain_import_loads_nothing_that_takes_long_besides_numpy() -> None:
    code = (
        "import sys, numpy, numpy.typing; before = set(sys.modules); "
        "import tvm_sepconv; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    added = set(done.stdout.split())
    assert "tvm_sepconv.layer" in added
    assert not added & DEFERRED


def test_the_top_level_is_what_was_agreed() -> None:
    found = {path.parts[0] for path in _listed()}
    assert found - TOP_LEVEL - DOTTED == set()
    assert TOP_LEVEL - found == set()


def test_the_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_readme_names_commands_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    blocks = re.findall(r"^<!-- test command -->\n```\w*\n(.*?)^```$", readme, re.S | re.M)
    assert [block.strip() for block in blocks] == ["make test"]  # .ci/run runs this very block
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    fenced = "".join(re.findall(r"^```(?:sh|console|bash)\n(.*?)^```$", readme, re.S | re.M))
    used = set(re.findall(r"\bmake ([a-z][\w-]*)", fenced))
    assert {"demo", "test"} <= used <= targets


def test_every_extra_that_the_makefile_installs_exists(metadata: Message) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        e for line in re.findall(r"^EXTRAS-\w+ = (.*)$", makefile, re.M) for e in line.split(",")
    }
    assert named and named <= set(metadata.get_all("Provides-Extra", []))
