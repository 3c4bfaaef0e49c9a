"""What runs after what in a PyTorch model: from each convolution on, the modules that follow it.

A model whose ``forward`` torch.fx can trace tells it by itself, as it runs with the defaults of its
arguments. Where that fails, it is asked of the parts, and the order of two containers is known:
``Sequential``, and the ``mconv`` lists of NeMo's blocks (QuartzNet, Citrinet, MatchboxNet), whose
convolutions may lie in wrappers that mask steps beyond each sample's length.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.fx  # noqa: TID253  # this module is imported only by what is made for PyTorch
from torch import nn  # noqa: TID253

from tvm_sepconv.interop.torch_module import SeparableConv1d, activation_name


class Step(NamedTuple):
    """A module of a chain.

    Attributes
    ----------
    masks
        Whether the module is given its input with steps set to zero, or zeros added, on the way.
    """

    name: str
    module: Any
    masks: bool = False


class Chain(NamedTuple):
    """Modules of which each is given the output of the one before, which goes nowhere else.

    Attributes
    ----------
    end
        Why it ends, in words.
    """

    steps: tuple[Step, ...]
    end: str


@dataclass
class Found:
    """Chains by the name of their first module; what is known of modules by their identity.

    Attributes
    ----------
    untraced
        Why the order in a module is not known, by its name.
    tied
        Why a module cannot be replaced, by its name.
    """

    chains: dict[str, Chain] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def is_grouped(module: Any) -> bool:
    """Whether `module` is a convolution that may be a depthwise one, or is taken for one."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return convolution and (module.groups > 1 or module.in_channels == 1)


def find(root: Any) -> Found:
    """Follow every grouped convolution in `root`."""
    found = Found()
    places: dict[int, dict[tuple[int, str], list[str]]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        place = (id(root.get_submodule(owner)), key)
        places.setdefault(id(module), {}).setdefault(place, []).append(name)
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
            found.tied[name] = "it has hooks: remove them first"
    shared = []
    for of_module in places.values():
        names = [name for several in of_module.values() for name in several]
        if len(names) == len(of_module) and activation_name(root.get_submodule(names[0])):
            shared += names[1:]
        elif len(names) > 1:
            reason = "it is registered more than once, as " + ", ".join(names)
            found.tied |= {name: found.tied.get(name, reason) for name in names}
    with _apart(root, [name.rpartition(".") for name in shared]):
        _look(root, "", found)
    return found


@contextmanager
def _apart(root: Any, names: list[tuple[str, str, str]]) -> Iterator[None]:
    """Let these places hold a copy each, of activations that a model uses in many places."""
    places = [(root.get_submodule(owner)._modules, key) for owner, _, key in names]
    before = [(children, key, children[key]) for children, key in places]
    try:
        for children, key, module in before:
            children[key] = copy.copy(module)
        yield
    finally:
        for children, key, module in before:
            children[key] = module


def _look(module: Any, name: str, found: Found) -> None:
    if not module._modules:
        return
    try:
        graphs = _trace(module)
    except Exception as error:  # whatever a model's own code may raise when it is traced
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # those have no forward
            found.untraced[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        for steps in _listed(module, name, found):
            _chain_list(steps, found)
        for child_name, child in module.named_children():
            _look(child, _join(name, child_name), found)
        return
    chains: dict[str, Chain] = {}
    for graph in graphs:
        for start, chain in _chain_graph(graph, module, name, found).items():
            chains[start] = _common(chains.get(start, chain), chain)
    found.chains = {**chains, **found.chains}  # what is known from further outside reaches further


def _common(one: Chain, other: Chain) -> Chain:
    """Return what follows a module in both ways to call its model."""
    if one.steps == other.steps:
        return one
    pairs = zip(one.steps, other.steps, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return Chain(tuple(step for step, _ in same), "what depends on optional arguments")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


# ---- traced --------------------------------------------------------------------------------------


class _Tracer(torch.fx.Tracer):  # type: ignore[misc]
    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return isinstance(m, SeparableConv1d) or super().is_leaf_module(m, module_qualified_name)


def _trace(module: Any) -> list[Any]:
    """Return the graphs of `module`, with its optional arguments left out and, if it can, given."""
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with _unchanged(module):
        graphs = [_Tracer().trace(module, defaults or None)]
        if defaults:
            # An argument that decides the way through the model fails here: the default decides.
            with suppress(Exception):
                graphs.append(_Tracer().trace(module))
    return graphs


@contextmanager
def _unchanged(root: Any) -> Iterator[None]:
    """Undo what a traced ``forward`` keeps in its modules: fx's stand-ins for tensors."""
    places = [
        place
        for module in root.modules()
        for place in (vars(module), module._buffers, module._parameters, module._modules)
    ]
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, content in zip(places, before, strict=True):
            place.clear()
            place.update(content)


def _chain_graph(graph: Any, root: Any, prefix: str, found: Found) -> dict[str, Chain]:
    modules = dict(root.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for target, number in calls.items():
        if number > 1:
            found.tied.setdefault(_join(prefix, target), f"it is called {number} times")
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = _join(prefix, str(node.target).rpartition(".")[0])
            found.tied.setdefault(owner, f"`{node.target}` is used by itself")
    chains = {}
    for node in graph.nodes:
        if node.op == "call_module" and is_grouped(modules[node.target]):
            chains[_join(prefix, node.target)] = _follow(node, modules, prefix)
    return chains


def _follow(node: Any, modules: dict[str, Any], prefix: str) -> Chain:
    steps = [Step(_join(prefix, node.target), modules[node.target])]
    while len(users := list(node.users)) == 1:
        (user,) = users
        if user.op == "output":
            return Chain(tuple(steps), "the output")
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            what = getattr(user.target, "__name__", user.target)
            return Chain(tuple(steps), f"`{what}` in forward")
        node = user
        steps.append(Step(_join(prefix, node.target), modules[node.target]))
    return Chain(tuple(steps), f"{len(users)} uses of its output" if users else "nothing")


# ---- listed --------------------------------------------------------------------------------------


def _listed(module: Any, name: str, found: Found) -> Iterator[list[Step]]:
    """Yield the lists of modules that run in their order."""
    if type(module).forward is nn.Sequential.forward:
        yield list(_flat(module, name, found))
    mconv = getattr(module, "mconv", None)
    if isinstance(mconv, nn.ModuleList) and hasattr(module, "mout"):
        children = mconv._modules.items()
        yield [_unwrapped(child, _join(name, "mconv", key)) for key, child in children]


def _flat(module: Any, name: str, found: Found) -> Iterator[Step]:
    for key, child in module._modules.items():
        own = _join(name, key)
        if type(child).forward is nn.Sequential.forward and own not in found.tied:
            yield from _flat(child, own, found)
        else:
            yield Step(own, child)


def _unwrapped(module: Any, name: str) -> Step:
    conv = getattr(module, "conv", None)
    # With `heads`, a convolution of few channels runs over all of them in turn.
    whole = isinstance(conv, nn.Conv1d) and getattr(module, "heads", -1) == -1
    if whole and hasattr(module, "use_mask"):
        pads = getattr(module, "pad_layer", None) is not None
        return Step(_join(name, "conv"), conv, bool(module.use_mask) or pads)
    return Step(name, module)


def _chain_list(steps: list[Step], found: Found) -> None:
    for i, step in enumerate(steps):
        if is_grouped(step.module):
            found.chains.setdefault(step.name, Chain(tuple(steps[i:]), "the end of its container"))
