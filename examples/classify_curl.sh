#!/usr/bin/env bash
# Ask a running `vllm serve --model revmux-llama`: classify_curl.sh [URL]
set -euo pipefail

url="${1:-http://127.0.0.1:8000}"

ask() {
    curl --silent --show-error --fail "$url/classify" \
        --header 'Content-Type: application/json' \
        --data "{\"model\": \"revmux-llama\", \"input\": \"$1\"}"
    echo
}

ask "A warm, funny and beautifully acted film that I would gladly watch again."
ask "The plot makes no sense and the jokes are painfully dull."
