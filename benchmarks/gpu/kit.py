"""One run of the kit: the order of the stages, and what they share."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

from gpu import bench, parity, sync
from gpu.checks import Checks, judge_choices, judge_device, judge_imports, judge_plugin
from gpu.child import Child, run_in_child
from gpu.engines import engine_options
from gpu.report import markdown
from gpu.results import Item, Outcome, Results, Skipped
from gpu.settings import CHECK, DTYPES, FAMILIES, LATENCY, PARITY, SYNC, THROUGHPUT, Settings
from gpu.shapes import Shape

CHECK_S, ENGINES_S = 300.0, 600.0
"""The longest that a check, and an item that starts engines, may take."""


class Kit:
    """One run of the kit: its settings, what came of it so far, and what its stages share.

    Args:
        settings: the options.
        facts: of the run; the checks add theirs.
        progress: where the items are shown.
    """

    def __init__(self, settings: Settings, facts: dict[str, Any], progress: Progress) -> None:
        self.settings, self.facts, self.progress = settings, facts, progress
        self.results = Results(self._tell, settings.minutes)
        self.logs = settings.out / "logs"
        self.is_gpu = False

    def report(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {**self.facts, "items": self.results.as_list()}

    def _tell(self, item: Item) -> None:
        """Show an item, and write the report as it is now: whoever ends the kit keeps that."""
        self.progress.console.print(
            f"{item.stage}: {item.name}: {item.status}, {item.says} ({item.seconds:.0f} s)",
            highlight=False,
        )
        write_report(self.report(), self.settings.out)

    def options(self, **more: Any) -> dict[str, Any]:
        """Of an engine."""
        share, eager = self.settings.memory_share, self.settings.enforce_eager
        return engine_options(self.is_gpu, share, eager, **more)

    def run(self) -> None:
        """All stages, in order."""
        task = self.progress.add_task("stages", total=len(self.settings.stages))
        works = self._check()  # also where it was not asked for: the others need what it finds
        for stage, action in ((PARITY, self._parity), (SYNC, self._sync)):
            if stage in self.settings.stages:
                if works:
                    action()
                else:
                    self.results.skip(stage, "all", "the check failed")
                self.progress.advance(task)
        if {THROUGHPUT, LATENCY} & set(self.settings.stages):
            for shape in self.settings.shapes_on(self.is_gpu) if works else []:
                self._bench(shape)
            if not works:
                self.results.skip(THROUGHPUT, "all", "the check failed")
        self.progress.update(task, completed=len(self.settings.stages))

    def _check(self) -> bool:
        """Whether anything else can work."""
        judges: dict[str, Callable[[dict[str, Any]], Outcome]] = {
            "imports": judge_imports,
            "device": judge_device,
            "plugin": judge_plugin,
            "choices": lambda found: judge_choices(found, self.is_gpu),
        }
        found: list[dict[str, Any] | None] = []
        child: Child | None = None

        def asked(name: str) -> Outcome:
            nonlocal child
            timeout_s = self.results.left_s(CHECK_S)
            child = child or Child(Checks, log=self.logs / "check.log", timeout_s=timeout_s)
            return judges[name](child.call(name, timeout_s=timeout_s))

        try:
            for name in judges:
                facts = self.results.attempt(CHECK, name, lambda: asked(name))  # noqa: B023
                found.append(facts)
                self.facts |= facts or {}
                self.is_gpu = bool(self.facts.get("is_gpu"))
        finally:
            if child is not None:
                child.close()
        return None not in found

    def _parity(self) -> None:
        for family in FAMILIES:
            for dtype in DTYPES:
                self._compare(family, dtype)

    def _compare(self, family: str, dtype: str) -> None:
        """Two items of one run: against the reference, and alone against plain vLLM."""
        tolerance = parity.TOLERANCES["gpu" if self.is_gpu else "cpu", dtype]
        log = self.logs / f"parity-{family}-{dtype}.log"
        options = self.options(dtype=dtype, kv_cache_memory_bytes=128 << 20)
        found: dict[str, Any] = {}

        def compared() -> Outcome:
            given = (parity.compare, family, options)
            found.update(run_in_child(*given, log=log, timeout_s=self.results.left_s(ENGINES_S)))
            return parity.judge(found, tolerance)

        def alone() -> Outcome:
            if not found:
                raise Skipped("nothing to compare")
            return parity.judge_alone(found, tolerance)

        self.results.attempt(PARITY, f"{family}, {dtype}", compared)
        self.results.attempt(PARITY, f"{family}, {dtype}, alone", alone)

    def _sync(self) -> None:
        dtype = "bfloat16" if self.is_gpu else "float32"
        options = self.options(dtype=dtype, kv_cache_memory_bytes=128 << 20)
        if self.is_gpu:
            log = self.logs / "sync-plain.log"
            self.results.attempt(
                SYNC,
                "plain vLLM",
                lambda: sync.check_plain(options, log, self.results.left_s(ENGINES_S)),
            )
        self.results.attempt(
            SYNC,
            "RevMUX",
            lambda: sync.check_ours(
                options, self.logs, self.results.left_s(ENGINES_S), self.is_gpu
            ),
        )

    def _bench(self, shape: Shape) -> None:
        """Throughput and latency of a shape, with the same engines."""
        pair: bench.Pair | None = None
        dtype = "bfloat16" if self.is_gpu else "float32"
        options = self.options(
            dtype=dtype, load_format="dummy", max_model_len=max(self.settings.lengths)
        )

        def started() -> bench.Pair:
            nonlocal pair
            if pair is None:
                folder = Path(tempfile.mkdtemp(prefix="shape-", dir=root))
                given = (shape, self.settings.rungs, options, folder, self.logs)
                pair = bench.Pair(*given, self.results.left_s)
                self.facts[f"engines_{shape.name}"] = pair.facts()
            return pair

        def attempted(stage: str, name: str, action: Callable[[], Outcome]) -> Any:
            nonlocal pair
            failures = len(self.results.failed)
            details = self.results.attempt(stage, name, action)
            if len(self.results.failed) > failures and pair is not None:
                pair.close()  # the next item starts anew
                pair = None
            return details

        with tempfile.TemporaryDirectory(prefix="revmux-gpu-") as root:
            try:
                self._bench_stages(shape, started, attempted)
            finally:
                if pair is not None:
                    pair.close()

    def _bench_stages(
        self,
        shape: Shape,
        started: Callable[[], bench.Pair],
        attempted: Callable[[str, str, Callable[[], Outcome]], Any],
    ) -> None:
        settings, rates = self.settings, {}
        for length in settings.lengths if THROUGHPUT in settings.stages else ():

            def throughput(length: int = length) -> Outcome:
                given = (length, settings.rounds, settings.seed, self.progress)
                return started().throughput(*given)

            found = attempted(THROUGHPUT, f"{shape.name}, {length} tokens", throughput)
            if found:
                rates[length] = found["plain_requests_per_s"]
        if LATENCY not in settings.stages:
            return
        length = settings.latency_length()

        def latency() -> Outcome:
            engines = started()
            capacity = rates.get(length) or engines.capacity(length, settings.seed)
            task = self.progress.add_task("quarter load", total=len(bench.VISITS))
            given = (length, capacity, settings.latency_s, settings.seed)
            return engines.latency(*given, lambda: self.progress.advance(task))

        attempted(LATENCY, f"{shape.name}, {length} tokens", latency)


def write_report(report: dict[str, Any], out: Path) -> None:
    """``report.json`` and ``report.md``."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, default=str) + "\n"
    (out / "report.json").write_text(text, encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
