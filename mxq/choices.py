"""What is chosen by name, resolved to functions; a caller's own functions take the same place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from mxq.config import OWN, MeasureOptions, default_schemes
from mxq.models.adapter import ModelAdapter
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.sensitivity import SENSITIVITY, Sensitivity
from mxq.quantizers import QUANTIZERS, Method, Quantizer
from mxq.scheme import Scheme

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Choices:
    """What is chosen by name, resolved: a user's own callables stand in here."""

    quantizer: Quantizer
    sensitivity: Sensitivity


def measure_settings(
    adapter: ModelAdapter, options: MeasureOptions, choices: Choices | None
) -> MeasureSettings:
    """Options with their names resolved.

    Raises:
        ValueError: If a name is not on its menu, or the quantizer needs more than the sensitivity
            finds.
    """
    if choices is None and OWN in (options.quantizer, options.sensitivity):
        raise ValueError(
            "this work folder was measured with a quantizer or sensitivity of the caller's own, "
            "which no file can hold; call mxq.quantize with it again"
        )
    widths = {block.in_features for block in adapter.blocks()}
    others = options.schemes or default_schemes(widths)
    listed = {scheme for menu in options.by_projection.values() for scheme in menu}
    projections = {block.projection for block in adapter.blocks()}
    own = choices or Choices(
        pick(QUANTIZERS, "quantizer", options.quantizer),
        pick(SENSITIVITY, "sensitivity", options.sensitivity),
    )
    method = Method(options.quantizer, own.quantizer)
    if method.reads_gradients and not own.sensitivity.needs_gradients:
        raise ValueError(
            f"the quantizer {options.quantizer} needs gradients, which the sensitivity "
            f"{options.sensitivity} does not take; choose --sensitivity fisher, or --quantizer "
            "refined"
        )
    return MeasureSettings(
        schemes=tuple(sorted({*others, *listed})),
        sensitivity=own.sensitivity,
        metric_name=options.sensitivity,
        method=method,
        rotation=options.rotation,
        offered=_offered(options, others, projections),
    )


def _offered(
    options: MeasureOptions, others: tuple[Scheme, ...], projections: set[str]
) -> dict[str, tuple[Scheme, ...]]:
    """Candidates by projection, if the options tell projections apart."""
    if not options.by_projection:
        return {}
    return {**dict.fromkeys(sorted(projections), others), **options.by_projection}


def pick(menu: Mapping[str, Entry], what: str, name: str) -> Entry:
    """The entry of that name.

    Raises:
        ValueError: With the menu, if there is none.
    """
    if name not in menu:
        raise ValueError(f"{what} {name!r} is unknown; choose one of {', '.join(sorted(menu))}")
    return menu[name]
