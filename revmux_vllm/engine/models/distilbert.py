"""DistilBERT: BERT's layers and RoBERTa's head under other names, without token types."""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig
from vllm.model_executor.models.bert import BertEmbedding, BertPoolingModel
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.engine.models.base import Layout
from revmux_vllm.engine.models.encoder import RevMuxRobertaForSequenceClassification


class DistilBertEmbedding(BertEmbedding):
    """Without token types."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.token_type_embeddings

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(num_rows,) both, to (num_rows, D)."""
        rows = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        normed: Tensor = self.LayerNorm(rows)
        return normed


class RevMuxDistilBertForSequenceClassification(RevMuxRobertaForSequenceClassification):
    """BERT's layers and RoBERTa's head, both under names of its own."""

    trunk_name = "distilbert"
    embedding_class = DistilBertEmbedding
    activation = staticmethod(torch.relu)
    weights_mapper = BertPoolingModel.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_substr={
            "distilbert.transformer.": "distilbert.encoder.",
            ".attention.q_lin.": ".attention.self.query.",
            ".attention.k_lin.": ".attention.self.key.",
            ".attention.v_lin.": ".attention.self.value.",
            ".attention.out_lin.": ".attention.output.dense.",
            ".sa_layer_norm.": ".attention.output.LayerNorm.",
            ".ffn.lin1.": ".intermediate.dense.",
            ".ffn.lin2.": ".output.dense.",
            ".output_layer_norm.": ".output.LayerNorm.",
        },
        # In this order: the second one's new name begins as the first one's old one.
        orig_to_new_prefix={
            "classifier.": "classifier.out_proj.",
            "pre_classifier.": "classifier.dense.",
        },
    )

    def bert_config(self, hf_config: Any) -> BertConfig:
        """Its norms have BERT's epsilon, whatever the config says."""
        return BertConfig(
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.dim,
            num_attention_heads=hf_config.n_heads,
            intermediate_size=hf_config.hidden_dim,
            hidden_act=hf_config.activation,
            max_position_embeddings=hf_config.max_position_embeddings,
            type_vocab_size=1,
            layer_norm_eps=1e-12,
        )

    def set_token_type_ids(
        self, input_ids: Tensor, token_type_ids: Tensor | None, layout: Layout | None
    ) -> None:
        """Those that a tokenizer brings are passed over, as in transformers."""
