#!/usr/bin/env bash
# Make an environment for each peer under a folder: peers/make_environments.sh FOLDER [PYTHON]
# torch comes first and by itself, as in scripts/env.sh: the other packages accept the build that is
# there, so one that was installed from a CPU index or a wheel is kept.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:?name the folder of the environments}"
python="${2:-python3}"

for peer in autoround llmcompressor modelopt; do
    if [[ ! -x "$folder/$peer/bin/python" ]]; then "$python" -m venv "$folder/$peer"; fi
    pip=("$folder/$peer/bin/python" -m pip install --quiet)
    "${pip[@]}" "$(grep '^torch==' "$here/$peer.txt")"
    "${pip[@]}" -r "$here/$peer.txt"
done
