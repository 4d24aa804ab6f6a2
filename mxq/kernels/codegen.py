"""Write the Triton source of a group GEMM that has exactly the branches a layer needs.

``render`` is pure and is what golden tests pin. ``build`` writes the file first and imports it
second, because ``@triton.jit`` reads its own source and so refuses functions made by ``exec``.

Each program computes one tile of a table, heaviest first, and the tile's branch number picks the
loop. The grid is a bound on the tiles, so nothing has to be known on the host; programs beyond the
end of the table stop at once. (A persistent loop over tiles gains nothing here, since Triton drains
the load pipeline between tiles, and its loop-invariant addresses of all branches cost registers.)

A loop multiplies weights (the left operand, unpacked in registers) by tokens, so
its result is [128 outputs, tokens]; weights are read once whatever the number of tokens.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from mxq.kernels.branches import (
    branch_arguments,
    branch_name,
    input_arguments,
    needs_unpack,
    render_branch,
)
from mxq.kernels.code_fields import function_name
from mxq.kernels.dequant import render_unpack
from mxq.kernels.device_functions import render_helpers
from mxq.kernels.spec import KernelSpec

ENTRY_POINT = "group_gemm"

TILE_FIELDS = ("branch", "problem", "row0", "nrows", "n0", "unit0", "units", "slices")
"""Columns of the tile table; the last one is ``slice | slices << 8``."""

PROBLEM_FIELDS = ("w_off", "meta_off", "n", "n_pad", "k_pad", "column", "expert", "bias_off")
"""Columns of the problem table."""


def signature(spec: KernelSpec) -> dict[str, str]:
    """Argument names of the kernel with their Triton types, in order."""
    arguments = {
        "y_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "words_ptr": "*u8",
        "meta_ptr": "*i32",
        "bias_ptr": "*fp32",
        "problems_ptr": "*i64",
        "tiles_ptr": "*i32",
        "tile_count_ptr": "*i32",
        "rows_ptr": "*i32",
    }
    for kind in spec.inputs:
        arguments |= input_arguments(kind)
    if any(branch.format.w_bits == 16 for branch in spec.branches):
        arguments["plain_ptr"] = "*bf16"
    return arguments | {"stride_y": "i32", "stride_x": "i32", "stride_slice": "i64"}


def render(spec: KernelSpec) -> str:
    """The module text, a function of nothing but the specification."""
    formats = sorted({branch.format for branch in spec.branches})
    unpacked = {function_name(form): form for form in formats if needs_unpack(form)}
    branches = [render_branch(branch) for branch in spec.branches]
    parts = [_HEADER.format(branches="\n".join(f"    {branch}" for branch in spec.branches))]
    parts += [render_unpack(form, spec.dialect) for _, form in sorted(unpacked.items())]
    parts += [render_helpers(spec, "".join(branches)), *branches]
    parts.append(_render_entry(spec))
    return "\n".join(part.strip("\n") + "\n\n" for part in parts).rstrip("\n") + "\n"


def build(spec: KernelSpec, folder: Path) -> ModuleType:
    """Write the module of a kernel into a folder, if it is not there, and import it."""
    text = render(spec)
    name = f"mxq_kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_bytes() != text.encode():
        _write(path, text)
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    loader.loader.exec_module(module)
    return module


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may build the same kernel: each moves a whole file of its own into place.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as part:
            part.write(text)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _render_entry(spec: KernelSpec) -> str:
    chain = ["branch = tl.load(tile_ptr)"] if len(spec.branches) > 1 else []
    for index, branch in enumerate(spec.branches):
        word = "if" if index == 0 else "elif"
        last = index == len(spec.branches) - 1
        test = "else:" if last and index else f"{word} branch == {index}:"
        call = [
            f"{branch_name(branch)}(",
            *(f"    {name}," for name in branch_arguments(branch.format)),
            ")",
        ]
        chain += call if len(spec.branches) == 1 else [test, *(f"    {line}" for line in call)]
    return _ENTRY.format(
        entry=ENTRY_POINT,
        arguments="\n".join(f"    {name}," for name in signature(spec)),
        chain="\n".join(f"        {line}" for line in chain),
    )


_HEADER = '''
"""Group GEMM. Generated by mxq.kernels.codegen; do not edit.

Branches (weights / tokens of a tile):
{branches}
"""

import triton
import triton.language as tl
'''

_ENTRY = '''
@triton.jit
def {entry}(
{arguments}
):
    """Multiply one tile of the table; programs beyond its end have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(tile_count_ptr):
        tile_ptr = tiles_ptr + tile * 8
        problem_ptr = problems_ptr + tl.load(tile_ptr + 1) * 8
{chain}
'''
