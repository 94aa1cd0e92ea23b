"""Pictures from outside, of any size, become pictures of the stream's size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from .picture_choices import CROP, FITS

_CHANNELS = (1, 3, 4)


def check_fit_choice(fit: str) -> None:
    """Raise ValueError for a way to fit that there is not."""
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}: choose {' or '.join(map(repr, FITS))}.")


def check_pictures(name: str, pictures: torch.Tensor) -> None:
    """Check a batch as ComfyUI's IMAGE has them.

    Args:
        name: of the input, for the message.
        pictures: float [F, height, width, channels].

    Raises:
        ValueError: no pictures, another shape, or values that are not numbers.
    """
    if not isinstance(pictures, torch.Tensor) or not pictures.dtype.is_floating_point:
        what = str(pictures.dtype) if isinstance(pictures, torch.Tensor) else type(pictures).__name__
        raise ValueError(f"{name} holds {what}: give an IMAGE, numbers from 0 to 1 in a floating-point format.")
    if pictures.ndim != 4 or pictures.shape[-1] not in _CHANNELS or 0 in pictures.shape[1:]:
        raise ValueError(
            f"{name} has shape {list(pictures.shape)}: give an IMAGE, [pictures, height, width, channels] with 1, 3 "
            "or 4 channels and at least one pixel."
        )
    if not len(pictures):
        raise ValueError(f"{name} holds no pictures: give at least one.")
    for picture in pictures:
        if not torch.isfinite(picture).all():
            raise ValueError(f"{name} holds NaN or infinite values: make the pictures anew, with numbers from 0 to 1.")


def to_rgb(picture: torch.Tensor) -> torch.Tensor:
    """One picture as uint8 [height, width, 3] on the CPU.

    Args:
        picture: uint8 [height, width, 3], returned as it is; or float [height, width, channels], clamped to 0..1: grey
            (1 channel) is repeated, and what alpha (the 4th channel) leaves transparent is black.
    """
    if picture.dtype is torch.uint8:
        return picture
    known = picture.float().cpu().clamp(0.0, 1.0)
    if known.shape[-1] == 1:
        known = known.expand(-1, -1, 3)
    elif known.shape[-1] == 4:
        known = known[..., :3] * known[..., 3:]
    return known.mul(255.0).round_().to(torch.uint8)


@dataclass(frozen=True)
class PictureFit:
    """How pictures are brought to the stream's size.

    Attributes:
        width: of the stream, pixels.
        height: of the stream, pixels.
        fit: "crop" cuts off what does not fit, equally on both sides; "pad" adds black on both sides.
    """

    width: int
    height: int
    fit: str = CROP

    def __post_init__(self) -> None:
        check_fit_choice(self.fit)

    def apply(self, picture: torch.Tensor) -> torch.Tensor:
        """Fit one picture; bicubic, antialiased.

        Args:
            picture: see `to_rgb`.

        Returns:
            uint8 [height, width, 3] of the stream.
        """
        rgb = to_rgb(picture)
        rows, columns, _ = rgb.shape
        if (columns, rows) == (self.width, self.height):
            return rgb
        # Cut before it is scaled: scaled first, a narrow strip would become huge.
        if self.fit == CROP:
            kept_rows, kept_columns = self._kept(rows, columns)
            top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
            return _scale(rgb[top : top + kept_rows, left : left + kept_columns], self.height, self.width)
        inner_height, inner_width = self._inner(rows, columns)
        top, left = (self.height - inner_height) // 2, (self.width - inner_width) // 2
        fitted = torch.zeros((self.height, self.width, 3), dtype=torch.uint8)
        fitted[top : top + inner_height, left : left + inner_width] = _scale(rgb, inner_height, inner_width)
        return fitted

    def describe(self, name: str, height: int, width: int) -> str:
        """A sentence on what happens to pictures of this size; "" where nothing does."""
        if (width, height) == (self.width, self.height):
            return ""
        kept_rows, kept_columns = self._kept(height, width)
        same_shape = (kept_rows, kept_columns) == (height, width)
        sides = "at top and bottom" if (kept_rows < height) == (self.fit == CROP) else "at left and right"
        how = "" if same_shape else f" and {'cropped' if self.fit == CROP else 'padded with black'} {sides}"
        return f"{name}: pictures of {width}x{height} are scaled{how} to {self.width}x{self.height}."

    def _kept(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the largest part that has the stream's proportions, to a pixel."""
        kept_rows = max(1, min(rows, round(columns * self.height / self.width)))
        kept_columns = max(1, min(columns, round(rows * self.width / self.height)))
        return kept_rows, kept_columns

    def _inner(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the whole picture inside the stream's."""
        scale = min(self.height / rows, self.width / columns)
        return tuple(  # type: ignore[return-value]
            max(1, min(limit, round(side * scale))) for limit, side in ((self.height, rows), (self.width, columns))
        )


def _scale(rgb: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if rgb.shape[:2] == (height, width):
        return rgb
    planes = rgb.permute(2, 0, 1)[None].float()
    scaled = interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
