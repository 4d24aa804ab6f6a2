#!/usr/bin/env bash
# Install mxq into .venv and quantize the model that comes with it to 3 bits per weight.
# Arguments go to the quantize command, e.g. scripts/quickstart.sh --bits 2.5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare_environment plain
output="$root/mxq-demo-3bit"
echo "quantize the demo model into $output"
exec "$python" -m mxq quantize demo --bits 3 --output "$output" --overwrite "$@"
