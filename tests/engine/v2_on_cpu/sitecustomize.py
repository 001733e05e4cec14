"""Lets vLLM's V2 model runner run on a CPU, through Triton's interpreter.

Python imports a module of this name at its start, in every process whose PYTHONPATH has this
folder. vLLM's CPU build uses Triton only where Triton has a backend for CPUs, and the V2 runner
needs Triton. With TRITON_INTERPRET=1 no backend is asked for anything but whether it is there.
"""

import importlib.util
import types

if importlib.util.find_spec("triton"):
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))
