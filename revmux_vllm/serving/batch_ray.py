"""The engines of ``revmux batch``: one in each of Ray Data's workers.

* **Ray Data distributes partitions, not rows.** A worker gets file names and row numbers, reads
  these rows itself, writes the part and returns counts. So the driver holds no texts, and a worker
  that is killed costs the partition it had: Ray starts another, which classifies it again. On more
  than one machine input, output and the model therefore lie on a file system that all of them have.
* **One process per engine**: vLLM's own processes are folded into Ray's worker, so whatever kills
  one of them is seen by Ray, and nothing outlives a killed worker.
* **Workers need this package installed**, and nothing of the driver's.

``ray.data.llm`` would do some of this, but the extra it needs, ``ray[llm]``, pins vLLM 0.29, and
its stages ask for GPUs.
"""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from revmux_vllm.engine.environment import set_for_good
from revmux_vllm.engine.in_process import InProcessEngine
from revmux_vllm.errors import UserError
from revmux_vllm.problems import problem_of
from revmux_vllm.serving.batch import MANIFEST, Partition, Run
from revmux_vllm.serving.cluster import connect
from revmux_vllm.serving.parquet import Slice, read_rows, texts_of, with_answers, write_whole
from revmux_vllm.terminal import unwound_on_sigterm

RETRIES = 3
"""How often a partition is tried again whose worker was killed: it may be what kills it."""


class WorkerFailed(RuntimeError):
    """A worker could not do its work, and why in its own words."""


@dataclass(frozen=True)
class Engines:
    """How many, what each of them has, and where.

    Attributes:
        replicas: engines, one in each worker.
        cpus_per_replica: reserved for an engine; on CPUs also its threads.
        llm_args: options of ``vllm.LLM`` beside the model.
        address: of a running Ray cluster; None starts one.
    """

    replicas: int
    cpus_per_replica: float
    llm_args: dict[str, Any]
    address: str | None

    def __post_init__(self) -> None:
        if self.cpus_per_replica < 0:
            raise UserError("`cpus_per_replica`", expected="0 or more", found=self.cpus_per_replica)

    def gpus(self, resources: dict[str, float]) -> float:
        """Of each engine, on a cluster with these resources.

        Raises:
            UserError: if there is no room for all engines: Ray would wait for it forever.
        """
        gpus = self.llm_args.get("tensor_parallel_size", 1) if resources.get("GPU") else 0
        for kind, each in (("CPU", self.cpus_per_replica), ("GPU", gpus)):
            needed, there = self.replicas * each, resources.get(kind, 0)
            if needed > there:
                raise UserError(
                    f"`replicas` {self.replicas}",
                    f"{needed:g} {kind}s are needed at {each:g} each, and the cluster has "
                    f"{there:g}",
                    cure="ask for fewer replicas, or for less of each",
                )
        return gpus


class Classifier:
    """An engine in a worker of Ray's; called with a partition, it leaves a part in ``output``."""

    def __init__(self, run: Run, output: Path, llm_args: dict[str, Any], threads: int) -> None:
        self.run, self.output, self.llm_args, self.threads = run, output, llm_args, threads
        # Made with the first partition: Ray reports what fails in here with pages of its own.
        self.engine: InProcessEngine | None = None

    def start_engine(self) -> InProcessEngine:
        """The engine, with as many threads as it is to compute with on CPUs.

        Raises:
            UserError: if the output folder is not there on this machine.
        """
        # Before vLLM is imported. On CPUs it would bind all engines of a machine to the same cores.
        set_for_good("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        set_for_good("OMP_NUM_THREADS", str(self.threads))
        if not (self.output / MANIFEST).exists():
            raise UserError(
                f"{self.output} of the driver is not there on a worker's machine",
                cure="OUTPUT has to be a folder that all machines have",
            )
        # None: vLLM chooses, and keeps an engine of one device in this process.
        options = {"distributed_executor_backend": None, **self.llm_args}
        return InProcessEngine(self.run.model, quiet=False, **options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Counts, and when it began: what the driver shows."""
        self.engine = self.engine or self.start_engine()
        config = self.engine.llm.llm_engine.model_config
        began = time.time()
        partition = Partition(row["index"], [Slice(**one) for one in row["slices"]])
        table = pa.concat_tables(read_rows(one) for one in partition.slices)
        texts = texts_of(table[self.run.text_column])
        outputs = self.engine.classify([text for text in texts if text is not None], cut=True)
        answers = iter(outputs)
        probs = [None if text is None else next(answers).outputs.probs for text in texts]
        labels, problem = config.hf_config.id2label, problem_of(config.hf_config)
        answered = with_answers(table, probs, labels, self.run.answer_columns, problem)
        write_whole(answered, partition.part(self.output))
        full = sum(len(output.prompt_token_ids) == config.max_model_len for output in outputs)
        return {"rows": len(table), "full_length": full, "began": began}


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """The one at ``address``, or one that ends with the block.

    Raises:
        UserError: if there is none at ``address``.
    """
    # Each run would begin with a line on arguments of actors, which are Ray Data's own and kept.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("progress", "execution.streaming_executor", "execution.streaming_executor_state"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # said once, by classify
    # Without the workers' logs, which would land on standard output.
    connect(address, logging_level="ERROR", log_to_driver=False)
    try:
        with unwound_on_sigterm():  # in here, because Ray sets a handler of its own
            yield
    finally:
        ray.shutdown()


def classify(
    run: Run, partitions: list[Partition], output: Path, engines: Engines
) -> Iterator[dict[str, Any]]:
    """What ``Classifier`` returns, partition by partition as they are done, inside ``ray_cluster``.

    Raises:
        UserError: if the cluster has no room for the engines.
        WorkerFailed: if a partition cannot be classified.
    """
    cpus = engines.cpus_per_replica
    try:
        gpus = engines.gpus(ray.cluster_resources())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # else a partition has half an hour at most
        # Reading an engine's memory maps every second takes a tenth of its time.
        context.memory_usage_poll_interval_s = None
        # Ray Data has no other way to limit retries; our extra stays below 2.64, which drops it.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        # One partition a block: blocks are what Ray hands out, repeats and reports.
        dataset = ray.data.from_items(
            [asdict(partition) for partition in partitions], override_num_blocks=len(partitions)
        ).map(
            Classifier,
            fn_constructor_args=(run, output, engines.llm_args, max(1, int(cpus))),
            compute=ray.data.ActorPoolStrategy(
                size=min(engines.replicas, len(partitions)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for values in zip(*(column.tolist() for column in batch.values()), strict=True):
                yield dict(zip(batch, values, strict=True))
    except ray.exceptions.RayError as error:
        raise WorkerFailed(said_last(str(error))) from error


def said_last(text: str) -> str:
    """The message that the innermost traceback ends with, or all of a text that has none."""
    lines = text.strip().partition("\n\nThe above exception")[0].splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    start = frames[-1] + 1 if frames else 0
    said = "\n".join(dropwhile(lambda line: line.startswith("  "), lines[start:]))
    return said.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
