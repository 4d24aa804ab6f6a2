"""The part of docs/results.md about the machine code of the kernels, from the table of figures."""

from collections.abc import Iterator, Mapping
from typing import Any

from compile_kernels import COMMAND, Case, gemm_cases

from mxq.kernels.spec import ROW_TILE

Rows = Mapping[str, Mapping[str, Any]]


def compiled_sections(file_name: str, table: Mapping[str, Any]) -> list[str]:
    """Tables of formats alone, of mixes, and of the kernels around the products."""
    versions = table["triton"]
    cases = {case.name: case for case in gemm_cases()}
    alone = [case for case in cases.values() if len(case.spec.branches) == 1]
    mixes = [case for case in cases.values() if len(case.spec.branches) > 1]
    others = [name for name in next(iter(versions.values())) if name not in {*cases, "ptxas"}]
    return [
        "## Kernels: machine code",
        "",
        f"`{file_name}`, written by `{COMMAND}`, which needs no GPU: "
        f"{'; '.join(f'Triton {v} with ptxas {_ptxas(rows)}' for v, rows in versions.items())}. "
        f"Cells are in that order, {' / '.join(f'Triton {v}' for v in versions)}, or one number "
        "where all agree. Programs are those that fit on a multiprocessor.",
        "",
        f"Products of one format, sm_90; a tile is tokens x {ROW_TILE} outputs. Instructions are "
        "those of one pass of the loop over K; for a weight, those of one thread:",
        "",
        "| tokens | format | instructions | for a weight | registers | shared KiB | programs |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_alone_line(case, versions) for case in alone),
        "",
        "Products of several formats in one kernel:",
        "",
        "| GPU | tokens | formats | registers | stack bytes | shared KiB | programs |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        *(_mix_line(case, versions) for case in mixes),
        "",
        "Routing, and what runs between the products; a number behind the name is the features of "
        "a token:",
        "",
        "| GPU | kernel | registers | stack bytes | shared KiB | programs |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(_other_line(kernel, versions) for kernel in others),
        "",
    ]


def _ptxas(rows: Rows) -> str:
    names: dict[str, list[str]] = {}
    for arch, version in rows["ptxas"].items():
        names.setdefault(version, []).append(arch)
    return ", ".join(f"{version} ({', '.join(archs)})" for version, archs in names.items())


def _alone_line(case: Case, versions: Mapping[str, Rows]) -> str:
    (branch,) = case.spec.branches
    weights = ROW_TILE * branch.format.step // (32 * case.spec.num_warps)
    counts = [
        next(iter(rows[case.name]["loops"].values()))["instructions"] for rows in versions.values()
    ]
    cells = [
        str(branch.tokens),
        str(branch.format),
        _joined(str(count) for count in counts),
        _joined(f"{count / weights:.2f}" for count in counts),
        *_needs(case.name, versions, "registers", "shared_bytes", "ctas_per_sm"),
    ]
    return f"| {' | '.join(cells)} |"


def _mix_line(case: Case, versions: Mapping[str, Rows]) -> str:
    formats = ", ".join(str(branch.format) for branch in case.spec.branches)
    cells = [f"sm_{case.arch}", str(case.plan.tokens), formats, *_needs(case.name, versions)]
    return f"| {' | '.join(cells)} |"


def _other_line(kernel: str, versions: Mapping[str, Rows]) -> str:
    arch, _, name = kernel.partition("/")
    return f"| {' | '.join([arch, f'`{name}`', *_needs(kernel, versions)])} |"


NEEDS = ("registers", "stack_bytes", "shared_bytes", "ctas_per_sm")


def _needs(kernel: str, versions: Mapping[str, Rows], *keys: str) -> list[str]:
    """What a program takes, all of it or the ``keys`` alone."""
    return [
        _joined(_need(key, rows[kernel][key]) for rows in versions.values())
        for key in keys or NEEDS
    ]


def _need(key: str, value: int) -> str:
    return f"{value / 1024:.1f}" if key == "shared_bytes" else str(value)


def _joined(texts: Iterator[str]) -> str:
    """One text where all are the same."""
    found = list(texts)
    return found[0] if len(set(found)) == 1 else " / ".join(found)
