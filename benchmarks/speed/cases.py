"""Cases: a tool on a model, and the job that its runner gets. Pure: no file is read here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMES = (
    *("w2a16_g64_asym", "w2a16_g128_asym", "w3a16_g64_asym", "w3a16_g128_asym"),
    *("w4a16_g128_asym", "w5a16_g128_asym", "w6a16_g128_asym", "w8a16_g128_asym"),
)
"""Candidates of mxq."""

RANDOM_SCHEMES = ("w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym", "w8a16_g128_asym")
"""Fewer on the random model, so that the case takes minutes, unless all are asked for."""

PRESETS = ("W2A16G64", "W2A16", "W3A16G64", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
"""AutoScheme's own presets of the same bits and groups; they are symmetric."""

ONE_SCHEME = "w4a16_g128_sym"
"""What llm-compressor gives every linear, and mxq in its case of one scheme."""

SCORED_BY_DEFAULT = (16, 128)
"""Samples and tokens on which AutoScheme scores a mixture of experts unless told otherwise."""

BATCH_TOKENS = 4096
"""Tokens that llm-compressor passes at a time, as mxq does."""

ORDER = (
    *("small/mxq", "small/autoround", "small/llmcompressor", "random/mxq"),
    *("small/mxq-one-scheme", "small/mxq-balanced", "small/mxq-best"),
    *("small/autoround-default-scoring", "random/llmcompressor"),
)
"""Cases in order of importance; ``random/llmcompressor`` runs only when it is asked for."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """Samples, tokens of each, and how many of the schemes are offered."""

    small_samples: int = 128
    random_samples: int = 16
    seqlen: int = 512
    schemes: int = len(SCHEMES)
    all_on_random: bool = False
    bits: float = 3.25
    threads: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError for amounts with which the tools would not see the same tokens."""
        for samples in (self.small_samples, self.random_samples):
            if samples < 8 or samples % 8 != 0:
                raise ValueError(
                    f"{samples} samples: give a multiple of 8, of which mxq holds out one for "
                    "every eight"
                )

    def samples(self, case: str) -> int:
        """Samples of the case's model."""
        return self.small_samples if case.startswith("small/") else self.random_samples

    def mxq_schemes(self, case: str) -> list[str]:
        """Candidates of mxq on the case's model."""
        if case.startswith("small/") or self.all_on_random:
            return list(SCHEMES[: self.schemes])
        return list(RANDOM_SCHEMES[: self.schemes])

    def as_settings(self) -> dict[str, Any]:
        """What a results file is bound to."""
        return {
            **asdict(self),
            "mxq_schemes": self.mxq_schemes("small/mxq"),
            "random_schemes": self.mxq_schemes("random/mxq"),
            "autoround_schemes": list(PRESETS[: self.schemes]),
            "one_scheme": ONE_SCHEME,
        }


def tool_of(case: str) -> str:
    """mxq, autoround or llmcompressor."""
    return case.partition("/")[2].partition("-")[0]


def make_job(case: str, amounts: Amounts, *, model: Path, tokens: Path, room: Path) -> dict:
    """The job of a case, of plain JSON values."""
    job: dict[str, Any] = {
        "model": str(model),
        "tokens": str(tokens),
        "output": str(room / "out"),
        "row": str(room / "row.json"),
        "threads": amounts.threads,
    }
    match tool_of(case):
        case "mxq":
            plan = f"uniform:{ONE_SCHEME}" if case.endswith("-one-scheme") else None
            bits = amounts.bits if plan is None else None
            schemes = [] if plan else amounts.mxq_schemes(case)
            # Its default effort does more than the peers do here: a case of its own.
            kind = case.rpartition("-")[2]
            effort = kind if kind in ("balanced", "best") else "fast"
            return {**job, "plan": plan, "bits": bits, "schemes": schemes, "effort": effort}
        case "autoround":
            scored = (amounts.samples(case), amounts.seqlen)
            if case.endswith("-default-scoring"):
                scored = SCORED_BY_DEFAULT
            return {
                **job,
                "task": "quantize",
                "bits": amounts.bits,
                "schemes": list(PRESETS[: amounts.schemes]),
                "scored_samples": min(scored[0], amounts.samples(case)),
                "scored_seqlen": min(scored[1], amounts.seqlen),
            }
        case "llmcompressor":
            scheme = {"num_bits": 4, "symmetric": True, "group_size": 128}
            rows = max(1, BATCH_TOKENS // amounts.seqlen)
            return {**job, "scheme": scheme, "batch_rows": rows}
    raise ValueError(f"case {case!r} is of no tool here")


def chosen_cases(only: str, *, random_peer: bool) -> list[str]:
    """Cases whose name contains the text."""
    cases = [case for case in ORDER if random_peer or case != "random/llmcompressor"]
    return [case for case in cases if only in case]


def shares(
    clock: Sequence[Mapping[str, Any]], by: str, seconds: str = "wall_s"
) -> dict[str, float]:
    """Share of the time by ``stage`` or ``part``; they sum up to 1."""
    total = sum(row[seconds] for row in clock)
    found: dict[str, float] = {}
    for row in clock:
        found[row[by]] = found.get(row[by], 0.0) + row[seconds] / total
    return found
