"""Classify a Parquet file with Ray Data: an engine in an actor, one batch of rows after another.

``python examples/ray_data_classify.py reviews.parquet answers`` adds the column ``probs``; every
row needs a text. ``revmux batch`` does this for work that may be interrupted.
"""

import argparse
from typing import Any

import ray

from revmux_vllm.engine.in_process import InProcessEngine


class Classifier:
    """An engine, in the actor's own process, so that nothing outlives the actor."""

    def __init__(self, model: str) -> None:
        self.engine = InProcessEngine(model, distributed_executor_backend="uni")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = self.engine.classify(batch["text"].tolist(), cut=True)
        return batch | {"probs": [output.outputs.probs for output in outputs]}


def main() -> None:
    """Read INPUT, classify its column ``text``, write Parquet files to OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--model", default="revmux-llama")
    args = parser.parse_args()
    one_engine = ray.data.ActorPoolStrategy(size=1)
    rows = ray.data.read_parquet(args.input).map_batches(
        Classifier, fn_constructor_args=(args.model,), batch_size=2000, compute=one_engine
    )
    rows.write_parquet(args.output)


if __name__ == "__main__":
    main()
