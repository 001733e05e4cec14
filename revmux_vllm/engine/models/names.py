"""Names of a backbone's weights as transformers reads them, whoever wrote the files."""

from collections.abc import Sequence
from typing import Any

import torch

from revmux_vllm.backbones.loading import model_class

_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}
"""Of norms, in files that are older than PyTorch's own names."""


class BackboneNames:
    """Which weights of a file the backbone has.

    transformers passes over all others, such as a pooler that the classifier does not read.

    Args:
        hf_config: of the backbone.
        label_words: see ``RevMuxConfig``.
    """

    def __init__(self, hf_config: Any, label_words: Sequence[str] | None) -> None:
        with torch.device("meta"):
            model = model_class(hf_config, label_words).from_config(hf_config)
        self._known = set(model.state_dict())
        self._prefix = f"{model.base_model_prefix}."

    def find(self, name: str) -> str | None:
        """What transformers calls the weight ``name`` of a file; None for one that nobody reads."""
        module, _, ending = name.rpartition(".")
        current = f"{module}.{_OLD_ENDINGS.get(ending, ending)}"
        forms = [
            own
            for form in (name, current)
            for own in (form, self._prefix + form, form.removeprefix(self._prefix))
        ]
        beside = [own for own in forms if f"{own.rpartition('.')[0]}.weight" in self._known]
        known = [own for own in forms if own in self._known]
        return next(iter(known + beside), None)  # a quantized one brings more beside the weight
