"""Replays a pass as a CUDA graph would: the same calls, on the same memory, whatever the requests are by then.

:class:`Recording` notes every ATen call of a pass with the tensors it took and made. A number that came from the host,
a tensor that was made for one pass only, or a row that is not inert where it should be, gives another result than the
pass itself. What would stop a capture is refused while it records: looking at a value on the host, and memory that is
neither known beforehand nor made by the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ON_THE_HOST = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.tensor,
    torch.as_tensor,
}
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotReplayable(AssertionError):
    """A pass does what no graph can hold."""


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recording:
    """The calls that are made while it :meth:`records`; ``known`` are tensors that outlive them."""

    def __init__(self, known: Iterable[Tensor]):
        self._known = list(known)
        self._calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self._kept: list[Any] = []

    @contextmanager
    def records(self) -> Iterator[None]:
        with _RefusesTheHost(), _Calls(self, self._known):
            yield

    @property
    def calls(self) -> list[str]:
        """The names of the calls."""
        return [function._schema.name for function, *_ in self._calls]

    def replay(self) -> None:
        """Makes the calls again; the tensors that they made hold what has come of it."""
        for function, args, options, outputs in self._calls:
            made = tensors_in(function(*args, **options))
            for output, new in zip(outputs, made, strict=True):
                if output is not new:
                    output.copy_(new)

    def spoil(self) -> None:
        """Overwrites all memory that the calls made, as another graph in the same memory pool may do."""
        known = set(map(storage, self._known))
        for tensor in self._kept:
            if storage(tensor) not in known:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


class _RefusesTheHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _ON_THE_HOST:
            raise NotReplayable(f"a value is read on the host or sent from it: {function.__name__}")
        return function(*args, **(kwargs or {}))


class _Calls(TorchDispatchMode):
    def __init__(self, recording: Recording, known: Iterable[Tensor]):
        super().__init__()
        self._recording = recording
        self._known = {storage(tensor) for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, taken = function._schema.name, tensors_in(args, kwargs)
        if name == "aten::lift_fresh":  # of a host array; no call may take it
            return function(*args, **kwargs)
        self._check(function, name, args, kwargs, taken)
        result = function(*args, **kwargs)
        made = tensors_in(result)
        self._recording._kept += taken + made  # so that no other tensor gets their memory
        if function._schema.is_mutable:
            self._recording._calls.append((function, args, kwargs, []) if not made else (function, args, kwargs, made))
        elif any(storage(tensor) not in map(storage, taken) for tensor in made):
            self._recording._calls.append((function, args, kwargs, made))
        self._known.update(map(storage, made))
        return result

    def _check(self, function: Any, name: str, args: tuple, kwargs: dict, taken: list[Tensor]) -> None:
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            if any(index.dtype == torch.bool for index in tensors_in(args[1])):
                raise NotReplayable(f"the number of elements depends on values: {name} by a mask")
        elif "output_size" not in kwargs and _DEPENDS_ON_VALUES & set(function.tags):
            raise NotReplayable(f"the result's shape depends on values: {name}")
        for tensor in taken:
            if storage(tensor) not in self._known:
                raise NotReplayable(f"{name} takes {tuple(tensor.shape)} {tensor.dtype}, made for this pass only")
