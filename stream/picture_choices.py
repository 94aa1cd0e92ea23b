"""How pictures from outside are brought to the stream's size and length, by the names that users choose."""

from __future__ import annotations

# To the stream's size: cut off what does not fit, or add black.
CROP, PAD = FITS = ("crop", "pad")
# After a video's last picture: begin again, repeat the last picture, end the stream.
LOOP, HOLD, STOP = VIDEO_ENDS = ("loop", "hold", "stop")
# How much of a video is replaced, where its colours are to follow the prompt and its movement stays.
MIDDLE_STRENGTH = 0.6
