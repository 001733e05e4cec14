"""The seam of vLLM's V2 model runner: the model's own state, which sees every batch.

vLLM asks the model for the class (``get_model_state_cls``, v1/worker/gpu/model_states). Metadata
and slots are rewritten where V1 has them rewritten, in the builder of the composite attention
backend; all that V2 has to say more is which row each request has.
"""

import functools
from typing import Any


@functools.lru_cache
def model_state_class(has_kv_cache: bool) -> type[Any]:
    """vLLM's state for a decoder, or for an encoder, that tells the step its rows."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

    from revmux_vllm.engine.steps import current_step

    base: Any = DefaultModelState if has_kv_cache else EncoderOnlyModelState

    class CompositeModelState(base):
        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            if (step := current_step()) is not None:
                step.take_rows(input_batch.req_ids)
            metadata: dict[str, Any] = super().prepare_attn(input_batch, *args, **kwargs)
            return metadata

    return CompositeModelState
