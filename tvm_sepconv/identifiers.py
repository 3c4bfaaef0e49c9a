"""Keras identifiers: the name, config, class, instance or callable that stands for an object."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

T = TypeVar("T", bound="Configurable")


@dataclasses.dataclass(frozen=True)
class Configurable:
    """An object that its arguments describe fully: equal arguments, equal objects.

    Subclasses are frozen dataclasses whose fields are the arguments of the Keras class of the same
    name. One that adds no field is not decorated: it inherits the methods, and generating them anew
    for each such class would be a fifth of the package's import.
    """

    keras_module: ClassVar[str] = "keras"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, JSON-able, in Keras's words."""
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: _plain(v) for k, v in config.items()}

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Make the object of `config`, which may come from Keras.

        Raises
        ------
        ValueError
            If `config` has a key that is not an argument.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        if unknown := {k: v for k, v in config.items() if k not in known}:
            raise ValueError(
                f"Unrecognized keyword arguments passed to {cls.__name__}: {unknown}. "
                f"Expected some of {known}"
            )
        return cls(**{k: _value(v) for k, v in config.items()})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _value(value: Any) -> Any:
    """Undo Keras's wrapping of arrays; lists become tuples, which can be compared and hashed."""
    if isinstance(value, Mapping) and value.get("class_name") in ("__numpy__", "__tensor__"):
        value = value["config"]["value"]
    return tuple(_value(v) for v in value) if isinstance(value, list) else value


def snake_case(name: str) -> str:
    """Return `name` in Keras's lower case: GlorotUniform -> glorot_uniform, L1L2 -> l1l2."""
    # A word starts at a capital behind a small letter, or at one before a small letter.
    return re.sub("(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


def table(
    classes: tuple[type[Configurable], ...], aliases: Mapping[str, type[Configurable]]
) -> dict[str, type[Configurable]]:
    """Return all names under which Keras finds `classes`: their own, in snake case, `aliases`."""
    names = {c.__name__: c for c in classes}
    return {**names, **{snake_case(n): c for n, c in names.items()}, **aliases}


def get(
    kind: str, classes: Mapping[str, type[Configurable]], identifier: Any
) -> Callable[..., Any]:
    """Find the object for `identifier` among `classes`; callables pass through, classes are called.

    Raises
    ------
    ValueError
        If nothing is found, naming `kind` and what would be.
    """
    found: Any = identifier
    if isinstance(identifier, str):
        found = classes.get(identifier)
    elif isinstance(identifier, Mapping):
        found = _from_dict(classes, identifier)
    if inspect.isclass(found):
        found = found()
    if callable(found):
        return cast(Callable[..., Any], found)
    raise ValueError(
        f"Could not interpret {kind} identifier: {identifier}. Pass a callable, a Keras {kind} "
        f"config, or one of {', '.join(sorted(n for n in classes if n == n.lower()))}"
    )


def _from_dict(
    classes: Mapping[str, type[Configurable]], config: Mapping[str, Any]
) -> Configurable | None:
    cls = classes.get(str(config.get("class_name")))
    # A registered name such as "mine>L2" is somebody's own class that only looks like Keras's.
    arguments = config.get("config") or {}
    if cls is None or ">" in str(config.get("registered_name")):
        return None
    return cls.from_config(arguments) if isinstance(arguments, Mapping) else None


def serialize(kind: str, obj: Any) -> dict[str, Any] | None:
    """Return Keras's config dict of `obj`; None stays None.

    Raises
    ------
    ValueError
        If `obj` is a custom callable.
    """
    if obj is None:
        return None
    if not isinstance(obj, Configurable):
        raise ValueError(
            f"Unknown {kind} '{obj}' cannot be serialized: a custom callable has no Keras name and "
            f"cannot be put in a config. Use one of the named {kind}s"
        )
    return {
        "module": obj.keras_module,
        "class_name": type(obj).__name__,
        "config": obj.get_config(),
        "registered_name": None,
    }
