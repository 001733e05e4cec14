"""ELECTRA: BERT's layers behind embeddings of another size, read by a head like RoBERTa's."""

import copy
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.bert import BertEmbedding, BertPoolingModel
from vllm.model_executor.models.utils import WeightsMapper

from revmux_vllm.engine.models.encoder import RevMuxRobertaForSequenceClassification


class ElectraEmbedding(BertEmbedding):
    """Of as many channels as the config says, projected to the layers'."""

    def __init__(self, config: Any) -> None:
        own = copy.copy(config)
        own.hidden_size = config.embedding_size
        super().__init__(own)
        self.project: nn.Module = nn.Identity()
        if config.embedding_size != config.hidden_size:
            self.project = nn.Linear(config.embedding_size, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(num_rows,) both, to (num_rows, D)."""
        projected: Tensor = self.project(super().forward(input_ids, position_ids))
        return projected


class RevMuxElectraForSequenceClassification(RevMuxRobertaForSequenceClassification):
    """BERT's layers, and RoBERTa's head with another activation."""

    trunk_name = "electra"
    embedding_class = ElectraEmbedding
    activation = staticmethod(nn.functional.gelu)
    weights_mapper = BertPoolingModel.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"electra.embeddings_project.": "lower.embeddings.project."}
    )
