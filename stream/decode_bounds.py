"""How a stream decodes where whole pictures do not fit: in bands of rows, then with the decoder's cache in RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .settings import StreamSettings


def bound_decoding(
    settings: StreamSettings,
    available: int,
    least_of: Callable[[StreamSettings], int],
    band_counts: Sequence[int],
    *,
    has_ram: bool,
) -> StreamSettings:
    """The mildest way of decoding that fits, or the one that takes least.

    Bands cost their halos, about an eighth of the decoder's work at four; a cache in RAM crosses the bus twice for each
    latent frame.

    Args:
        settings: of a stream that decodes whole pictures.
        available: bytes of the device.
        least_of: bytes that settings need; asked as rarely as possible.
        band_counts: that the model's decoder works in, fewest first.
        has_ram: whether RAM is other memory than the device's.
    """
    if least_of(settings) <= available:
        return settings
    for in_ram in (False, True) if has_ram else (False,):
        choices = [replace(settings, decode_bands=count, decoder_cache_in_ram=in_ram) for count in band_counts]
        if least_of(choices[-1]) <= available:
            return next(choice for choice in choices if least_of(choice) <= available)
    return choices[-1]


def decoder_ram_bytes(
    settings: StreamSettings, streaming_of: Callable[[StreamSettings], int], band_counts: Sequence[int]
) -> int:
    """Bytes of RAM that the decoder's cache takes: what it no longer takes on the device.

    Args:
        settings: as `bound_decoding` made them.
        streaming_of: bytes of caches and activations under settings.
        band_counts: see `bound_decoding`, which has asked for those with the most bands.
    """
    if not settings.decoder_cache_in_ram:
        return 0
    most = replace(settings, decode_bands=band_counts[-1], fuse_context=False)
    return max(0, streaming_of(replace(most, decoder_cache_in_ram=False)) - streaming_of(most))


def decoding_notice(settings: StreamSettings) -> str:
    """One sentence for the user; empty where whole pictures are decoded on the device."""
    ways = ways_of_decoding(settings)
    return f"Pictures are decoded {ways}: the device has no room for more." if ways else ""


def ways_of_decoding(settings: StreamSettings) -> str:
    """How pictures are decoded; empty for whole ones on the device."""
    bands, in_ram = settings.decode_bands, settings.decoder_cache_in_ram
    ways = (f"in {bands} bands of rows",) * (bands > 1) + ("with the decoder's cache in RAM",) * in_ram
    return ", ".join(ways)


def bound_decoding_more(
    settings: StreamSettings, band_counts: Sequence[int], *, has_ram: bool
) -> StreamSettings | None:
    """The next milder of the ways that take less; None where there is none.

    Args:
        settings: of a stream, which may change between two blocks.
        band_counts: see `bound_decoding`.
        has_ram: see `bound_decoding`.
    """
    more = [count for count in band_counts if count > settings.decode_bands]
    if more:
        return replace(settings, decode_bands=more[0])
    return replace(settings, decoder_cache_in_ram=True) if has_ram and not settings.decoder_cache_in_ram else None
