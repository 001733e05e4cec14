"""Cut in two and put together, every family gives transformers' own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_backbone, tiny_config
from word_tokenizers import VOCAB_SIZE, word_tokenizer

from revmux_vllm.adapters.kinds import AdapterLadder
from revmux_vllm.backbones.base import inside
from revmux_vllm.backbones.decoder import DecoderBackbone
from revmux_vllm.backbones.loading import check_family, label_tokens, load_backbone
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError
from revmux_vllm.families import FAMILIES
from revmux_vllm.reference import classify, rows_at
from revmux_vllm.rungs import Rung, parse_rungs

WORDS = ["w7", "w8", "w9"]
LENGTHS = torch.tensor([9, 1, 5])


def whole_and_cut(family: str, folder: Path, cut: int, words: Any = None) -> tuple[Any, Any]:
    save_backbone(family, folder, words is not None)
    if not words:
        loader: Any = transformers.AutoModelForSequenceClassification
    elif family.startswith("t5"):
        loader = transformers.AutoModelForSeq2SeqLM
    else:
        loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder).eval(), load_backbone(folder, cut, words)


def run(backbone: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    states = backbone.upper(backbone.lower(ids, LENGTHS, **inputs), LENGTHS)
    return backbone.head(rows_at(states, backbone.output_position(LENGTHS)))


@pytest.mark.parametrize(
    "family",
    [
        *(name for name in FAMILIES if name != "t5"),
        *("modernbert-mean", "deberta-v2-rich", "deberta-v2-absolute"),
    ],
)
@pytest.mark.parametrize("cut", [1, 3])
@torch.no_grad()
def test_a_classifier_keeps_its_logits(family: str, cut: int, tmp_path: Path) -> None:
    whole, backbone = whole_and_cut(family, tmp_path, cut)
    tokens = inside(LENGTHS, 9)
    ids = torch.randint(2, VOCAB_SIZE, (3, 9)) * tokens + ~tokens * whole.config.pad_token_id
    inputs: dict[str, Any] = {}
    if family in ("bert", "electra", "deberta-v2-rich"):
        inputs["token_type_ids"] = (torch.arange(9) > 2).long().expand(3, -1)
    expected = whole(input_ids=ids, attention_mask=tokens.long(), **inputs).logits
    torch.testing.assert_close(run(backbone, ids, **inputs), expected, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.num_layers == 4
    assert backbone.train().training is False


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "t5", "t5-v1.1"])
@torch.no_grad()
def test_label_words_are_scored_by_the_lm_head(family: str, tmp_path: Path) -> None:
    whole, backbone = whole_and_cut(family, tmp_path, 2, WORDS)
    tokens = inside(LENGTHS, 9)
    ids = torch.randint(2, VOCAB_SIZE, (3, 9)) * tokens
    if family.startswith("t5"):
        start = torch.full((3, 1), whole.config.decoder_start_token_id)
        out = whole(input_ids=ids, attention_mask=tokens, decoder_input_ids=start)
        logits = out.logits[:, 0]
    else:
        logits = rows_at(whole(input_ids=ids).logits, LENGTHS - 1)
    expected = logits[:, label_tokens(word_tokenizer(), WORDS)]
    torch.testing.assert_close(run(backbone, ids), expected, atol=1e-5, rtol=1e-4)


def within(window: int | None, family: str, folder: Path) -> Any:
    """A backbone of five layers, some of which attend to ``window`` rows."""
    save_backbone(family, folder, num_layers=5)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.sliding_window == 24
    config.sliding_window = window
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, config=config)


@pytest.mark.parametrize(
    "family", ["mistral", "ministral", "qwen2-windows", "qwen3-windows", "gemma3_text"]
)
@torch.no_grad()
def test_windows_stay_with_their_layers(family: str, tmp_path: Path) -> None:
    lengths = torch.tensor([60, 1, 31])
    tokens = inside(lengths, 60)
    ids = torch.randint(2, VOCAB_SIZE, (3, 60)) * tokens
    given = {"input_ids": ids, "attention_mask": tokens.long()}
    expected = within(24, family, tmp_path)(**given).logits
    for cut in (1, 2, 4):
        backbone = load_backbone(tmp_path, cut)
        states = backbone.upper(backbone.lower(ids, lengths), lengths)
        got = backbone.head(rows_at(states, backbone.output_position(lengths)))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    wider = within(40, family, tmp_path)(**given).logits
    assert (wider - expected).abs().amax(-1)[[0, 2]].min() > 1e-3, "of long texts it is seen"


@pytest.mark.parametrize(("rung", "last_unseen"), [("alone", 32), ("mux:2", 32), ("merge:2", 29)])
def test_a_window_above_the_cut_counts_rows(rung: str, last_unseen: int) -> None:
    """Of 4 rows: the last of 40 tokens sees 4 tokens, or itself and 3 rows of 2; each of these has
    seen 3 tokens more below the cut."""
    torch.manual_seed(0)
    config = tiny_config("mistral", 64, 2, 3)
    config.sliding_window = 4
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    rungs = parse_rungs(["mux:2", "merge:2"])
    ladder = AdapterLadder(
        RevMuxConfig(rungs, prefill_layers=1, adapter_hidden_size=48, skip=False), 64
    ).eval()
    backbone = DecoderBackbone(model, 1)

    def answer(changed: int | None) -> torch.Tensor:
        text = [7 + (place == changed) for place in range(40)]
        if rung == "mux:2":
            return classify(backbone, ladder, [text, [9] * 40], [(0, 1)], [Rung(1, 2)])[:1]
        return classify(backbone, ladder, [text], [(0,)], [Rung(2 if rung != "alone" else 1)])

    assert torch.equal(answer(last_unseen), answer(None))
    assert not torch.equal(answer(last_unseen + 1), answer(None))


def test_a_word_of_several_tokens_is_named() -> None:
    with pytest.raises(ValueError, match=r"'w7 w8' is 2 tokens, \['w7', 'w8'\]"):
        label_tokens(word_tokenizer(), ["w7 w8", "w9"])
    with pytest.raises(ValueError, match="not different tokens"):
        label_tokens(word_tokenizer(), ["w7", "w7"])


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("t5", None, "give label_words, one word per class"),
        ("bert", WORDS, "has a head of its own"),
        ("gpt2", None, "'gpt2' is not supported; supported are bert, roberta, "),
    ],
)
def test_what_cannot_be_cut_is_refused(
    family: str, words: Any, message: str, tmp_path: Path
) -> None:
    save_backbone(family, tmp_path, words is not None)
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, 1, words)


@pytest.mark.parametrize("task", ["TokenClassification", "QuestionAnswering", "MultipleChoice"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_models_of_other_tasks_are_refused(family: str, task: str) -> None:
    """Some of them have the weights of a classifier, under the same names."""
    config = tiny_config(family, 64, 4, 2)
    loader: Any = getattr(transformers, f"AutoModelFor{task}")
    with torch.device("meta"):
        config.architectures = [type(loader.from_config(config)).__name__]
    with pytest.raises(UserError, match=rf"For{task} in config\.json: it ") as error:
        check_family(config)
    assert error.value.cure
    config.architectures = None  # of a config that somebody wrote
    check_family(config)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention in"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping in"),
        # transformers would pass over it, and vLLM's layers would not.
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "no sliding_attention in a llama"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(
    family: str, more: dict[str, Any], message: str
) -> None:
    config = tiny_config(family, 64, 4, 3)
    config.update(more)
    with pytest.raises(ValueError, match=message):
        check_family(config)
