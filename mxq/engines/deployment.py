"""What is checked: blocks with their formats, and what an exported configuration says of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.engines.formats import DENSE, StoredFormat
from mxq.engines.rules import EXPORTED, EngineRules, Rule

OWN = "mxq"
"""The quant_method of mxq's own checkpoints."""


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """A group of a ``config_groups``: what it targets, and the format it declares."""

    name: str
    targets: tuple[str, ...]
    format: StoredFormat


@dataclass(frozen=True, slots=True)
class Exported:
    """What only an exported folder shows.

    ``unmatched`` are targets that no module has, ``claimed`` are unquantized modules that a group
    targets and nothing ignores, ``ungrouped`` are quantized modules of no group. ``fused`` is the
    format that the configuration gives to a linear under its name in the engine, by that name.
    ``overrides`` are the patterns of ``dynamic``. ``renamed`` are experts that the original's files
    hold in one tensor and these do not.
    """

    groups: tuple[ConfigGroup, ...] = ()
    unmatched: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()
    ungrouped: tuple[str, ...] = ()
    fused: Mapping[str, StoredFormat] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deployment:
    """A plan or a checkpoint, seen as an engine would load it.

    ``formats`` is one for each block. ``rotated`` are names of blocks whose inputs are rotated.
    ``method`` is the quant_method of the folder; a plan is taken for what it is exported to.
    ``exported`` is None for a plan and for mxq's own format, of which less can be checked.
    """

    blocks: tuple[BlockInfo, ...]
    formats: tuple[StoredFormat, ...]
    rotated: frozenset[str] = frozenset()
    tensor_parallel: int = 1
    method: str = EXPORTED
    exported: Exported | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one format for each block."""
        if len(self.blocks) != len(self.formats):
            raise ValueError(
                f"{counted(len(self.formats), 'format')} for {counted(len(self.blocks), 'block')}"
            )

    def pairs(self, part: str = "all") -> list[tuple[BlockInfo, StoredFormat]]:
        """Blocks of a part with their formats."""
        found = zip(self.blocks, self.formats, strict=True)
        return [(block, stored) for block, stored in found if is_of(block, part)]

    @property
    def read_as(self) -> str:
        """The method whose rules are asked: mxq's own format is taken for what it exports to."""
        return EXPORTED if self.method == OWN else self.method

    @property
    def quantized(self) -> list[tuple[BlockInfo, StoredFormat]]:
        """Blocks that do not stay in the model's own type."""
        return [(block, stored) for block, stored in self.pairs() if stored != DENSE]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that is broken: by which blocks, modules or targets, and how the first of them is."""

    rule: Rule
    names: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules of an engine say of a deployment: those that are broken, errors first."""

    rules: EngineRules
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Broken rules that the engine does not forgive."""
        return tuple(finding for finding in self.findings if finding.rule.is_error)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The others."""
        return tuple(finding for finding in self.findings if not finding.rule.is_error)


def is_of(block: BlockInfo, part: str) -> bool:
    """Whether a block is of "all", "experts" or "linears"."""
    return part == "all" or (part == "experts") == (block.expert is not None)
