"""The text of generated kernels: frozen examples, what they hold, and how files come to be.

Golden texts are REGRESSION, frozen because the interpreter agrees with the definition on the same
text (test_group_gemm.py) and it compiles (test_compiled.py). To write them anew:
pytest tests/kernels/test_codegen.py --update-golden
"""

import ast
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from weights import SCHEMES

from mxq.kernels import arena, codegen, routing
from mxq.kernels.branches import branch_name, needs_unpack
from mxq.kernels.codegen import ENTRY_POINT, build, render, signature
from mxq.kernels.spec import (
    TILE_PLANS,
    Branch,
    KernelSpec,
    WeightFormat,
    format_of,
    make_spec,
    single_specs,
)

FORMATS = sorted({format_of(scheme) for scheme in SCHEMES})
DECODE, MIDDLE, PREFILL = TILE_PLANS
W4 = WeightFormat(4, "bf16", 128)
ALL = make_spec(FORMATS, DECODE, has_bias=True)


def functions_of(text):
    """Top-level functions by name."""
    tree = ast.parse(text)
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def names_in(node):
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


# --- Frozen texts ---


@dataclass(frozen=True, slots=True)
class Golden:
    name: str
    spec: KernelSpec


GOLDEN = [
    Golden("kernel_w4a16_g128_decode.py.txt", make_spec([W4], DECODE)),
    Golden(
        "kernel_w3a16_g64_w8a8_plain.py.txt",
        make_spec(
            [WeightFormat(3, "bf16", 64), WeightFormat(8, "int8")],
            MIDDLE,
            has_bias=True,
            dialect="plain",
        ),
    ),
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_the_text_is_the_frozen_one(golden, check_golden):
    check_golden(golden.name, render(golden.spec))


def test_functions_of_a_kernel_of_all_formats_are_the_frozen_ones(check_golden):
    lines = []
    for name, node in functions_of(render(ALL)).items():
        lines += textwrap.wrap(
            f"{name}({', '.join(argument.arg for argument in node.args.args)})",
            width=100,
            subsequent_indent="    ",
        )
    check_golden("kernel_all_formats_functions.txt", "\n".join(lines) + "\n")


# --- What a text holds ---


# The package without its root, which imports torch: rendering needs the standard library alone.
RENDER_ALONE = """
import hashlib, sys, types
root = types.ModuleType("mxq")
root.__path__ = [sys.argv[1]]
sys.modules.update(mxq=root, torch=None, triton=None)
from mxq.kernels.codegen import render
from mxq.kernels.spec import TILE_PLANS, WeightFormat, make_spec
forms = [WeightFormat(bits, kind) for bits in (2, 3, 4, 5, 6, 8) for kind in ("bf16", "int8")]
print(hashlib.sha256(render(make_spec(forms, TILE_PLANS[0])).encode()).hexdigest())
"""


def test_a_text_is_a_function_of_its_specification_alone():
    # Hashes of strings differ between processes, so an order taken from a set would show.
    package = Path(codegen.__file__).parents[1]
    digests = {
        subprocess.run(
            [sys.executable, "-c", RENDER_ALONE, str(package)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dialect", ["ptx", "plain", "interpreted"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_kernel_of_one_format_holds_what_it_calls_and_nothing_else(form, dialect):
    text = render(make_spec([form], DECODE, dialect=dialect))
    functions = functions_of(text)
    used, waiting = set(), [ENTRY_POINT]
    while waiting:
        name = waiting.pop()
        used.add(name)
        waiting += (names_in(functions[name]) & functions.keys()) - used
    assert used == functions.keys()
    assert ("inline_asm" in text) == (dialect == "ptx" and needs_unpack(form))


@pytest.mark.parametrize("dialect", ["ptx", "plain", "interpreted"])
def test_a_kernel_of_all_formats_has_a_branch_for_each_and_no_name_it_lacks(dialect):
    spec = replace(ALL, dialect=dialect)
    functions = functions_of(render(spec))
    branches = [name for name in functions if name.startswith("multiply_")]
    assert branches == [branch_name(branch) for branch in spec.branches]
    for name, node in functions.items():
        known = functions.keys() | {"tl", "triton", "range"}
        bound = {argument.arg for argument in node.args.args}
        bound |= {
            child.id
            for child in ast.walk(node)
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
        }
        assert names_in(node) <= known | bound, name


def test_a_tile_of_every_branch_number_reaches_its_own_branch():
    chain = functions_of(render(ALL))[ENTRY_POINT].body[-1].body[-1]
    for index, branch in enumerate(ALL.branches):
        if index < len(ALL.branches) - 1:
            assert ast.unparse(chain.test) == f"branch == {index}"
            body, rest = chain.body, chain.orelse
        else:
            body, rest = [chain], []
        (call,) = body
        assert call.value.func.id == branch_name(branch)
        chain = rest[0] if rest else None
    assert chain is None


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_branch_is_called_with_its_own_argument_names_in_order(form):
    functions = functions_of(render(make_spec([form], DECODE)))
    name = branch_name(Branch(form, 16, 2))
    (call,) = (
        node
        for node in ast.walk(functions[ENTRY_POINT])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    )
    assert [argument.id for argument in call.args] == [a.arg for a in functions[name].args.args]


@pytest.mark.parametrize("spec", [*single_specs(ALL), ALL], ids=lambda s: f"{len(s.branches)}")
def test_arguments_are_those_of_the_signature(spec):
    entry = functions_of(render(spec))[ENTRY_POINT]
    assert [argument.arg for argument in entry.args.args] == list(signature(spec))


def test_a_bias_is_read_only_where_there_is_one():
    assert "bias_ptr +" not in render(make_spec([W4], DECODE))
    assert "bias_ptr +" in render(make_spec([W4], DECODE, has_bias=True))


@pytest.mark.parametrize("plan", TILE_PLANS, ids=lambda plan: plan.name)
def test_tiles_and_stages_are_those_of_the_plan(plan):
    spec = make_spec([W4], plan)
    text = render(spec)
    assert f"BM: tl.constexpr = {plan.tokens}\n" in text
    assert f"num_stages={spec.branches[0].stages})" in text


def test_table_columns_are_those_of_who_writes_the_tables():
    assert codegen.PROBLEM_FIELDS == arena.PROBLEM_FIELDS
    assert len(codegen.TILE_FIELDS) == routing.TILE_WORDS


@pytest.mark.parametrize("dialect", ["ptx", "plain", "interpreted"])
def test_generated_code_is_formatted_and_has_no_findings(dialect, tmp_path):
    for form in FORMATS:
        for has_bias in (False, True):
            spec = make_spec([form], PREFILL, has_bias=has_bias, dialect=dialect)
            (tmp_path / f"{form}_{has_bias}.py").write_text(render(spec))
    (tmp_path / "all.py").write_text(render(replace(ALL, dialect=dialect)))
    for command in (
        ["format", "--check"],
        ["check", "--select=E,F,W,I,D1,N8", "--ignore=N806,N803"],
    ):
        options = [*command, "--isolated", "--line-length=100", "--no-cache", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *options], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]


# --- Files ---


def unique(stages):
    """A kernel that no other test builds, since a process keeps what it imported."""
    return KernelSpec((Branch(W4, 16, stages),), num_warps=4, dialect="interpreted")


def forget(module):
    del sys.modules[module.__name__]


def test_build_writes_a_file_once_and_imports_it(tmp_path):
    spec = unique(11)
    module = build(spec, tmp_path)
    (path,) = tmp_path.glob("*")
    assert Path(module.__file__) == path
    assert path.read_text() == render(spec)
    assert module.group_gemm.fn.__name__ == ENTRY_POINT
    before = path.stat()
    forget(module)
    assert build(spec, tmp_path) is not module
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    forget(module)


def test_build_gives_what_the_process_has_without_a_look_at_files(tmp_path):
    module = build(unique(12), tmp_path)
    Path(module.__file__).unlink()
    assert build(unique(12), tmp_path) is module
    forget(module)


def test_kernels_that_differ_have_files_of_their_own(tmp_path):
    specs = [unique(13), replace(unique(13), has_bias=True), unique(14)]
    modules = [build(spec, tmp_path) for spec in specs]
    assert len({module.__file__ for module in modules}) == 3
    for module in modules:
        forget(module)


@pytest.mark.parametrize("damage", [b"", b"import os\n", b"\xff\xfe", "half"])
def test_a_damaged_file_is_written_again(damage, tmp_path):
    spec = unique(15)
    module = build(spec, tmp_path)
    path, text = Path(module.__file__), render(spec)
    forget(module)
    path.write_bytes(text.encode()[: len(text) // 2] if damage == "half" else damage)
    module = build(spec, tmp_path)
    assert path.read_text() == text
    assert module.group_gemm is not None
    forget(module)


def test_a_build_in_the_middle_of_another_one_disturbs_neither(tmp_path, monkeypatch):
    # What two processes may do: the second builds the same kernel while the first has written its
    # file and not yet moved it. They share the text, as processes may share its address.
    text, move = render(unique(17)), Path.replace
    modules = []

    def interrupted(part, target):
        monkeypatch.setattr(Path, "replace", move)
        modules.append(build(unique(17), tmp_path))
        forget(modules[0])
        return move(part, target)

    monkeypatch.setattr(codegen, "render", lambda spec: text)
    monkeypatch.setattr(Path, "replace", interrupted)
    modules.append(build(unique(17), tmp_path))
    forget(modules[1])
    assert modules[0] is not modules[1]
    (path,) = tmp_path.glob("*.py*")
    assert path.read_text() == text


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        build(unique(16), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_module_imports_nothing_but_triton():
    tree = ast.parse(render(ALL))
    imported = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"import triton", "import triton.language as tl"}
