"""Cross-attention without padding: attention over as many keys as the prompt has words.

A prompt padded with zeros to a fixed length (such as 512 tokens) gives all of its padding the same key and the same
value. n equal keys weigh as much as one key with a score log(n) higher, so the words and one padding key give the same
sums. With so few keys attention is memory-bound: one Triton kernel reads the queries once and writes the result
once. It reads the number of keys on the device, so a new prompt does not trigger recompilation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels.few_key_launch import launch_few_keys

# With more keys, the attention backends' own kernels are as fast.
MOST_KEYS = 128


class FewKeys(NamedTuple):
    """How the first keys represent all keys.

    Attributes:
        bias: float32 [128], added to their scores: 0 for words, log(number of tokens of padding) for the key after
            them, -inf for the rest.
        used: int32 [1], keys that are not -inf.
    """

    bias: torch.Tensor
    used: torch.Tensor

    def take(self, other: FewKeys) -> FewKeys:
        """Become `other`, in place."""
        self.bias.copy_(other.bias)
        self.used.copy_(other.used)
        return self


def merge_padding(words: int, text_tokens: int, *, device: torch.device | str = "cpu") -> FewKeys | None:
    """Merge the keys after the first `words` of `text_tokens`, which are all equal, into one.

    Returns:
        None if more than 128 keys remain, or there is no padding.
    """
    if words >= min(MOST_KEYS, text_tokens):
        return None
    bias = torch.full((MOST_KEYS,), -math.inf)
    bias[:words] = 0.0
    bias[words] = math.log(text_tokens - words)
    return FewKeys(bias.to(device), torch.tensor([words + 1], dtype=torch.int32, device=device))


def attend_to_few_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    few: FewKeys,
    kernel: Any = None,  # noqa: ANN401
) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim) + bias) v over the keys used.

    Args:
        query: [1, queries, heads, head_dim].
        key: [1, text tokens, heads, head_dim], contiguous.
        value: the shape of `key`.
        few: the keys used, and their bias.
        kernel: of `FEW_KEY_ATTENTION.load`; None computes it with torch.

    Returns:
        The shape and dtype of `query`.
    """
    if kernel is None:
        used = int(few.used)
        query, key, value = (part.transpose(1, 2) for part in (query, key[:, :used], value[:, :used]))
        bias = few.bias[None, :used].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
    return launch_few_keys(kernel, query.contiguous(), key, value, few.bias, few.used)


def attend_by_frame(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    few: FewKeys,
    frame_tokens: int,
    kernel: Any = None,  # noqa: ANN401
) -> torch.Tensor:
    """`attend_to_few_keys` with a text for each latent frame: the last frame reads the last text, and so on backwards.

    Frames before those that have a text read the first one.

    Args:
        query: [1, queries, heads, head_dim].
        key: [texts, text tokens, heads, head_dim], contiguous.
        value: the shape of `key`.
        few: the keys used of each text, and their bias.
        frame_tokens: queries of one frame.
        kernel: of `FEW_KEY_ATTENTION.load`; None computes it with torch.

    Returns:
        The shape and dtype of `query`.
    """
    texts = min(key.shape[0], query.shape[1] // frame_tokens)
    starts = [0, *(query.shape[1] - frame_tokens * left for left in range(texts - 1, 0, -1)), query.shape[1]]
    keys = min(MOST_KEYS, key.shape[1])
    bias = few.bias[None, :keys].to(query.dtype)
    parts = []
    for place in range(texts):
        part = query[:, starts[place] : starts[place + 1]]
        text = key.shape[0] - texts + place
        one_key, one_value = key[text : text + 1], value[text : text + 1]
        if kernel is None:
            # All keys that could be used, not `int(few.used)`: a compiled layer must not wait for the device.
            rows, seen, said = (each.transpose(1, 2) for each in (part, one_key[:, :keys], one_value[:, :keys]))
            parts.append(F.scaled_dot_product_attention(rows, seen, said, bias).transpose(1, 2))
        else:
            parts.append(launch_few_keys(kernel, part.contiguous(), one_key, one_value, few.bias, few.used))
    return torch.cat(parts, dim=1)
