"""The families of backbones, a row each: everything that differs between them and is no code.

Adding a family is a row here, a class in ``backbones/`` and one in ``engine/models/`` (those of a
family of the same shape may do), and tests. Importing this needs neither torch nor vLLM: classes
are named, and loaded where they are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Ends

LABEL_WORDS, OWN_HEAD, TENSOR_PARALLEL, FLOAT16 = (
    "label_words",
    "own_head",
    "tensor_parallel",
    "float16",
)
"""What a family may refuse: to answer with words, with a head of its own, in several processes, in
half precision."""


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        model_type: of the backbone's ``config.json``.
        backbone: class that cuts the transformers model, ``module:Class``.
        engine_model: class that vLLM runs, ``module:Class``; its name is the architecture.
        word_model: auto class of transformers that reads a backbone that answers with words.
        ends: which tokens of a sequence are not like the others.
        has_kv_cache: vLLM keeps keys and values in pages.
        positions_behind_padding: positions count from behind the padding token's id.
        nce_weight: the paper's weight of InfoNCE.
        size_keys: of ``config.json``, for the channels of a row and for the number of layers.
        vllm_name: of the family where vLLM does not find transformers' classifier by its own; None
            where vLLM alone serves none.
        refuses: what cannot work, to the reason and the cure.
    """

    model_type: str
    backbone: str
    engine_model: str
    word_model: str = "AutoModelForCausalLM"
    ends: Ends = Ends()  # noqa: RUF009  frozen
    has_kv_cache: bool = True
    positions_behind_padding: bool = False
    nce_weight: float = 0.5
    size_keys: tuple[str, str] = ("hidden_size", "num_hidden_layers")
    vllm_name: str | None = ""
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Under ``architectures`` of a checkpoint's ``config.json``, and in vLLM's registry."""
        return self.engine_model.partition(":")[2]

    @property
    def plain_architecture(self) -> str | None:
        """vLLM's own class for the backbone alone; None where it has none."""
        if self.vllm_name is None:
            return None
        if self.vllm_name:
            return f"{self.vllm_name}ForSequenceClassification"
        return self.architecture.removeprefix("RevMux")

    def load_backbone_class(self) -> Any:
        """The class that ``backbone`` names."""
        return resolve_name(self.backbone)


def _decoder(model_type: str, name: str, vllm_name: str = "") -> Family:
    return Family(
        model_type,
        backbone="revmux_vllm.backbones.decoder:DecoderBackbone",
        engine_model=f"revmux_vllm.engine.models.decoder:RevMux{name}ForSequenceClassification",
        ends=Ends(has_sink=True),
        vllm_name=vllm_name,
    )


def _encoder(
    model_type: str, name: str, backbone: str = "Encoder", module: str = "encoder", **more: Any
) -> Family:
    return Family(
        model_type,
        backbone=f"revmux_vllm.backbones.encoder:{backbone}Backbone",
        engine_model=f"revmux_vllm.engine.models.{module}:RevMux{name}ForSequenceClassification",
        ends=Ends(pools_first=True),
        has_kv_cache=False,
        refuses={LABEL_WORDS: f"a {model_type} classifier has a head of its own; leave it out"},
        **more,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        _encoder("bert", "Bert", nce_weight=0.25),
        _encoder("roberta", "Roberta", positions_behind_padding=True),
        _encoder("xlm-roberta", "XLMRoberta", positions_behind_padding=True),
        _encoder("electra", "Electra", module="electra", vllm_name=None),
        _encoder(
            "distilbert",
            "DistilBert",
            backbone="DistilBert",
            module="distilbert",
            size_keys=("dim", "n_layers"),
            vllm_name=None,
        ),
        Family(
            "modernbert",
            backbone="revmux_vllm.backbones.modernbert:ModernBertBackbone",
            engine_model="revmux_vllm.engine.models.modernbert"
            ":RevMuxModernBertForSequenceClassification",
            ends=Ends(pools_first=True),
            has_kv_cache=False,
            refuses={
                LABEL_WORDS: "a modernbert classifier has a head of its own; leave it out",
                TENSOR_PARALLEL: "vLLM's ModernBERT layers do not share their heads out; use 1, "
                "and --data-parallel-size or replicas to scale out",
            },
        ),
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _decoder("ministral", "Ministral", vllm_name="Mistral"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _decoder("gemma", "Gemma"),
        _decoder("gemma3_text", "Gemma3Text", vllm_name="Gemma3"),
        Family(
            "deberta-v2",  # and v3, which is another training of it
            backbone="revmux_vllm.backbones.deberta:DebertaV2Backbone",
            engine_model="revmux_vllm.engine.models.deberta"
            ":RevMuxDebertaV2ForSequenceClassification",
            ends=Ends(pools_first=True),
            has_kv_cache=False,
            vllm_name=None,
            refuses={
                LABEL_WORDS: "a deberta-v2 classifier has a head of its own; leave it out",
                TENSOR_PARALLEL: "transformers' DeBERTa runs in one process; use 1, and "
                "--data-parallel-size or replicas to scale out",
                # Products with positions are divided after they are summed up. So once were those
                # of content, and mDeBERTa overflowed (microsoft/DeBERTa, issue 77).
                FLOAT16: "DeBERTa may overflow in float16; --dtype bfloat16 or float32 is the cure",
            },
        ),
        Family(
            "t5",
            backbone="revmux_vllm.backbones.t5:T5Backbone",
            engine_model="revmux_vllm.engine.models.t5:RevMuxT5ForSequenceClassification",
            word_model="AutoModelForSeq2SeqLM",
            has_kv_cache=False,
            size_keys=("d_model", "num_layers"),
            vllm_name=None,
            refuses={
                OWN_HEAD: "a T5 backbone answers with words: give `label_words`, one word per "
                "class. T5ForSequenceClassification is not supported: it reads the whole text a "
                "second time in its decoder, which a composite cannot",
                TENSOR_PARALLEL: "transformers' T5 runs in one process; use 1, and "
                "--data-parallel-size or replicas to scale out",
                # Its feed-forward layers do, and float16 is what vLLM takes for a float32 model.
                FLOAT16: "T5 overflows in float16; --dtype bfloat16 or float32 is the cure",
            },
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a ``model_type``.

    Raises:
        UserError: listing those that are supported.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
