"""A checkpoint folder: what training writes and everything else reads.

    config.json           the backbone's config, our architecture, and the ``revmux`` object
    adapter.safetensors   the adapters' weights alone, every key under ``revmux.``
    report.json           what was measured, if anything was (``revmux eval --json``)
    model.safetensors     the backbone, unless ``revmux.backbone`` names where it is
    tokenizer files, README.md (the model card)

The keys carry a prefix because vLLM reads every safetensors file of a folder into one stream. A
change of what lies in the folder raises ``config.FORMAT_VERSION``.
"""

from revmux_vllm.checkpoint.files import (
    ADAPTER_FILE,
    KEY_PREFIX,
    REPORT_FILE,
    WORK_FOLDER,
)
from revmux_vllm.checkpoint.reading import (
    adapter_dtype,
    backbone_folder,
    backbone_shape,
    load_adapters,
    meta_ladder,
    named_backbone,
    plain_backbone,
    read_config,
    read_contracts,
    read_measured,
    read_report,
    validate,
)
from revmux_vllm.checkpoint.writing import (
    check_output,
    save,
    weight_files,
    write_card,
    write_contract,
    write_whole,
)

__all__ = [
    "ADAPTER_FILE",
    "KEY_PREFIX",
    "REPORT_FILE",
    "WORK_FOLDER",
    "adapter_dtype",
    "backbone_folder",
    "backbone_shape",
    "check_output",
    "load_adapters",
    "meta_ladder",
    "named_backbone",
    "plain_backbone",
    "read_config",
    "read_contracts",
    "read_measured",
    "read_report",
    "save",
    "validate",
    "weight_files",
    "write_card",
    "write_contract",
    "write_whole",
]
