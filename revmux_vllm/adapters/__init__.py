"""What is trained: how rows become fewer before the upper layers, and answers after them.

The same classes are trained on padded batches (``reference.py``) and served on vLLM's flat batch
(``engine/models``): rows come in and rows go out, and which rows belong together is the plan's
matter. Nothing here knows a sequence, a batch or an engine. A change here changes what checkpoints
hold; the key set of every kind is tested.
"""

from revmux_vllm.adapters.kinds import AdapterLadder, RungAdapter

__all__ = ["AdapterLadder", "RungAdapter"]
