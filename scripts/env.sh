# Sourced by the scripts beside it: makes .venv at the repository root and installs mxq into it.
#
# prepare_environment plain|dev     leaves $root and $python set
# prepare_oldest_triton             after it: a second environment, for compiling kernels only
#
# .venv/mxq.stamp records what was installed; while it holds, nothing is downloaded or installed.
# The output of pip goes to .venv/install.log and is shown only if a step fails.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
stamp_file="$root/.venv/mxq.stamp"
log_file="$root/.venv/install.log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

prepare_environment() {
    local extra="$1" digest
    cd "$root"
    make_venv
    digest="$(install_digest)"
    # The dev install holds everything of the plain one.
    case "$(cat "$stamp_file" 2>/dev/null || true)" in
        "$digest $extra" | "$digest dev") return ;;
    esac
    install_packages "$extra"
    echo "$digest $extra" >"$stamp_file"
}

make_venv() {
    if [[ ! -x "$python" ]]; then
        local base_python
        base_python="$(find_python)"
        echo "make .venv with $base_python"
        mkdir -p "$root/.venv"
        logged "$base_python" -m venv "$root/.venv"
    fi
    if ! is_recent "$python"; then
        fail "$root/.venv holds $("$python" --version 2>&1), mxq needs Python 3.11 or newer;" \
            "remove that folder and run this script again"
    fi
    # An interrupted first run, or another tool, leaves an environment without pip.
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        logged "$python" -m ensurepip --upgrade
    fi
}

install_packages() {
    local torch_pin target="."
    torch_pin="$(grep '^torch==' constraints.txt)"
    if [[ "$1" == dev ]]; then target=".[dev]"; fi
    rm -f "$stamp_file"
    # First and by itself: the other packages then accept the build (CPU or CUDA) that is here.
    echo "install $torch_pin (the first time takes minutes)"
    logged "$python" -m pip install --quiet "$torch_pin" -c constraints.txt
    echo "install mxq ($1)"
    logged "$python" -m pip install --quiet -e "$target" -c constraints.txt
}

# .venv/triton-<version> holds that package and nothing else; its own mxq.stamp records the pin.
prepare_oldest_triton() {
    local pin folder
    # There is no build of Triton for other systems, so kernels are not checked there.
    if [[ "$(uname -s)" != Linux ]]; then return; fi
    pin="$(grep '^triton==' scripts/oldest-triton.txt)"
    folder="$root/.venv/triton-${pin#triton==}"
    if [[ "$(cat "$folder/mxq.stamp" 2>/dev/null || true)" == "$pin" ]]; then return; fi
    echo "install $pin into $folder, to compile kernels with"
    rm -rf "$folder"
    logged "$python" -m venv "$folder"
    logged "$folder/bin/python" -m pip install --quiet -r scripts/oldest-triton.txt
    echo "$pin" >"$folder/mxq.stamp"
}

# What an install depends on. The path counts too: an editable install points at it.
install_digest() {
    "$python" - "$root" pyproject.toml constraints.txt <<'PYTHON'
import hashlib
import pathlib
import sys

root, *names = sys.argv[1:]
digest = hashlib.sha256(root.encode())
for name in names:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PYTHON
}

find_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13; do
        if is_recent "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "mxq needs Python 3.11 or newer, and none of python3.11, python3, python3.12, python3.13" \
        "on PATH is; python3 here is: $(python3 --version 2>&1 || true)"
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

logged() {
    if ! "$@" >"$log_file" 2>&1; then
        tail -n 40 "$log_file" >&2
        fail "failed: $*"
    fi
}

fail() {
    echo "error: $*" >&2
    exit 1
}
