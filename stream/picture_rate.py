"""Pictures a second, as files can hold them. No torch: nodes ask."""

from __future__ import annotations

from fractions import Fraction

# Players and FFmpeg's time bases take these; no stream needs others.
SLOWEST, FASTEST = 0.01, 1000.0
# 23.976 is 24000/1001.
_DENOMINATOR = 1001


def exact_rate(fps: float | Fraction, name: str = "fps", otherwise: str = "") -> Fraction:
    """Pictures a second as a fraction that files have.

    Args:
        fps: as the user gives them.
        name: of the input, for messages.
        otherwise: what else the input takes, for messages.

    Raises:
        ValueError: one sentence, for 0, a negative or very large number, infinity, or NaN.
    """
    # NaN is in no range.
    if not SLOWEST <= fps <= FASTEST:
        raise ValueError(f"{name} is {float(fps):g}: give {SLOWEST:g} to {FASTEST:g} pictures a second{otherwise}.")
    return Fraction(fps).limit_denominator(_DENOMINATOR)
