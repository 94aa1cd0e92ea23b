"""Attention over as many keys as a prompt has words: cross-attention without its padding.

A prompt padded with zeros to a fixed length (such as 512 tokens) gives all of its padding the same key and the same
value. n equal keys weigh as much as one whose score is log(n) higher, so the words and one key of padding give the same
sums. With so few keys attention is bound by memory: one Triton kernel reads the queries once and writes the result
once. It reads the number of keys on the device, so a new prompt compiles nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels.few_key_launch import launch_few_keys

# With more keys the tuned kernels of the attention backends are as fast.
MOST_KEYS = 128


class FewKeys(NamedTuple):
    """How the first keys stand for all of them.

    Attributes:
        bias: float32 [128], added to their scores: 0 for words, log(number of tokens of padding) for the key behind
            them, -inf for the rest.
        used: int32 [1], keys that are not -inf.
    """

    bias: torch.Tensor
    used: torch.Tensor


def merge_padding(words: int, text_tokens: int, *, device: torch.device | str = "cpu") -> FewKeys | None:
    """Merge the keys behind the first `words` of `text_tokens`, which are all equal, into one.

    Returns:
        None where that leaves more than 128 keys, or there is no padding.
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
        few: which keys, and their bias.
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
