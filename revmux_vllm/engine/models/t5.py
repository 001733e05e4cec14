"""T5: composites pass the upper part of the encoder, and one decoder step."""

import copy
import re

from transformers import T5ForConditionalGeneration
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.backbones.base import Backbone
from revmux_vllm.backbones.loading import output_scale
from revmux_vllm.backbones.t5 import T5Backbone
from revmux_vllm.engine.models.padded import RevMuxPaddedForSequenceClassification


class RevMuxT5ForSequenceClassification(RevMuxPaddedForSequenceClassification):
    """Read at the decoder's only position, by label words."""

    embeddings_name = "shared.weight"

    def build_backbone(self, vllm_config: VllmConfig) -> Backbone:
        hf_config = vllm_config.model_config.hf_config
        # One matrix of embeddings: vLLM unties them where it finds another LM head in the files.
        tied = copy.copy(hf_config)
        tied.tie_word_embeddings = True
        self.model = T5ForConditionalGeneration(tied)
        self.build_score(vllm_config)
        self.words_scale = output_scale(hf_config)
        return T5Backbone(self.model, self.bounds[0], self.score)

    def weight_names(self) -> WeightsMapper:
        # Of the LM head the words' rows are ``score``, and the module is tied to the embeddings.
        # Google's own files have one bias too many, which no layer reads.
        unread = re.compile(r"^lm_head\.weight$|EncDecAttention\.relative_attention_bias")
        return WeightsMapper(orig_to_new_regex={unread: None}) | super().weight_names()
