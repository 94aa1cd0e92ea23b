"""Values of a state as named tensors and one JSON text, and back.

What a state holds are tensors in lists, deques and dicts, numbers, strings, generators, and objects that are
`Snapshottable`. Anything else is refused rather than pickled: a snapshot must be a value that can lie in a file.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import psutil
import torch

from ..checkpoints.checkpoint_error import first_line, shown, shown_word
from ..memory.byte_text import format_gb
from .snapshot_layout import PLAIN
from .state import Snapshottable

# From the name of a class to what makes its object of parts; see `Snapshottable.from_snapshot`.
SnapshotKinds = Mapping[str, Callable[[Mapping[str, Any], torch.device], Any]]


class CannotSnapshotError(ValueError):
    """A state holds what a snapshot cannot: no stream can go on from it."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


class TreeWriter:
    """Takes values apart.

    Args:
        device: of the stream; tensors elsewhere, on the CPU, stay there when the stream goes on.

    Attributes:
        tensors: copies on the CPU, by the path of their place.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._device = device
        self._found: dict[str, torch.Tensor] = {}
        self._paths: dict[int, str] = {}

    def write(self, values: Mapping[str, Any]) -> str:
        """`values` as JSON text; their tensors are copied to `tensors`.

        Raises:
            CannotSnapshotError: a value is of a type that cannot be taken apart.
            MemoryError: there is too little RAM for copies; nothing was copied.
        """
        written = json.dumps({key: self._node(value, key) for key, value in values.items()}, allow_nan=False)
        check_room(sum(tensor.nbytes for tensor in self._found.values()))
        self.tensors = {path: tensor.detach().to("cpu", copy=True) for path, tensor in self._found.items()}
        self._found, self._paths = {}, {}
        return written

    def _node(self, value: Any, path: str) -> Any:  # noqa: ANN401
        if isinstance(value, float) and not math.isfinite(value):
            # JSON has no such numbers.
            return {"float": repr(value)}
        if value is None or type(value) in PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._take(value, path), "on_device": value.device.type == self._device.type}
        if isinstance(value, torch.Generator):
            return {"generator": self._take(value.get_state(), path), "device": value.device.type}
        if isinstance(value, Snapshottable):
            return {"kind": type(value).__name__, "parts": self._node(dict(value.to_snapshot()), path)}
        if isinstance(value, dict):
            pairs = [[self._key(key, path), self._node(entry, f"{path}/{key}")] for key, entry in value.items()]
            return {"dict": pairs}
        if type(value) in (list, tuple, deque):
            items = [self._node(item, f"{path}/{index}") for index, item in enumerate(value)]
            limit = {"length": value.maxlen} if isinstance(value, deque) else {}
            return {type(value).__name__: items, **limit}
        raise CannotSnapshotError(_refusal(path, value))

    def _key(self, key: Any, path: str) -> Any:  # noqa: ANN401
        if key is None or type(key) in PLAIN:
            return key
        raise CannotSnapshotError(_refusal(path, key))

    def _take(self, tensor: torch.Tensor, path: str) -> str:
        # Identities are those of tensors that are alive until all are found.
        known = self._paths.setdefault(id(tensor), path)
        if known == path:
            self._found[path] = tensor
        return known


def check_room(needed: int) -> None:
    """Raise MemoryError unless `needed` bytes leave as many bytes of RAM free for everything else."""
    free = int(psutil.virtual_memory().available)
    if 2 * needed > free:
        raise MemoryError(
            f"a copy of the stream's past takes {format_gb(needed)} of RAM and {format_gb(free)} are free: close other "
            "programs, or choose a smaller width, height or context."
        )


def _refusal(path: str, value: Any) -> str:  # noqa: ANN401
    return (
        f"the stream cannot be kept to go on from: {path} in its state is a {type(value).__name__}, which cannot be "
        f"copied as tensors and numbers; if the pipeline makes it anew for each block, write "
        f"'{path.split('/')[0]} = drop' under state_rules."
    )


class TreeReader:
    """Puts values together again, of tensors that are their own.

    Args:
        tensors: by path; none of them is handed out.
        device: of the stream that goes on.
        kinds: the classes of its pipeline's objects.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device, kinds: SnapshotKinds) -> None:
        self._tensors = tensors
        self._device = device
        self._kinds = kinds
        self._made: dict[str, torch.Tensor] = {}

    def read(self, written: str, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, Any]:
        """The values that a `TreeWriter` took apart, all or those of some names.

        Raises:
            ValueError: the pipeline has no such class, or a generator was on another kind of device.
        """
        nodes = json.loads(written)
        wanted = [key for key in nodes if key not in without and (only is None or key in only)]
        return {key: self._value(nodes[key], lent=False) for key in wanted}

    def _value(self, node: Any, *, lent: bool) -> Any:  # noqa: ANN401
        """The value of a node; `lent` gives the tensors themselves, to one that copies them."""
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return self._tensor(node["tensor"], on_device=node["on_device"], lent=lent)
        if "generator" in node:
            return self._generator(node["generator"], node["device"])
        if "float" in node:
            return float(node["float"])
        if "kind" in node:
            return self._object(node["kind"], node["parts"])
        if "dict" in node:
            return {key: self._value(entry, lent=lent) for key, entry in node["dict"]}
        kind = next(name for name in ("list", "tuple", "deque") if name in node)
        items = [self._value(item, lent=lent) for item in node[kind]]
        if kind == "deque":
            return deque(items, maxlen=node["length"])
        return items if kind == "list" else tuple(items)

    def _tensor(self, path: str, *, on_device: bool, lent: bool) -> torch.Tensor:
        if lent:
            return self._tensors[path]
        if path not in self._made:
            self._made[path] = self._tensors[path].to(self._device if on_device else "cpu", copy=True)
        return self._made[path]

    def _generator(self, path: str, kind: str) -> torch.Generator:
        if kind not in ("cpu", self._device.type):
            drawn = shown_word(kind)
            raise ValueError(
                f"go_on_from drew its noise on {drawn} and this pipeline is on {self._device.type}: choose the device "
                f"{drawn} in the loader, or start a new stream."
            )
        generator = torch.Generator(self._device if kind == self._device.type else kind)
        try:
            generator.set_state(self._tensors[path].clone())
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"go_on_from has no state of a generator in {shown(path)} ({first_line(error)}): start a new stream."
            ) from error
        return generator

    def _object(self, kind: str, parts: Any) -> Any:  # noqa: ANN401
        name = shown_word(kind)
        if kind not in self._kinds:
            raise ValueError(
                f"go_on_from holds a {name}, which this pipeline does not know: it is a stream of another pipeline; "
                "start a new stream."
            )
        made = self._value(parts, lent=True)
        try:
            return self._kinds[kind](made, self._device)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # Parts from a file may be anything.
            raise ValueError(
                f"go_on_from holds a {name} of other parts than this version has ({first_line(error)}): start a new "
                "stream."
            ) from error
