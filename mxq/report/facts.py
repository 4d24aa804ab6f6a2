"""Everything that is known of a finished checkpoint, read from its folder and its work folder.

What the output folder holds is always there. The work folder may be gone, or belong to another run
by now: then ``notes`` say what is missing, and nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path

from mxq.artifacts import Allocation, BlockInfo, MeasuredLayers, SensitivityTable
from mxq.checkpoint.pack import PackReport, plan_digest
from mxq.json_values import decode
from mxq.models.files import read_json
from mxq.profiling.activation import ActivationStats
from mxq.profiling.draw import has_tokenizer
from mxq.publish import ORIGIN, PLAN, RECORD, RESULTS, RunRecord
from mxq.report.origin import Origin
from mxq.scheme import Scheme
from mxq.search.allocate import check_solved_on
from mxq.storage import load_artifact
from mxq.workspace import Workspace

_BLOCK = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)
_OF_EXPERT = re.compile(r"(.+)\.(\d+)\.(gate|up|down)", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan that was packed and measured on held-out text."""

    written: bool
    description: str
    bits_asked: float
    bits_per_weight: float
    predicted_loss: float
    unit: str
    heldout_tokens: int
    kl: float
    nll: float
    original_nll: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        """Of the checkpoint."""
        return exp(self.nll)

    @property
    def original_perplexity(self) -> float:
        """Of the original."""
        return exp(self.original_nll)


@dataclass(frozen=True, slots=True)
class Cell:
    """One block of the plan.

    ``site`` is the path of a linear, or of the experts that it belongs to, within its layer.
    ``bits`` are stored bits per weight; of the codes alone where ``tokens`` and ``loss`` are None,
    which is where no work folder tells the sizes.
    """

    name: str
    layer: int
    expert: int | None
    site: str
    projection: str
    scheme: Scheme
    bits: float
    tokens: int | None = None
    loss: float | None = None

    @property
    def column(self) -> str:
        """What blocks of different layers have in common: the path without layer and expert."""
        return self.site if self.expert is None else f"{self.site}.{self.projection}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the page, the card and the terminal show.

    ``results`` are by plan name, the written one among them. ``origin`` is None for a checkpoint
    of an mxq that did not record it; ``table`` and ``profile`` are None without the work folder,
    ``layers`` where single layers were not measured for this plan. ``notes`` say what is missing.
    ``has_tokenizer`` says whether the folder has one.
    """

    folder: Path
    plan: Allocation
    record: RunRecord
    results: Mapping[str, PlanResult]
    cells: tuple[Cell, ...]
    model_type: str
    origin: Origin | None
    table: SensitivityTable | None
    profile: ActivationStats | None
    layers: MeasuredLayers | None
    has_tokenizer: bool
    notes: tuple[str, ...]

    @property
    def written(self) -> PlanResult:
        """What was measured of the checkpoint."""
        return self.results[self.record.written]

    @property
    def name(self) -> str:
        """The model's name, or its type where no name is recorded."""
        return self.origin.name if self.origin is not None else self.model_type

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self.written_pack.tensor_bytes

    @property
    def written_pack(self) -> PackReport:
        """What packing told of the checkpoint."""
        return self.record.packs[self.record.written]

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers with blocks, in order."""
        return tuple(sorted({cell.layer for cell in self.cells}))


def gather(
    folder: Path, work: Path | None = None, *, measured_layers: MeasuredLayers | None = None
) -> Facts:
    """The facts of a checkpoint; ``work`` None is ``work`` inside its folder.

    ``measured_layers`` replaces those of the work folder.

    Raises:
        ValueError: If the folder is no finished checkpoint of mxq, or one of its files is damaged.
    """
    if not (folder / PLAN).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no finished checkpoint of mxq (it has no {PLAN} with a "
            "config.json); give the folder that mxq quantize or mxq pack wrote"
        )
    plan = load_artifact(folder / PLAN, Allocation)
    record = load_artifact(folder / RECORD, RunRecord)
    space = Workspace(folder / "work" if work is None else work)
    notes: list[str] = []
    table, profile = _of_work(space, plan, record, notes)
    layers = measured_layers or _layers_of(space, plan)
    if layers is not None and layers.plan != plan_digest(plan):
        layers = None
        notes.append("The measured losses of single layers are those of another plan.")
    return Facts(
        folder=folder,
        plan=plan,
        record=record,
        results=_results(folder / RESULTS, record),
        cells=make_cells(plan, table),
        model_type=str(read_json(folder / "config.json").get("model_type")),
        origin=_origin(folder, notes),
        table=table,
        profile=profile,
        layers=layers,
        has_tokenizer=has_tokenizer(folder),
        notes=tuple(notes),
    )


def _of_work(
    space: Workspace, plan: Allocation, record: RunRecord, notes: list[str]
) -> tuple[SensitivityTable | None, ActivationStats | None]:
    """Table and profile of the work folder, if they are those of this checkpoint."""
    if not space.path("sensitivity").is_file():
        notes.append(
            f"There is no work folder at {space.folder}: sensitivities and the use of experts are "
            "not known. Give it with --work if it is elsewhere."
        )
        return None, None
    try:
        table, profile = space.sensitivity(), space.profile()
        if table.provenance.model_digest != record.provenance.model_digest:
            raise ValueError("it is of another model")
        check_solved_on(plan, table)
    except ValueError as error:
        notes.append(f"The work folder {space.folder} is left out: {error}.")
        return None, None
    if table.provenance.calibration_digest != profile.tokens_digest:
        notes.append("The use of experts is left out: it is that of other calibration text.")
        return table, None
    return table, profile


def _layers_of(space: Workspace, plan: Allocation) -> MeasuredLayers | None:
    """The measured layers of the work folder, if they are those of this plan."""
    path = space.path("layer_losses")
    if not path.is_file():
        return None
    found = load_artifact(path, MeasuredLayers)
    return found if found.plan == plan_digest(plan) else None


def _results(path: Path, record: RunRecord) -> dict[str, PlanResult]:
    found = {name: decode(PlanResult, value) for name, value in read_json(path).items()}
    if found.keys() != record.packs.keys() or record.written not in found:
        raise ValueError(
            f"{path} tells of the plans {', '.join(found) or 'none'}, the run of "
            f"{', '.join(record.packs)}; the folder was put together from different runs"
        )
    return found


def _origin(folder: Path, notes: list[str]) -> Origin | None:
    if not (folder / ORIGIN).is_file():
        notes.append(
            f"There is no {ORIGIN}: the model's name, the size of the original and the options of "
            "the run are not known."
        )
        return None
    return load_artifact(folder / ORIGIN, Origin)


def make_cells(plan: Allocation, table: SensitivityTable | None) -> tuple[Cell, ...]:
    """A cell for each block, in the order of the table, or of the plan where there is none."""
    if table is None:
        return tuple(_named_cell(name, scheme) for name, scheme in plan.schemes.items())
    place = {scheme: column for column, scheme in enumerate(table.schemes)}
    return tuple(
        _measured_cell(block, plan.schemes[block.name], row[place[plan.schemes[block.name]]])
        for block, row in zip(table.blocks, table.loss, strict=True)
    )


def _measured_cell(block: BlockInfo, scheme: Scheme, loss: float) -> Cell:
    weights = block.out_features * block.in_features
    bits = scheme.storage_bits(block.out_features, block.in_features) / weights
    site = block.site.removeprefix(f"layers.{block.layer}.")
    return Cell(
        name=block.name,
        layer=block.layer,
        expert=block.expert,
        site=site,
        projection=block.projection,
        scheme=scheme,
        bits=bits,
        tokens=block.tokens,
        loss=loss,
    )


def _named_cell(name: str, scheme: Scheme) -> Cell:
    """A cell from a block's name alone.

    Raises:
        ValueError: If it is not the name of a block.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{PLAN} names {name!r}, which is no block of a decoder layer")
    layer, path, bits = int(match[1]), match[2], float(scheme.w_bits)
    of_expert = _OF_EXPERT.fullmatch(path)
    if of_expert is None:
        return Cell(name, layer, None, path, path.rpartition(".")[2], scheme, bits)
    site, expert, projection = of_expert.groups()
    return Cell(name, layer, int(expert), site, projection, scheme, bits)
