"""What the values of a model's config may be: checked before a model's class computes, allocates or loops with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_error import CheckpointError, shown


class Allowed(ABC):
    """Which values a config may have under one name."""

    @abstractmethod
    def takes(self, value: object) -> bool:
        """Whether `value`, anything that JSON can hold, is one of them."""

    @abstractmethod
    def __str__(self) -> str:
        """What they are, for messages."""


@dataclass(frozen=True)
class Whole(Allowed):
    """Whole numbers in multiples of `step`."""

    least: int
    most: int
    step: int = 1

    def takes(self, value: object) -> bool:
        """See `Allowed`."""
        return type(value) is int and self.least <= value <= self.most and value % self.step == 0

    def __str__(self) -> str:
        kind = "whole" if self.step == 1 else "even" if self.step == 2 else f"multiples of {self.step} among the whole"
        return f"{kind} numbers from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real(Allowed):
    """Finite numbers."""

    least: float
    most: float

    def takes(self, value: object) -> bool:
        """See `Allowed`."""
        return isinstance(value, (int, float)) and type(value) is not bool and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"numbers from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class OneOf(Allowed):
    """A few values; 1 is not True."""

    values: tuple[bool | str | None, ...]

    def takes(self, value: object) -> bool:
        """See `Allowed`."""
        return any(type(value) is type(each) and value == each for each in self.values)

    def __str__(self) -> str:
        return " or ".join("none" if value is None else str(value) for value in self.values)


@dataclass(frozen=True)
class Listed(Allowed):
    """Lists of `least` to `most` values."""

    each: Allowed
    least: int
    most: int

    def takes(self, value: object) -> bool:
        """See `Allowed`."""
        if not isinstance(value, (list, tuple)) or not self.least <= len(value) <= self.most:
            return False
        return all(map(self.each.takes, value))

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"lists of {count} {self.each}"


@dataclass(frozen=True)
class Optional(Allowed):
    """No value, or one of `some`."""

    some: Allowed

    def takes(self, value: object) -> bool:
        """See `Allowed`."""
        return value is None or self.some.takes(value)

    def __str__(self) -> str:
        return f"none or {self.some}"


FLAG = OneOf((True, False))


def check_config(place: Path | str, config: Mapping[str, Any], table: Mapping[str, Allowed]) -> None:
    """Raise CheckpointError for a value of `config` that is not among those that `table` allows under its name.

    Names that only one of the two has pass: what `config` lacks has a default, and what `table` lacks is not used.
    """
    for name, allowed in table.items():
        if name in config and not allowed.takes(config[name]):
            raise config_error(place, f"{name} {shown(config[name])}", str(allowed))


def config_error(place: Path | str, what: str, allowed: str) -> CheckpointError:
    """The error that the config in `place` has `what`."""
    return CheckpointError(
        f"{place} has {what} in its config, allowed are {allowed}: correct the config, or download it again."
    )
