"""Bundles changed as another program that writes bundles might: with fitting hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvm_sepconv import bundle


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], object], files: Mapping[str, bytes] | None = None
) -> None:
    """Write `files`, then let `change` change the manifest."""
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    manifest = json.loads((path / bundle.MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    entries = [*manifest["files"].values(), *manifest["runtimes"].values()]
    entries += [entry for group in manifest["libraries"].values() for entry in group.values()]
    for entry in entries:
        entry["sha256"] = hashlib.sha256((path / entry["path"]).read_bytes()).hexdigest()
    (path / bundle.MANIFEST).write_text(bundle.manifest_text(manifest))
