"""Kernels compiled for GPUs that are not here, held to limits and to the committed table.

Two versions of Triton compile everything once, in batches that pytest's workers share: a worker
takes a batch that nobody works on, and waits only when none is left. The limits are those of
docs/kernels.md; the table is REGRESSION and says how it is written anew.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import compile_kernels
from compiled_page import compiled_sections

from mxq.kernels.branches import branch_name
from mxq.kernels.figures import (
    CompileFailure,
    KernelFigures,
    compile_outcomes,
    outcome_from_json,
)
from mxq.kernels.offline import KernelRequest
from mxq.search.figures import load_figures

ROOT = Path(__file__).resolve().parents[2]

# A loop may grow by this much before the table has to be written anew: the compiler's schedule
# moves by an instruction or two when code next to the loop changes.
GROWTH = 0.03
GROWTH_INSTRUCTIONS = 2

# Instructions of a thread for one weight in the loop over K, sm_90, 16 tokens, 4 warps. At 4.3 TB/s
# and 1.9 GHz one of the 132 multiprocessors of an H200 reads 17.1 bytes in a cycle and issues 128
# instructions of threads: at full bandwidth it has 7.5 of them for 8 bits, 3.7 for 4, 2.8 for 3 and
# 1.9 for 2. Weights of 2 and 3 bits need more than that, so their limits only stop them growing.
MOST_PER_WEIGHT = {
    "w8a16_g128": 5.5,
    "w4a16_g128": 3.3,
    "w3a16_g128": 3.5,
    "w2a16_g128": 3.0,
    "w8a8_grow": 0.8,
    "w4a8_grow": 1.1,
}

# Programs on a multiprocessor that hide each other's waits, for the mix of six.
LEAST_PROGRAMS = {"decode": 3, "middle": 2, "prefill": 1}

HOPPER_INSTRUCTIONS = {
    "bf16": ("HGMMA", "BF16"),
    "int8": ("IGMMA", "S8"),
    "fp8": ("QGMMA", "E4M3"),
}


CASES = {case.name: case for case in compile_kernels.gemm_cases()}
STATIC = {request.name: request for request in compile_kernels.static_requests()}


@dataclass(frozen=True, slots=True)
class Compiled:
    """The outcomes of one version of Triton, as files in a folder that the workers share."""

    python: Path
    folder: Path

    def figures(self, names: Sequence[str]) -> list[KernelFigures]:
        """Figures of the kernels that compile; one test reports those that do not."""
        found = self.outcomes(names)
        return [outcome for outcome in found if isinstance(outcome, KernelFigures)]

    def outcomes(self, names: Sequence[str]) -> list[KernelFigures | CompileFailure]:
        batches = [pair for pair in enumerate(_batches()) if not set(names).isdisjoint(pair[1])]
        for waits in (False, True):
            for number, batch in batches:
                self._compile(number, batch, waits=waits)
        texts = (self._result(number).read_text() for number, _ in batches)
        values = {value["name"]: value for text in texts for value in json.loads(text)}
        return [outcome_from_json(values[name]) for name in names]

    def _compile(self, number: int, batch: Sequence[str], *, waits: bool) -> None:
        result = self._result(number)
        if result.exists():
            return
        with _locked(result.with_suffix(".lock"), waits=waits) as is_mine:
            if is_mine and not result.exists():
                requests = [_request(name, self.folder) for name in batch]
                outcomes = compile_outcomes(requests, self.python)
                part = result.with_suffix(".part")
                part.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
                part.replace(result)

    def _result(self, number: int) -> Path:
        return self.folder / f"{number}.json"


def _request(name: str, folder: Path) -> KernelRequest:
    return CASES[name].request(folder) if name in CASES else STATIC[name]


def _batches() -> Iterator[list[str]]:
    """Names of kernels, in lots that take about equally long: some 10 seconds."""
    batch, branches = [], 0
    for name in (*CASES, *STATIC):
        batch.append(name)
        branches += len(CASES[name].spec.branches) if name in CASES else 1
        if branches >= 12:
            yield batch
            batch, branches = [], 0
    if batch:
        yield batch


@contextmanager
def _locked(path: Path, *, waits: bool) -> Iterator[bool]:
    """Whether this process holds the lock; it is another's only if it does not wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@pytest.fixture(scope="session", params=["current", "oldest"])
def compiled(request, tmp_path_factory) -> Compiled:
    oldest = compile_kernels.oldest_python()
    python = Path(sys.executable) if request.param == "current" else oldest
    if not python.is_file():
        pytest.fail(f"{python} is missing; scripts/test.sh makes it")
    base = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in that of the run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"compiled-{request.param}"
    folder.mkdir(exist_ok=True)
    return Compiled(python, folder)


def hopper_loops(compiled: Compiled) -> Iterator[tuple]:
    """(name, branch, its loop) of every branch of every kernel for sm_90."""
    names = [name for name, case in CASES.items() if case.arch == 90]
    for figures in compiled.figures(names):
        loops = {loop.function: loop for loop in figures.matrix_loops}
        for branch in CASES[figures.name].spec.branches:
            if branch_name(branch) in loops:
                yield figures.name, branch, loops[branch_name(branch)]


def test_every_kernel_compiles(compiled):
    outcomes = compiled.outcomes([*CASES, *STATIC])
    failures = [outcome for outcome in outcomes if isinstance(outcome, CompileFailure)]
    assert not failures, "\n".join(f"{failure.name}: {failure.error}" for failure in failures)


def test_no_loop_spills_to_local_memory(compiled):
    spills = [
        f"{figures.name}: {loop.local} loads and stores in {loop.function}, line {loop.line}"
        for figures in compiled.figures([*CASES, *STATIC])
        for loop in figures.loops
        # A token that is too wide for the registers spills; the table limits how much.
        if loop.local > 0 and not figures.name.endswith(f"/{compile_kernels.WIDE}")
    ]
    assert not spills, "\n".join(spills)


def test_every_branch_has_one_loop_of_one_step(compiled):
    wrong = []
    for figures in compiled.figures(list(CASES)):
        branches = {branch_name(branch): branch for branch in CASES[figures.name].spec.branches}
        found = sorted(loop.function for loop in figures.matrix_loops)
        if found != sorted(branches):
            wrong.append(f"{figures.name}: loops {found}, branches {sorted(branches)}")
            continue
        for loop in figures.matrix_loops:
            branch = branches[loop.function]
            products = 128 * branch.tokens * branch.format.step
            # The names of sm_100's instructions do not tell their shape.
            if loop.products not in (products, None):
                wrong.append(f"{figures.name} {branch}: {loop.products}, expected {products}")
    assert not wrong, "\n".join(wrong)


def test_hopper_multiplies_every_format_with_its_own_instruction(compiled):
    wrong = []
    for name, branch, loop in hopper_loops(compiled):
        word, kind = HOPPER_INSTRUCTIONS[branch.format.arithmetic]
        if any(not (op.startswith(word) and kind in op) for op in loop.matrix):
            wrong.append(f"{name} {branch}: {sorted(loop.matrix)}, expected {word} {kind}")
    assert not wrong, "\n".join(wrong)


def test_hopper_loops_load_ahead(compiled):
    # LDG waits for memory where LDGSTS copies for a later step.
    waits = [
        f"{name} {branch}: {loop.opcodes['LDG']} LDG"
        for name, branch, loop in hopper_loops(compiled)
        if "LDG" in loop.opcodes
    ]
    assert not waits, "\n".join(waits)


@pytest.mark.parametrize(("form", "most"), MOST_PER_WEIGHT.items())
def test_instructions_for_a_weight_stay_within_their_limit(compiled, form, most):
    (figures,) = compiled.figures([f"sm_90/decode/{form}"])
    (loop,) = figures.matrix_loops
    weights = loop.products // 16 // figures.threads
    assert weights == 128  # 128 outputs x 128 inputs in a step, 128 threads
    assert loop.instructions / weights <= most


def test_every_generated_kernel_fits_on_its_gpu(compiled):
    figures = compiled.figures(list(CASES))
    too_large = [f"{f.name}: {f.shared_bytes} bytes" for f in figures if f.ctas_per_sm == 0]
    assert not too_large, "\n".join(too_large)


@pytest.mark.parametrize(("plan", "least"), LEAST_PROGRAMS.items())
def test_enough_programs_of_a_mix_fit_on_a_multiprocessor(compiled, plan, least):
    (figures,) = compiled.figures([f"sm_90/{plan}/six"])
    assert figures.ctas_per_sm >= least, (figures.registers, figures.shared_bytes)


@pytest.mark.parametrize("plan", LEAST_PROGRAMS)
def test_a_mix_takes_the_shared_memory_of_its_largest_branch(compiled, plan):
    (mix,) = compiled.figures([f"sm_90/{plan}/six"])
    alone = compiled.figures([f"sm_90/{plan}/{form}" for form in compile_kernels.SIX_FORMATS])
    assert len(alone) == 6
    assert mix.shared_bytes == max(figures.shared_bytes for figures in alone)


def test_figures_are_those_of_the_table_or_better(compiled):
    figures = compiled.figures([*CASES, *STATIC])
    rows = json.loads(compile_kernels.TABLE.read_text())["triton"].get(figures[0].triton)
    if rows is None:
        pytest.skip(f"the table has no Triton {figures[0].triton}; run {compile_kernels.COMMAND}")
    found = [
        f"{kernel.name}: {text}"
        for kernel in figures
        for text in worse(rows.get(kernel.name, {}), compile_kernels.row(kernel))
    ]
    advice = f"if this is meant, run {compile_kernels.COMMAND} and review the difference"
    assert not found, "\n".join([f"Triton {figures[0].triton}", *found, advice])


def worse(old: Mapping, new: Mapping) -> list[str]:
    """What is worse in a new row of the table than in the old one, or not comparable."""
    if old.keys() != new.keys() or old["loops"].keys() != new["loops"].keys():
        return [f"the table has {old}, now it is {new}"]
    found = [
        f"{key} was {old[key]}, is {new[key]}"
        for key in ("stack_bytes", "shared_bytes")
        if new[key] > old[key]
    ]
    if new["ctas_per_sm"] < old["ctas_per_sm"]:
        found.append(f"ctas_per_sm was {old['ctas_per_sm']}, is {new['ctas_per_sm']}")
    for name, loop in new["loops"].items():
        before = old["loops"][name]
        count = before["instructions"]
        if loop["instructions"] > count + max(GROWTH_INSTRUCTIONS, GROWTH * count):
            found.append(f"{name}: instructions were {count}, are {loop['instructions']}")
        if loop["matrix"] != before["matrix"]:
            found.append(f"{name}: matrix was {before['matrix']}, is {loop['matrix']}")
    return found


OLD_ROW = {
    "registers": 127,
    "stack_bytes": 0,
    "shared_bytes": 55296,
    "ctas_per_sm": 4,
    "loops": {"multiply": {"instructions": 400, "matrix": {"HGMMA": 16}}},
}


@pytest.mark.parametrize(
    "new",
    [
        OLD_ROW,
        {**OLD_ROW, "registers": 128, "shared_bytes": 1024, "ctas_per_sm": 5},
        {**OLD_ROW, "loops": {"multiply": {"instructions": 412, "matrix": {"HGMMA": 16}}}},
    ],
)
def test_a_row_as_good_as_the_table_passes(new):
    assert worse(OLD_ROW, new) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stack_bytes": 8}, "stack_bytes was 0, is 8"),
        ({"shared_bytes": 55297}, "shared_bytes was 55296, is 55297"),
        ({"ctas_per_sm": 3}, "ctas_per_sm was 4, is 3"),
        (
            {"loops": {"multiply": {"instructions": 413, "matrix": {"HGMMA": 16}}}},
            "multiply: instructions were 400, are 413",
        ),
        (
            {"loops": {"multiply": {"instructions": 400, "matrix": {"HMMA": 16}}}},
            "multiply: matrix was {'HGMMA': 16}, is {'HMMA': 16}",
        ),
    ],
)
def test_a_row_that_is_worse_is_named_with_both_numbers(change, text):
    assert worse(OLD_ROW, {**OLD_ROW, **change}) == [text]


def test_a_kernel_that_the_table_lacks_is_named():
    assert "the table has {}" in worse({}, OLD_ROW)[0]


def test_the_table_has_every_kernel_and_no_other():
    versions = json.loads(compile_kernels.TABLE.read_text())["triton"]
    assert len(versions) == 2
    for rows in versions.values():
        assert rows.keys() - {"ptxas"} == CASES.keys() | STATIC.keys()


def test_the_cost_model_reads_figures_of_the_same_kernels():
    rows = json.loads(compile_kernels.TABLE.read_text())["triton"]
    costs = json.loads(compile_kernels.COST_FIGURES.read_text())
    cases = {case.name: case for case in compile_kernels.cost_cases()}
    branches = {name: str(case.spec.branches[0]) for name, case in cases.items()}
    assert sorted(branches.values()) == sorted(costs["branches"])
    assert load_figures(compile_kernels.COST_ARCH).branches.keys() == costs["branches"].keys()
    both = cases.keys() & CASES.keys()
    assert len(both) == len([case for case in CASES.values() if len(case.spec.branches) == 1])
    for name in both:
        row, cost = rows[costs["triton"]][name], costs["branches"][branches[name]]
        (loop,) = row["loops"].values()
        found = (loop["instructions"], row["registers"], row["shared_bytes"])
        assert found == (cost["loop_instructions"], cost["registers"], cost["shared_bytes"]), name


def test_the_results_page_shows_the_table():
    table = compile_kernels.TABLE
    section = "\n".join(compiled_sections(table.name, json.loads(table.read_text())))
    assert section in (ROOT / "docs" / "results.md").read_text()
