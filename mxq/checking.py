"""``mxq check``: a folder, seen as an engine would load it, held against the engine's rules.

A folder is a checkpoint of mxq, one exported to compressed-tensors or GPTQ, or a work folder.
Configurations and the headers of weight files are read, and nothing is run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mxq.artifacts import Allocation
from mxq.checkpoint.export.record import find_export
from mxq.checkpoint.format import CheckpointPlan
from mxq.counted import counted
from mxq.engines import (
    DENSE,
    ENGINES,
    Deployment,
    EngineRules,
    Exported,
    Finding,
    Rule,
    StoredFormat,
    Verdict,
    check,
    check_tensor_parallel,
    format_of,
    load_rules,
    unchecked,
)
from mxq.engines.compressed import read_compressed
from mxq.engines.exported import fused_name
from mxq.engines.gptq import GptqConfig, read_gptq
from mxq.engines.targets import unmatched
from mxq.models.files import check_links, read_json
from mxq.packing import packed_words
from mxq.search.allocate import check_solved_on
from mxq.stored_modules import StoredModule, block_of, read_modules, with_neighbours
from mxq.workspace import Workspace


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was found: broken rules, and those that the folder does not show.

    ``what`` says what the folder is, and for which engine its plan was solved.
    """

    folder: Path
    what: str
    rules: EngineRules
    deployment: Deployment
    findings: tuple[Finding, ...]
    unchecked: tuple[Rule, ...]

    @property
    def errors(self) -> int:
        """Number of broken rules that an engine does not forgive."""
        return sum(finding.rule.is_error for finding in self.findings)


def check_folder(folder: Path, engine: str, tensor_parallel: int = 1) -> CheckReport:
    """Hold a folder against the rules of an engine.

    Raises:
        ValueError: If the folder is none that can be checked, or the engine is unknown.
    """
    rules = load_rules(engine)
    check_tensor_parallel(engine, tensor_parallel)
    what, deployment = _read(folder)
    deployment = replace(deployment, tensor_parallel=tensor_parallel)
    return CheckReport(
        folder,
        what,
        rules,
        deployment,
        check(deployment, rules),
        unchecked(deployment, rules),
    )


def check_export(folder: Path) -> tuple[Verdict, ...]:
    """What ``check_folder`` finds in an exported folder for each engine, on one rank.

    Raises:
        ValueError: If the folder is none that can be checked.
    """
    _, deployment = _read(folder)
    every = [load_rules(engine) for engine in ENGINES]
    return tuple(Verdict(rules, check(deployment, rules)) for rules in every)


def _read(folder: Path) -> tuple[str, Deployment]:
    config = folder / "config.json"
    if not config.is_file():
        return _read_work(folder)
    check_links(folder)
    fields = read_json(config).get("quantization_config")
    fields = fields if isinstance(fields, dict) else {}
    method, record = str(fields.get("quant_method")), find_export(folder)
    if method not in _READERS and record is not None:
        raise ValueError(
            f"{folder} is a plain model that mxq export wrote of {record.name}; nothing of it is "
            "quantized, so an engine reads it as it reads the original"
        )
    if method not in _READERS:
        raise ValueError(
            f"{folder} is not quantized in a way that mxq check knows (quant_method {method!r}); "
            f"it reads {', '.join(_READERS)} and work folders of mxq"
        )
    try:
        deployment = _READERS[method](folder, fields)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be checked: {error}") from error
    if record is None or deployment.exported is None:
        return f"{method} checkpoint", deployment
    exported = replace(deployment.exported, renamed=record.renamed)
    what = f"{method} checkpoint that mxq export {record.mxq} wrote of {record.name}"
    return what, replace(deployment, exported=exported)


def _read_work(folder: Path) -> tuple[str, Deployment]:
    space = Workspace(folder)
    if not space.path("settings").is_file():
        raise ValueError(
            f"{folder} is neither a checkpoint (it has no config.json) nor a work folder of mxq"
        )
    plan, table = space.allocation(), space.sensitivity()
    check_solved_on(plan, table)
    formats = tuple(format_of(plan.schemes[block.name]) for block in table.blocks)
    pairs = zip(table.blocks, formats, strict=True)
    rotated = {b.name for b, s in pairs if b.layer in plan.rotated_layers and s != DENSE}
    return f"plan of a work folder{_solved_for(plan)}", Deployment(
        table.blocks, formats, frozenset(rotated)
    )


def _solved_for(plan: Allocation) -> str:
    return "" if plan.engine is None else f", solved for {plan.engine}"


def _read_mxq(folder: Path, fields: Mapping[str, object]) -> Deployment:
    plan = CheckpointPlan.from_json(fields)
    planned = {path: format_of(scheme) for path, scheme in plan.linears.items()}
    for path, table in plan.experts.items():
        for projection, row in table.items():
            for expert, scheme in enumerate(row):
                planned[f"{path}.{expert}.{projection}"] = format_of(scheme)
    modules = read_modules(folder)
    missing = sorted(planned.keys() - modules.keys())
    if missing:
        raise ValueError(f"its files hold no weight of {missing[0]}")
    deployment = _deployment(modules, planned, "mxq")
    rotated = {
        block.name
        for block, stored in deployment.quantized
        if plan.rotated & {block.name, block.site}
    }
    return replace(deployment, rotated=frozenset(rotated))


def _read_compressed(folder: Path, fields: Mapping[str, object]) -> Deployment:
    config, modules = read_compressed(fields), read_modules(folder)
    planned: dict[str, StoredFormat] = {}
    ungrouped, claimed = [], []
    for name, module in modules.items():
        group = None if config.is_ignored(name) else config.group_of(name)
        if module.is_quantized and group is not None:
            _check_stored(name, module, group.format)
            planned[name] = group.format
        elif module.is_quantized:
            ungrouped.append(name)
        elif group is not None and module.is_linear:
            claimed.append(name)
    strangers = unmatched(config.targets, list(modules))
    exported = Exported(config.groups, strangers, tuple(claimed), tuple(ungrouped))
    return replace(_deployment(modules, planned, "compressed-tensors"), exported=exported)


def _read_gptq(folder: Path, fields: Mapping[str, object]) -> Deployment:
    config = read_gptq(fields)
    modules = read_modules(folder, gptq_bits=lambda name: config.format_of(name).w_bits)
    planned = {name: config.format_of(name) for name, m in modules.items() if m.is_quantized}
    for name, stored in planned.items():
        _check_stored(name, modules[name], stored)
    deployment = _deployment(modules, planned, "gptq")
    claimed = [
        name
        for name, module in modules.items()
        if module.is_linear and not module.is_quantized and config.format_of(name) != DENSE
    ]
    exported = Exported(
        claimed=tuple(claimed),
        ungrouped=tuple(name for name, stored in planned.items() if stored == DENSE),
        fused=_fused(config, deployment),
        overrides=config.patterns,
    )
    return replace(deployment, exported=exported)


def _check_stored(name: str, module: StoredModule, stored: StoredFormat) -> None:
    """Raise ValueError if the tensors of a module are not of the format that is declared."""
    if stored.storage not in ("packed", "int"):
        return
    k, size = module.in_features, stored.group_size or module.in_features
    words, groups = packed_words(k, stored.w_bits), -(-k // size)
    wrong = None
    if module.words is not None and module.words != words:
        wrong = f"{counted(module.words, 'word')} in a row, expected {words}"
    elif module.groups is not None and module.groups != groups:
        wrong = f"{counted(module.groups, 'scale')} for {k} inputs, expected {groups}"
    elif not stored.symmetric and not module.has_zeros:
        wrong = "no zero points"
    if wrong is not None:
        raise ValueError(
            f"{name} is declared as {stored} and has {wrong}: files and configuration are not of "
            "one export; export again"
        )


def _fused(config: GptqConfig, deployment: Deployment) -> dict[str, StoredFormat]:
    """Formats under the names that engines have for fused linears."""
    every = [rule for engine in ENGINES for rule in load_rules(engine).rules]
    named = [rule for rule in every if rule.kind == "fused names"]
    names = {fused_name(rule, block) for rule in named for block in deployment.blocks}
    return {name: config.format_of(name) for name in names if name is not None}


_READERS: Mapping[str, Callable[[Path, Mapping[str, object]], Deployment]] = {
    "mxq": _read_mxq,
    "compressed-tensors": _read_compressed,
    "gptq": _read_gptq,
}


def _deployment(
    modules: Mapping[str, StoredModule], planned: Mapping[str, StoredFormat], method: str
) -> Deployment:
    """Planned modules, and the unquantized ones that an engine joins with them."""
    formats = with_neighbours(modules, planned)
    blocks = tuple(block_of(name, modules[name]) for name in formats)
    return Deployment(blocks, tuple(formats.values()), method=method)
