"""Calls while a block is made, to show progress and to look for a cancel: before each pass, and within long ones.

On a CPU a pass of the transformer, or a latent frame of the VAE, may take a minute. So modules are hooked while a block
is made: each repeated layer, and each module that holds no others, such as a convolution of the VAE. On other devices
work is queued in advance, and a pass is short: there are no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import nn

# Called many times while a block is made; raises to stop it.
Look = Callable[[], None]
# Called with the number of the pass.
PassCallback = Callable[[int], None]


def look_away() -> None:
    """Look for nothing."""


@contextmanager
def looking(look: Look, parts: Iterable[object], device: torch.device) -> Iterator[None]:
    """Call `look` before each layer and each innermost module of the parts, where the device is a CPU.

    Args:
        look: an error raised in it ends the work; no hook is left.
        parts: those that are modules are hooked.
        device: of the parts.
    """
    if look is look_away or device.type != "cpu":
        yield
        return

    def before(module: nn.Module, arguments: object) -> None:
        look()

    modules = {module for part in parts if isinstance(part, nn.Module) for module in _looked_at(part)}
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching_passes(transformer: object, on_pass: PassCallback | None) -> Iterator[None]:
    """Call `on_pass` with 0, 1, ... before each forward of the transformer, in built-in and foreign pipelines."""
    if on_pass is None or not isinstance(transformer, nn.Module):
        yield
        return
    passes = count()
    hook = transformer.register_forward_pre_hook(lambda *_: on_pass(next(passes)))
    try:
        yield
    finally:
        hook.remove()


def _looked_at(module: nn.Module, *, is_layer: bool = False) -> Iterator[nn.Module]:
    """The module's layers and innermost modules, but for those whose calls are compiled along with their parent's."""
    compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    children = list(module.children())
    # Compiled, a plain module's own call bypasses or traces its hooks; a class with another call knows better.
    if (is_layer or not children) and not (compiled and type(module).__call__ is nn.Module.__call__):
        yield module
    if not compiled:
        for child in children:
            yield from _looked_at(child, is_layer=isinstance(module, nn.ModuleList))
