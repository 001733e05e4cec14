"""Which text of a pair each token is of.

Token types ride in a high bit of the ids, as vLLM's own BERT has it. A request of `/score` brings
them. Texts of `/classify` bring none, and get them by their first separator.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.model_executor.models.bert import _encode_token_type_ids

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.models.base import Layout


def separator_of_pairs(model_config: Any, revmux: RevMuxConfig) -> int | None:
    """The token between the texts of a pair; None where texts come singly, or types are not told
    apart."""
    if not revmux.pairs or getattr(model_config.hf_config, "type_vocab_size", 0) < 2:
        return None
    tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
    if "token_type_ids" not in tokenizer.model_input_names:
        return None
    separator: int | None = tokenizer.sep_token_id
    assert separator is not None, "token types, and no separator between texts"
    return separator


def write_token_types(
    input_ids: Tensor, brought: Tensor | None, separator: int | None, layout: Layout | None
) -> None:
    """Write into ``input_ids`` (num_rows,) the types that each sequence brings, or has by its
    first separator.

    Args:
        input_ids: may be padded behind the batch's tokens.
        brought: (num_tokens,), zeros of a sequence that brings none beside one that does; None
            where none does.
        separator: see ``separator_of_pairs``.
        layout: None while vLLM profiles.
    """
    types = brought
    if separator is not None and layout is not None:
        types = pair_token_type_ids(input_ids, separator, layout)
        if brought is not None:
            types = _chosen(brought, types, layout)
    if types is not None:
        _encode_token_type_ids(input_ids, types)


def pair_token_type_ids(input_ids: Tensor, separator: int, layout: Layout) -> Tensor:
    """Token types (num_rows,) of pairs: 1 behind the first separator of a sequence, else 0."""
    is_separator = (input_ids == separator).int()
    before = is_separator.cumsum(0, dtype=torch.int32) - is_separator
    at_start = before[layout.sequence_starts][layout.sequence_of_token]
    types = torch.zeros_like(is_separator)
    types[: layout.num_tokens] = (before[: layout.num_tokens] > at_start).int()
    return types


def _chosen(brought: Tensor, guessed: Tensor, layout: Layout) -> Tensor:
    """Token types (num_rows,) as a sequence brings them, and ``guessed`` where it brings none."""
    own = layout.sequence_of_token
    count = torch.zeros(len(layout.sequence_starts), dtype=brought.dtype, device=brought.device)
    brings = count.index_add(0, own, brought[: layout.num_tokens])[own] > 0
    chosen = guessed.clone()
    there = torch.where(brings, brought[: layout.num_tokens], guessed[: layout.num_tokens])
    chosen[: layout.num_tokens] = there
    return chosen
