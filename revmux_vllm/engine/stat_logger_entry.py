"""Lets vLLM find ``RevMuxStatLogger`` where a RevMUX model is served, and nowhere else.

vLLM takes stat loggers from the entry points of group ``vllm.stat_logger_plugins`` alone
(v1/metrics/loggers.py, ``load_stat_logger_plugin_factories``, 0.32). Where any package declares
one, ``AsyncLLM`` collects statistics of every model, also under ``--disable-log-stats``
(v1/engine/async_llm.py). So the package declares none. The config hook offers it in its process: as
the entry point of a distribution that is in no folder, found through ``sys.meta_path``, which is
how importlib.metadata lets others extend its search.

``AsyncLLM`` asks after the hook has run, in the same process. An engine of another model that is
made later in that process finds the entry point too.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

from revmux_vllm import __version__

GROUP = "vllm.stat_logger_plugins"

_NAME = "revmux-vllm-stat-logger"
_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n",
    # Named as the general plugin is, since VLLM_PLUGINS selects by name.
    "entry_points.txt": f"[{GROUP}]\nrevmux = revmux_vllm.engine.metrics:RevMuxStatLogger\n",
}


class _InMemory(Distribution):
    """Metadata without a folder."""

    def read_text(self, filename: str) -> str | None:
        return _FILES.get(filename)

    def locate_file(self, path: object) -> Path:
        return Path(__file__).with_name(str(path))


class _Finder(DistributionFinder):
    """Finds this distribution, and no module."""

    def find_spec(self, *args: object, **kwargs: object) -> None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        return [_InMemory()] if context.name in (None, _NAME) else []


def offer_stat_logger() -> None:
    """From now on vLLM finds our stat logger in this process. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
