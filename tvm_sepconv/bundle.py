"""The on-disk format of compiled layers: a folder of manifest, weights, self-test and libraries.

::

    manifest.json            layers, libraries, hashes; format 1
    weights.safetensors      <layer>/depthwise_kernel … in Keras's layouts
    selftest.safetensors     <layer>/input and <layer>/output, small, from the float64 reference
    lib/<arch>/libtvm_sepconv_runtime.so
    lib/<target>/<key>.so    one library serves every layer of equal kernel config
    lib/cuda…/<key>….so      the same for GPUs: tvm-ffi loads it, without the runtime library
    c/                       on request, a header and an example for C programs; not loaded

Every file that will be used is verified before any is opened. The hashes detect damage, not
malice: a bundle is native code, so load only what you would run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_sepconv import runtime, targets
from tvm_sepconv.config import SepConvConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
SELFTEST = "selftest.safetensors"
RUNTIME = "libtvm_sepconv_runtime.so"

Array = npt.NDArray[Any]


class BundleError(RuntimeError):
    """A bundle that cannot be loaded here; the message says why and what to do."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def layers(self) -> dict[str, SepConvConfig]:
        """The layers by name."""
        entries = self.manifest["layers"].items()
        return {name: SepConvConfig.from_dict(entry["config"]) for name, entry in entries}

    @property
    def targets(self) -> tuple[str, ...]:
        """Every target the bundle has libraries for."""
        return tuple(sorted(self.manifest["libraries"]))

    def weights(self) -> dict[str, dict[str, Array]]:
        """Weights by layer and Keras name."""
        return self._tensors(WEIGHTS)

    def selftest(self) -> dict[str, dict[str, Array]]:
        """``input`` and expected ``output`` by layer."""
        return self._tensors(SELFTEST)

    def libraries(self, target: str) -> tuple[Path | None, dict[str, Path]]:
        """Return the runtime library for `target`, None for CUDA's, and each layer's library."""
        chosen = self.manifest["libraries"][target]
        arch = self.manifest["runtimes"].get(target.split("-")[0])
        keys = {name: entry["library"] for name, entry in self.manifest["layers"].items()}
        return arch and self.path / arch["path"], {
            name: self.path / chosen[key]["path"] for name, key in keys.items()
        }

    def kernel(self, target: str, layer: str) -> dict[str, Any]:
        """What the library of `layer` for `target` was compiled from: `KernelConfig.to_dict`."""
        key = self.manifest["layers"][layer]["library"]
        kernel: dict[str, Any] = self.manifest["libraries"][target][key]["kernel"]
        return kernel

    def _tensors(self, name: str) -> dict[str, dict[str, Array]]:
        from safetensors.numpy import load_file

        result: dict[str, dict[str, Array]] = {layer: {} for layer in self.manifest["layers"]}
        for key, value in load_file(self.path / name).items():
            layer, _, tensor = key.rpartition("/")
            result[layer][tensor] = value
        return result


def open_bundle(path: str | Path, target: str | None = None) -> tuple[Bundle, str]:
    """Verify the bundle at `path` and choose its best target for this machine's processor.

    Parameters
    ----------
    target
        Use this one instead, if the machine can run it; whether a GPU can, `cuda_target` knows.

    Raises
    ------
    BundleError
        For a folder that is no bundle, a missing, truncated or altered file, a newer format, a
        runtime of another ABI, and for libraries this machine cannot run.
    """
    path = Path(path).absolute()  # libraries are opened again after `set_weights`, from wherever
    manifest = read_manifest(path)
    bundle = Bundle(path, manifest)
    chosen = _choose(bundle, target)
    runtimes = [] if is_cuda(chosen) else [manifest["runtimes"][chosen.split("-")[0]]]
    for arch in runtimes:
        if arch["abi"] != runtime.ABI:
            raise BundleError(
                f"{path} was built for runtime ABI {arch['abi']}; this tvm_sepconv has ABI "
                f"{runtime.ABI}. Save the layers again with this version, or install the matching "
                "one."
            )
    for entry in (*runtimes, *manifest["libraries"][chosen].values(), *manifest["files"].values()):
        verify(path, entry["path"], entry["sha256"])
    return bundle, chosen


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_bytes(tensors: dict[str, Array]) -> bytes:
    """Serialise tensors named ``<layer>/<tensor>`` as safetensors."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the bundle at `path`; its files are not looked at.

    Raises
    ------
    BundleError
        For a folder that is no bundle, a damaged manifest, a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "is a file" if path.exists() else "is not there"
        found = f"has no {MANIFEST}" if path.is_dir() else found
        raise BundleError(
            f"{path} is not a bundle: it {found}. Expected a folder that `layer.save(path)` wrote"
        ) from error
    except OSError as error:
        raise BundleError(
            f"{path / MANIFEST} cannot be read ({error}). Check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested beyond reason
        raise BundleError(
            f"{path / MANIFEST} is damaged ({error}). Copy the bundle again or save it anew"
        ) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{path / MANIFEST} is no bundle's manifest: it has no `format_version`")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}; this tvm_sepconv reads up to "
            f"{FORMAT_VERSION}. Install a newer tvm_sepconv, or save the layers with this one."
        )
    expected = _digest(manifest)
    if manifest.get("digest") != expected:
        raise BundleError(
            f"{path / MANIFEST} was altered: its digest is {manifest.get('digest')}, its content "
            f"has {expected}. Copy the bundle again or save it anew"
        )
    return dict(manifest)


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder that was written as a bundle, of whatever version and state."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format_version", "digest"} <= set(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as it is written, with a digest of itself."""
    complete = {**manifest, "format_version": FORMAT_VERSION}
    return json.dumps({**complete, "digest": _digest(complete)}, indent=1) + "\n"


def usable(names: Sequence[str], instruction_sets: Sequence[str] | None = None) -> list[str]:
    """Return those targets of `names` that a machine can run, best first.

    Parameters
    ----------
    instruction_sets
        What it can run, best first; None for this machine's.
    """
    sets = targets.runnable() if instruction_sets is None else instruction_sets
    # A core tunes only, so any core of an instruction set runs.
    return [name for isa in sets for name in sorted(names) if name.partition("@")[0] == isa]


def _choose(bundle: Bundle, target: str | None) -> str:
    able = usable(bundle.targets)
    if target is None and able:
        return able[0]
    if target is not None:
        target = targets.resolve(target)
        if target not in bundle.targets:
            raise BundleError(
                f"{bundle.path} has no library for {target}; it has {', '.join(bundle.targets)}. "
                f'Save the layers with `targets=["{target}"]` too, or leave the target out'
            )
        if target in able or is_cuda(target):
            return target
    wanted = (target,) if target else bundle.targets
    lacking = "; ".join(
        f"{name} needs {', '.join(targets.missing_features(name.partition('@')[0]))}"
        for name in wanted
    )
    raise BundleError(
        f"This machine cannot run the libraries in {bundle.path}: {lacking}. Save the layers with "
        f"`targets={list(targets.host_family()) or [targets.machine()]}` for this machine."
    )


def is_cuda(target: str) -> bool:
    """Whether the target's libraries run on a GPU."""
    return target.startswith("cuda")


def cuda_target(bundle: Bundle, capability: int, driver: int) -> str:
    """Choose the bundle's target for a GPU beside this machine's processor.

    Parameters
    ----------
    capability
        Of the GPU, such as 90.
    driver
        The newest CUDA its driver knows, such as 13000.

    Raises
    ------
    BundleError
        If the bundle has no libraries that run there, naming those it has.
    """
    groups = {name: bundle.manifest["libraries"][name] for name in bundle.targets if is_cuda(name)}
    if not groups:
        raise BundleError(
            f"{bundle.path} has no libraries for GPUs; it has {', '.join(bundle.targets)}. Save "
            f'the layers with `targets=["cuda"]`, or for this GPU alone "cuda-sm_{capability}"'
        )
    here = targets.machine()
    found: dict[tuple[int, int], str] = {}
    for name, group in groups.items():
        ways = [
            targets.cuda_code(entry["archs"], entry["ptx"], capability)
            if entry["host"] == here and _driver_serves(entry, capability, driver)
            else None
            for entry in group.values()
        ]
        if None not in ways:
            worst = max(way for way in ways if way is not None)
            found.setdefault((worst, len(next(iter(group.values()))["archs"])), name)
    if found:
        return found[min(found)]
    raise BundleError(
        f"No library in {bundle.path} runs on this GPU, an sm_{capability} beside {here}, with a "
        f"driver for CUDA {_release(driver)}: "
        + "; ".join(
            f"{name} is {gpu_needs(entry)}"
            for name, group in groups.items()
            for entry in list(group.values())[:1]
        )
        + ". "
        f'Save the layers with `targets=["cuda-sm_{capability}"]`, or update the NVIDIA driver'
    )


def _driver_serves(entry: dict[str, Any], capability: int, driver: int) -> bool:
    """Whether the driver takes the library's runtime, and its PTX where that is what it needs."""
    if targets.cuda_code(entry["archs"], entry["ptx"], capability) == 2:
        return bool(driver >= entry["cuda"])
    return bool(driver // 1000 >= entry["cuda"] // 1000)


def gpu_needs(entry: dict[str, Any]) -> str:
    """Say what a CUDA library runs on, from its entry in the manifest."""
    return (
        f"for {', '.join(entry['archs'])} and all newer than {entry['ptx']}, beside "
        f"{entry['host']}, with a driver for CUDA {_release(entry['cuda'])}"
    )


def _release(version: int) -> str:
    """Of 13000 "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def verify(root: Path, name: str, expected: str) -> None:
    """Check a file of the bundle at `root` against its sha256.

    Raises
    ------
    BundleError
        If it is missing, truncated or altered.
    """
    try:
        found = sha256(root / name)
    except OSError as error:
        raise BundleError(f"{root} is incomplete: {name} cannot be read ({error})") from error
    if found != expected:
        raise BundleError(
            f"{root / name} is truncated or altered: its sha256 is {found[:16]}…, the manifest "
            f"says {expected[:16]}…. Copy the bundle again or save it anew"
        )
