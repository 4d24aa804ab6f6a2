"""The shape of the package, checked on its source: who may import whom, and how long things get.

A rule is a function from parsed modules to findings, each ``file:line: what is wrong``. The tests
apply every rule to the package, and to a few lines that break it.
"""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A part of the package imports itself and parts of a lower level. The parts of level 1 may also
# import each other, as long as there is no cycle.
LEVELS = {
    "scheme": 0,
    "artifacts": 1,
    "blocks": 1,
    "counted": 0,
    "compute": 1,
    "curvature": 2,
    "curvature_stage": 5,
    "config": 1,
    "heap": 1,
    "operations": 3,
    "json_values": 1,
    "demo": 1,
    "engines": 1,
    "kernels.spec": 1,
    "locks": 1,
    "numerics": 1,
    "packing": 1,
    "storage": 1,
    "terminal": 1,
    "records": 1,
    "distributed": 1,
    "kernels": 2,
    "machine": 2,
    "models": 2,
    "quantizers": 2,
    "search": 2,
    "checkpoint": 3,
    "checking": 6,
    "engine_tables": 9,
    "export_tables": 8,
    "exporting": 7,
    "stored_modules": 3,
    "evaluation": 7,
    "profiling": 3,
    "report": 6,
    "scoring": 3,
    "heldout": 4,
    "progress": 1,
    "choices": 5,
    "publish": 5,
    "latency": 5,
    "workspace": 4,
    "explore": 6,
    "finish": 6,
    "for_engine": 5,
    "pinning": 5,
    "planning": 6,
    "api": 8,
    "preflight": 6,
    "resources": 6,
    "pipeline": 7,
    "latency_tables": 9,
    "layerwise": 8,
    "profile_stage": 6,
    "tables": 8,
    "cli": 11,
    "cli_checkpoint": 10,
    "cli_options": 1,
    "cli_runs": 9,
    "report_tables": 9,
    "__main__": 12,
}

FILE_LINES_LIMIT = 400
FILE_LINES_MEDIAN_LIMIT = 200
FUNCTION_LINES_LIMIT = 50

# Model types that are also words of our own code, with the reason.
ORDINARY_WORDS = {
    "align": "the CSS property text-align, and what a tile does",
    "codegen": "the file that generates kernel source",
}


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed file; the ``name`` of an ``__init__.py`` is that of its package."""

    name: str
    path: str
    source: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    @property
    def part(self) -> str:
        """The key of LEVELS; empty for ``mxq/__init__.py``, which collects the public names."""
        words = self.name.split(".")[1:]
        return ".".join(words[:2]) if words[:2] == ["kernels", "spec"] else "".join(words[:1])


Rule = Callable[[Sequence[Module]], list[str]]


def parse(files: Mapping[str, str]) -> list[Module]:
    """Modules from ``path -> source``."""
    modules = []
    for path, source in sorted(files.items()):
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules.append(Module(name, path, source, ast.parse(source, path)))
    return modules


@pytest.fixture(scope="module")
def package() -> list[Module]:
    paths = (ROOT / "mxq").rglob("*.py")
    return parse({p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths})


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """Every absolute import as (dotted name, line), also those inside functions."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=str(source), names=names, level=0):
                yield from ((f"{source}.{alias.name}", node.lineno) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name, node.lineno


def internal_imports(modules: Sequence[Module]) -> Iterator[tuple[Module, Module, int]]:
    """(importer, imported, line) within the package."""
    by_name = {module.name: module for module in modules}
    for importer in modules:
        for dotted, line in imports(importer):
            # "mxq.scheme.Scheme" is a name in a module, "mxq.scheme" is the module itself.
            name = dotted if dotted in by_name else dotted.rpartition(".")[0]
            if name in by_name and dotted != "mxq.__version__":
                yield importer, by_name[name], line


def parts_without_level(modules: Sequence[Module]) -> list[str]:
    return [
        f"{module.path}:1: {module.part!r} has no level; give it one in LEVELS"
        for module in modules
        if module.part and module.part not in LEVELS
    ]


def upward_imports(modules: Sequence[Module]) -> list[str]:
    findings = []
    for importer, imported, line in internal_imports(modules):
        if not importer.part or importer.part == imported.part:
            continue
        # The root re-exports everything, so to import it is to import the highest level.
        level, target_level = LEVELS.get(importer.part, -1), LEVELS.get(imported.part, 5)
        if not (target_level < level or target_level == level == 1):
            findings.append(
                f"{importer.path}:{line}: level {level} imports {imported.name} of level "
                f"{target_level}"
            )
    return findings


def import_cycles(modules: Sequence[Module]) -> list[str]:
    """The first cycle, one finding for each of its imports."""
    lines = {
        (importer.name, imported.name): f"{importer.path}:{line}: imports {imported.name}"
        for importer, imported, line in internal_imports(modules)
        if importer.part and imported.part
    }
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for importer_name, imported_name in lines:
        sorter.add(importer_name, imported_name)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]  # each name is imported by the next one
        return [lines[after, before] for before, after in pairwise(cycle)]
    return []


def relative_imports(modules: Sequence[Module]) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: relative import"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]


def imports_of(libraries: Collection[str], modules: Sequence[Module]) -> list[str]:
    return [
        f"{module.path}:{line}: imports {dotted}"
        for module in modules
        for dotted, line in imports(module)
        if dotted.split(".")[0] in libraries
    ]


def heavy_imports_in_search(modules: Sequence[Module]) -> list[str]:
    search = [module for module in modules if module.part == "search"]
    return imports_of({"torch", "transformers", "triton"}, search)


def triton_outside_kernels(modules: Sequence[Module]) -> list[str]:
    others = [module for module in modules if not module.path.startswith("mxq/kernels/")]
    return imports_of({"triton"}, others)


def long_files(modules: Sequence[Module]) -> list[str]:
    lengths = ((module.path, len(module.source.splitlines())) for module in modules)
    return [
        f"{path}:{length}: longer than {FILE_LINES_LIMIT} lines"
        for path, length in lengths
        if length > FILE_LINES_LIMIT
    ]


def long_functions(modules: Sequence[Module]) -> list[str]:
    findings = []
    for module in modules:
        if module.path.startswith("mxq/kernels/"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # The signature and the docstring are not what a reader has to hold in mind.
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                first = node.body[1 if documented else 0].lineno
                length = (node.end_lineno or first) - first + 1
                if length > FUNCTION_LINES_LIMIT:
                    findings.append(
                        f"{module.path}:{node.lineno}: {node.name} has {length} lines, "
                        f"the limit is {FUNCTION_LINES_LIMIT}"
                    )
    return findings


def model_names(modules: Sequence[Module]) -> list[str]:
    """Model types of transformers in identifiers and string constants, docstrings left out."""
    from transformers import CONFIG_MAPPING

    known = {snake_case(key) for key in CONFIG_MAPPING if len(key) > 4} - ORDINARY_WORDS.keys()
    findings = []
    for module in modules:
        if module.part == "demo":
            continue
        places = [(module.path, 1), *strings_and_identifiers(module.tree)]
        for text, line in places:
            found = sorted(word_runs(text) & known)
            findings += [f"{module.path}:{line}: names the model type {name!r}" for name in found]
    return findings


def strings_and_identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            if isinstance(value, str):
                yield value, getattr(node, "lineno", 1)


def word_runs(text: str) -> set[str]:
    """All runs of words inside one name, in snake case: "Qwen2Moe" -> qwen2, moe, qwen2_moe."""
    runs = set()
    for chunk in re.findall(r"[\w-]+", text):
        words = [word for word in snake_case(chunk).split("_") if word]
        spans = combinations(range(len(words) + 1), 2)
        runs.update("_".join(words[start:stop]) for start, stop in spans)
    return runs


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


RULES: Mapping[str, Rule] = {
    "every part has a level": parts_without_level,
    "imports point downwards": upward_imports,
    "imports form no cycle": import_cycles,
    "imports are absolute": relative_imports,
    "search imports no torch, transformers or triton": heavy_imports_in_search,
    "triton is imported only under kernels": triton_outside_kernels,
    "files stay short": long_files,
    "functions stay short": long_functions,
    "no model is named": model_names,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_package_keeps_the_rule(rule, package):
    findings = rule(package)
    assert not findings, "\n" + "\n".join(findings)


@dataclass(frozen=True, slots=True)
class Broken:
    """Files that break ``rule``; the finding that must come out, to its line."""

    rule: Rule
    files: Mapping[str, str]
    where: str


LONG_FUNCTION = "def f():\n" + "    pass\n" * (FUNCTION_LINES_LIMIT + 1)

BROKEN = {
    "a part that LEVELS does not know": Broken(
        parts_without_level, {"mxq/utils.py": ""}, "mxq/utils.py:1"
    ),
    "an import of a higher level": Broken(
        upward_imports,
        {"mxq/pipeline.py": "", "mxq/models/a.py": "import os\nimport mxq.pipeline"},
        "mxq/models/a.py:2",
    ),
    "an import of another package of the same level": Broken(
        upward_imports,
        {"mxq/search/__init__.py": "", "mxq/storage.py": "from mxq.search import solve"},
        "mxq/storage.py:1",
    ),
    "an import hidden in a function": Broken(
        upward_imports,
        {"mxq/cli.py": "", "mxq/scheme.py": "def f():\n    from mxq import cli"},
        "mxq/scheme.py:2",
    ),
    "a generator specification that imports its generator": Broken(
        upward_imports,
        {"mxq/kernels/codegen.py": "", "mxq/kernels/spec.py": "import mxq.kernels.codegen"},
        "mxq/kernels/spec.py:1",
    ),
    "an import of the package root": Broken(
        upward_imports,
        {"mxq/__init__.py": "", "mxq/storage.py": "from mxq import quantize"},
        "mxq/storage.py:1",
    ),
    "two files that import each other": Broken(
        import_cycles,
        {"mxq/blocks.py": "import mxq.packing", "mxq/packing.py": "\nimport mxq.blocks"},
        "mxq/packing.py:2",
    ),
    "a relative import": Broken(
        relative_imports, {"mxq/search/cost.py": "from . import x"}, "mxq/search/cost.py:1"
    ),
    "torch in search": Broken(
        heavy_imports_in_search, {"mxq/search/a.py": "from torch import nn"}, "mxq/search/a.py:1"
    ),
    "a dynamic import of torch in search": Broken(
        heavy_imports_in_search,
        {"mxq/search/a.py": "importlib.import_module('torch.nn')"},
        "mxq/search/a.py:1",
    ),
    "triton in a quantizer": Broken(
        triton_outside_kernels,
        {"mxq/quantizers/a.py": "import triton.language as tl"},
        "mxq/quantizers/a.py:1",
    ),
    "a file of one line too many": Broken(
        long_files, {"mxq/cli.py": "\n" * (FILE_LINES_LIMIT + 1)}, "mxq/cli.py:401"
    ),
    "a function of one line too many": Broken(
        long_functions, {"mxq/cli.py": LONG_FUNCTION}, "mxq/cli.py:1"
    ),
    "a comparison with a model type": Broken(
        model_names, {"mxq/cli.py": "x = 1\nif kind == 'qwen2_moe': pass"}, "mxq/cli.py:2"
    ),
    "a class named after a model": Broken(
        model_names, {"mxq/cli.py": "class MixtralAdapter: pass"}, "mxq/cli.py:1"
    ),
    "a file named after a model": Broken(
        model_names, {"mxq/models/olmoe.py": ""}, "mxq/models/olmoe.py:1"
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_reported_with_its_place(broken):
    findings = broken.rule(parse(broken.files))
    assert [finding for finding in findings if finding.startswith(f"{broken.where}:")], findings


def test_downward_imports_and_the_version_of_the_root_are_allowed():
    files = {
        "mxq/__init__.py": "from mxq.pipeline import quantize",
        "mxq/scheme.py": "",
        "mxq/kernels/spec.py": "from mxq.scheme import Scheme",
        "mxq/kernels/codegen.py": "from mxq.kernels.spec import KernelSpec",
        "mxq/packing.py": "from mxq import scheme, __version__",
        "mxq/artifacts.py": "import mxq.packing",
        "mxq/pipeline.py": "import mxq.kernels.codegen",
    }
    modules = parse(files)
    assert parts_without_level(modules) + upward_imports(modules) + import_cycles(modules) == []


def test_a_model_may_be_named_in_a_docstring():
    modules = parse({"mxq/cli.py": '"""Like mixtral."""\ndef f():\n    """Like Mixtral."""'})
    assert model_names(modules) == []


def test_pulp_is_imported_in_exactly_one_file(package):
    findings = imports_of({"pulp"}, package)
    files = {finding.split(":")[0] for finding in findings}
    assert len(files) == 1, "\n".join([f"pulp is imported in {len(files)} files", *findings])


def test_the_median_file_is_short(package):
    lengths = sorted(((len(m.source.splitlines()), m.path) for m in package), reverse=True)
    longest = "\n".join(f"{path}:{length}" for length, path in lengths[:10])
    middle = median(length for length, _ in lengths)
    assert middle <= FILE_LINES_MEDIAN_LIMIT, f"the median is {middle} lines; longest:\n{longest}"


def test_mxq_imports_without_triton_pulp_datasets_a_gpu_or_a_network():
    code = (
        "import sys\n"
        "sys.modules.update(triton=None, pulp=None, datasets=None)\n"  # an import of None raises
        "import mxq\n"
        "print(mxq.__version__)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert done.stdout.strip() == project["version"]
