"""What the frozen backbone says of every row, computed once.

The prefill states feed the adapters and the final vectors teach them; neither changes while
adapters train, so nothing below the cut and no teacher runs in the training loop.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from revmux_vllm.backbones.base import Backbone, LabelWords, batches_by_length, inside
from revmux_vllm.errors import UserError
from revmux_vllm.prompts import render
from revmux_vllm.reference import rows_at, skip_state
from revmux_vllm.terminal import followed
from revmux_vllm.training.data import LabelledText, common_start
from revmux_vllm.training.device import free_memory

TOKENS_PER_BATCH = 4096
LEAST_SHARED = 16
"""Tokens that all rows must begin with to be run once, and not with every row."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Prefill states and the backbone's own answers, on the CPU.

    Attributes:
        hidden: (rows, D), what all sequences begin with, and then what is behind it in each, one
            after the other.
        shared: tokens that all begin with, and that ran once; 0 where they do not.
        starts: (B,) first row of every sequence in ``hidden``, behind these.
        lengths: (B,) tokens of every sequence.
        vectors: (B, D) the pooled vector that the backbone's head reads.
        logits: (B, C) the backbone's answer.
        labels: (B,) int64.
        exits: (B, E, 2, D) bfloat16, what is known after each of E layers (``skip_state``).
    """

    hidden: Tensor
    shared: int
    starts: Tensor
    lengths: Tensor
    vectors: Tensor
    logits: Tensor
    labels: Tensor
    exits: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def padded(self, index: Tensor) -> Tensor:
        """Prefill states (len(index), T, D) of some sequences, zero behind each."""
        lengths = self.lengths[index]
        tokens = inside(lengths, int(lengths.max()))  # (b, T)
        place = torch.arange(tokens.shape[1])
        own = self.starts[index, None] + place - self.shared
        rows = torch.where(place < self.shared, place, own) * tokens
        return self.hidden[rows] * tokens.unsqueeze(-1)


@torch.no_grad()
def extract(
    backbone: Backbone,
    tokenizer: Any,
    data: LabelledText,
    max_tokens: int,
    exit_layers: Sequence[int] = (),
    overflow: Path | None = None,
    template: str | None = None,
) -> Features:
    """Run the backbone over ``data``, longest rows first, with a progress bar.

    Args:
        backbone: on the device to compute on.
        tokenizer: the backbone's.
        data: rows.
        max_tokens: longer rows are cut, with a warning.
        exit_layers: after which layers an early exit is to be trained.
        overflow: folder for prefill states that do not fit into memory.
        template: see ``tokenize``.

    Raises:
        UserError: when they fit nowhere.
    """
    device = next(backbone.layers[0].parameters()).device
    encoded = tokenize(tokenizer, data, max_tokens, template)
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    lengths = torch.tensor([len(row) for row in ids])
    _check_last_tokens(backbone, tokenizer, data, ids)
    if cut := int((lengths == max_tokens).sum()):
        logger.warning("%d of %d rows reach %d tokens and may be cut", cut, len(ids), max_tokens)
    shared = shared_tokens(ids) if backbone.is_causal else 0
    own_lengths = lengths - shared
    starts = shared + own_lengths.cumsum(0) - own_lengths
    size = backbone.hidden_size
    hidden = _buffer(shared + int(own_lengths.sum()), size, overflow)
    vectors = torch.empty(len(ids), size)
    exits = torch.empty(len(ids), len(exit_layers), 2, size, dtype=torch.bfloat16)
    batches = list(batches_by_length(own_lengths, TOKENS_PER_BATCH))
    with _watched(backbone, exit_layers) as seen:
        hidden[:shared], lower_cache, upper_cache = _start(backbone, ids[0][:shared], device)
        before = dict(seen)  # by layer, of what all begin with
        for index in followed(batches, f"backbone over {len(ids):,} rows, batches"):
            own = lengths[index].to(device)
            its_types = None if types is None else _pad(types, index, device, shared)
            low = backbone.lower(_pad(ids, index, device, shared), own, its_types, lower_cache)
            last = backbone.upper(low, own, upper_cache)
            vectors[index] = rows_at(last, backbone.output_position(own) - shared).float().cpu()
            position = backbone.pooled_position(own)
            for place, layer in enumerate(exit_layers):
                state = skip_state(seen[layer], own, position, before.get(layer))
                exits[index, place] = state.bfloat16().cpu()
            low = low.float().cpu()
            for row, i in enumerate(index):
                hidden[starts[i] : starts[i] + own_lengths[i]] = low[row, : own_lengths[i]]
    logits = backbone.head(vectors.to(device)).float().cpu()
    labels = torch.tensor(data.labels)
    return Features(hidden, shared, starts, lengths, vectors, logits, labels, exits)


def _start(backbone: Backbone, ids: list[int], device: torch.device) -> tuple[Tensor, Any, Any]:
    """What all rows begin with, run: its prefill states (P, D), and caches of lower and upper
    layers for what stands behind it; None where it is empty."""
    if not ids:
        return torch.empty(0, backbone.hidden_size), None, None
    caches = [backbone.prefix_cache(first) for first in (0, backbone.prefill_layers)]
    lengths = torch.tensor([len(ids)], device=device)
    low = backbone.lower(torch.tensor([ids], device=device), lengths, cache=caches[0])
    backbone.upper(low, lengths, caches[1])
    return low[0].float().cpu(), *caches


def shared_tokens(ids: list[list[int]]) -> int:
    """How many tokens all rows begin with, and have more; 0 where they are not worth a pass."""
    shared = min(common_start(ids), min(map(len, ids)) - 1)
    return shared if len(ids) > 1 and shared >= LEAST_SHARED else 0


def _check_last_tokens(
    backbone: Backbone, tokenizer: Any, data: LabelledText, ids: list[list[int]]
) -> None:
    """Raise UserError where transformers would not read a decoder's classifier at the last token.

    It reads the last one that is not padding (its GenericForSequenceClassification), vLLM the last.
    """
    padding = backbone.config.pad_token_id
    if backbone.ends.pools_first or isinstance(backbone.classifier, LabelWords) or padding is None:
        return
    for text, row in zip(data.texts, ids, strict=True):
        if row[-1] == padding:
            raise UserError(
                f"{text!r} ends with {tokenizer.convert_ids_to_tokens(padding)!r}, which is the "
                "backbone's padding",
                "transformers would read its answer before that token, vLLM at it",
                cure="give the backbone a padding token that no text has (pad_token_id of its "
                "config), or take the token off the texts",
            )


@contextmanager
def _watched(backbone: Backbone, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The states after some layers, of the last pass."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            hook = _keep(seen, layer)
            stack.callback(backbone.layers[layer - 1].register_forward_hook(hook).remove)
        yield seen


def _keep(seen: dict[int, Tensor], layer: int) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        seen[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def tokenize(
    tokenizer: Any, data: LabelledText, max_tokens: int, template: str | None = None
) -> Any:
    """Token ids of single texts or pairs, and what else the tokenizer gives; not padded.

    Args:
        tokenizer: of transformers.
        data: rows.
        max_tokens: longer rows are cut.
        template: that makes one text of a pair, see ``prompts.render``.

    Raises:
        UserError: naming the row of which the tokenizer makes no token.
    """
    texts: list[list[str]]
    if template is not None:
        pairs: Any = data.texts
        texts = [[_rendered(tokenizer, template, q, d, max_tokens) for q, d in pairs]]
    elif data.pairs:
        texts = [list(side) for side in zip(*data.texts, strict=True)]
    else:
        texts = [list(map(str, data.texts))]
    encoded = tokenizer(*texts, truncation=True, max_length=max_tokens)
    _warn_of_two_starts(tokenizer, encoded["input_ids"])
    for text, ids in zip(data.texts, encoded["input_ids"], strict=True):
        if not ids:
            raise UserError(f"the tokenizer makes no token of {text!r}", cure="drop such rows")
    return encoded


def _rendered(tokenizer: Any, template: str, query: str, document: str, max_tokens: int) -> str:
    """One text of a pair, its document cut where the whole would be: a template ends with what is
    read.

    Raises:
        UserError: where there is no room for any document.
    """
    words = tokenizer(document, add_special_tokens=False)["input_ids"]
    text = render(template, query, document)
    while (beyond := len(tokenizer(text)["input_ids"]) - max_tokens) > 0:
        if not words:
            problem = f"template and query {query!r} alone have {beyond} tokens more"
            raise UserError("`max_tokens`", problem, found=max_tokens, cure="allow more")
        words = words[: max(0, len(words) - beyond)]
        text = render(template, query, tokenizer.decode(words))
    return text


def _warn_of_two_starts(tokenizer: Any, ids: list[list[int]]) -> None:
    """Where a text brings the token that the tokenizer puts before it, as after a chat template."""
    start = tokenizer.bos_token_id
    twice = [i for i, row in enumerate(ids, 1) if start is not None and row[:2] == [start] * 2]
    if twice:
        logger.warning(
            "%d rows begin with %s twice, the first of them row %d: the text has it and the "
            "tokenizer adds one. A server does the same with such a text, but not with `messages`, "
            "which it puts into the chat template itself: for these take it off the texts.",
            *(len(twice), tokenizer.bos_token, twice[0]),
        )


def _pad(rows: list[list[int]], index: Tensor, device: torch.device, first: int) -> Tensor:
    parts = [torch.tensor(rows[i][first:]) for i in index]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)


def _buffer(rows: int, size: int, overflow: Path | None) -> Tensor:
    """Room for float32 (rows, size): in memory if half of what is free will do, else in a file."""
    num_bytes = 4 * rows * size
    sharers = 2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of accelerate launch
    if overflow is None or num_bytes < free_memory() / sharers:
        return torch.empty(rows, size)
    overflow.mkdir(parents=True, exist_ok=True)
    path = overflow / f"prefill-{rows}-{os.getpid()}.bin"
    for stale in overflow.glob(f"prefill-{rows}-*.bin"):  # of a training that was stopped
        if not psutil.pid_exists(int(stale.stem.split("-")[2])):
            stale.unlink()
    if num_bytes > shutil.disk_usage(overflow).free:
        raise UserError(
            f"prefill states of {rows:,} tokens take {num_bytes / 1e9:.1f} GB, which neither "
            f"memory nor {overflow} has",
            cure="train on fewer rows, or on a disk with room",
        )
    return torch.from_file(str(path), shared=True, size=rows * size).view(rows, size)
