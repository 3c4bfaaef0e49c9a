"""Files and folders that options name, refused before anything is computed."""

from __future__ import annotations

from pathlib import Path


def file(option: str, path: Path) -> None:
    """Refuse what cannot be read as a file, with a ValueError that names the option."""
    if not path.exists() or path.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"There is none called {path}"
        raise ValueError(f"`{option}` must be a file. {found}")


def folder(option: str, path: Path) -> None:
    """Refuse what is no folder, with a ValueError that names the option."""
    if not path.is_dir():
        found = f"{path} is a file" if path.exists() else f"There is none called {path}"
        raise ValueError(f"`{option}` must be a folder. {found}")


def new_file(option: str, path: Path) -> None:
    """Refuse a file that lies in no folder, with a ValueError that names the option."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"`{option}` must lie in a folder. There is none called {path.parent}")


def new_folder(option: str, path: Path) -> None:
    """Refuse what is there and no folder, with a ValueError that names the option."""
    if path.exists():
        folder(option, path)
