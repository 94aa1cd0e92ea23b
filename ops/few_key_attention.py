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

from .triton_kernels import runs_kernel_on

# With more keys the tuned kernels of the attention backends are as fast.
MOST_KEYS = 128
_BLOCK_QUERIES = 64
_BLOCK_KEYS = 32


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
        kernel: `load_kernel` of the queries' device; None computes it with torch.

    Returns:
        The shape and dtype of `query`.
    """
    if kernel is None:
        used = int(few.used)
        query, key, value = (part.transpose(1, 2) for part in (query, key[:, :used], value[:, :used]))
        bias = few.bias[None, :used].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
    query = query.contiguous()
    attended = torch.empty_like(query)
    _, queries, heads, head_dim = query.shape
    kernel[(heads, -(-queries // _BLOCK_QUERIES))](
        query,
        key,
        value,
        few.bias,
        few.used,
        attended,
        queries,
        heads,
        SCALE=head_dim**-0.5,
        HEAD_DIM=head_dim,
        BLOCK_QUERIES=_BLOCK_QUERIES,
        BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4,
        num_stages=1,
    )
    return attended


def load_kernel(device: torch.device, head_dim: int) -> Any:  # noqa: ANN401
    """The kernel for heads of `head_dim` on `device`; None where torch has to compute it (no CUDA, no Triton)."""
    power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    if not runs_kernel_on(device) or not power_of_two:
        return None
    # Here, because Triton is not installed on machines without a GPU, and takes a second to import.
    from .few_key_attention_kernel import attend_to_few_keys

    return attend_to_few_keys
