"""A small table of random losses and the work folder around it, for tests of ``mxq explore``."""

import itertools
from pathlib import Path

import numpy as np

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.config import CalibrationOptions, MeasureOptions, ModelOptions
from mxq.profiling.activation import ActivationStats
from mxq.scheme import parse_schemes
from mxq.workspace import RunSettings, Workspace

SCHEMES = parse_schemes("w2a16_g128_asym,w3a16_g128_asym,w4a16_g128_asym,w8a16_g128_asym,bf16")


def random_table(*, layers=3, experts=5, seed=0):
    """Layers of an attention output and experts, each expert with tokens of its own."""
    rng = np.random.default_rng(seed)
    blocks = []
    for layer in range(layers):
        name = f"layers.{layer}.self_attn.o_proj"
        blocks.append(BlockInfo(name, layer, None, "o_proj", 128, 128, 1000, name))
        for expert, projection in itertools.product(range(experts), ("gate", "up", "down")):
            name = f"layers.{layer}.experts.{expert}.{projection}"
            site = f"layers.{layer}.experts"
            shape = (256, 128) if projection == "down" else (128, 256)
            blocks.append(BlockInfo(name, layer, expert, projection, *shape, 10 + expert, site))
    steps = np.array([4.0**-scheme.w_bits for scheme in SCHEMES[:-1]] + [0.0])
    loss = rng.lognormal(0, 2, (len(blocks), 1)) * steps
    loss *= rng.lognormal(0, 0.2, loss.shape)
    return SensitivityTable(
        blocks=tuple(blocks),
        schemes=SCHEMES,
        loss=tuple(map(tuple, loss.tolist())),
        quantizer=tuple(("gptq",) * len(SCHEMES) for _ in blocks),
        metric="fisher",
        unit="nats per token",
        calibration_tokens=1000,
        rotated_layers=(),
        provenance=Provenance("m", "c"),
    )


def save_work(folder: Path, table, *, model="a/model"):
    """A work folder as ``mxq measure`` leaves it, without calibration tokens and profile."""
    work = Workspace(folder)
    settings = RunSettings(ModelOptions(model), CalibrationOptions(), MeasureOptions(), "m")
    folder.mkdir(parents=True, exist_ok=True)
    work.save("settings", settings)
    work.save("sensitivity", table)
    return work


def save_profile(work, sites=()):
    """The profile of a work folder, with that of some experts or none."""
    made_from = Provenance("m", "c")
    work.save("profile", ActivationStats(("x",), 9, sites, 0, (), (), 0, "c", made_from))
