"""How a frozen transformers classifier is cut in two: for training and as the reference answer."""

from revmux_vllm.backbones.llama import LlamaBackbone

__all__ = ["LlamaBackbone"]
