"""Everything that wants a GPU, in one command: checks, parity, sync check, throughput, latency.

    python benchmarks/gpu/run.py --help
    python benchmarks/gpu/run.py                                 all of it
    python benchmarks/gpu/run.py --shapes tiny --enforce-eager   minutes, on the CPU build too

``docs/gpu.md`` says what each stage tells, and how vLLM gets to a machine without a network.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The kit is the package `gpu` of the folder above; processes started from here inherit this.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import typer

    from gpu.command import main

    typer.run(main)
