"""Facts of runs that never were, of any size: for what a report shows, not for how it is read."""

from pathlib import Path

import numpy as np

from mxq.artifacts import (
    Allocation,
    BlockInfo,
    MeasuredLayers,
    Provenance,
    SensitivityTable,
)
from mxq.checkpoint.expert_choices import ExpertChoices
from mxq.checkpoint.pack import PackReport, plan_digest
from mxq.config import AllocateOptions, CalibrationOptions, MeasureOptions, ModelOptions
from mxq.heldout import MeasuredLoss
from mxq.profiling.activation import ActivationStats, SiteStats
from mxq.publish import RunRecord
from mxq.report.facts import Facts, PlanResult, make_cells
from mxq.report.origin import Origin
from mxq.scheme import parse_schemes
from mxq.search.allocate import allocate, best_uniform
from mxq.search.cost import CostModel
from mxq.search.device import load_device

MENU = parse_schemes("w2a16_g128_asym,w3a16_g128_asym,w4a16_g128_asym,w8a16_g128_asym,bf16")
MADE_FROM = Provenance("model", "text", {"quantizer": "gptq"}, {"mxq": "1.2.3"})
EXPERT_SHAPES = {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}
LINEAR_SHAPES = {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128)}


def make_facts(*, layers=3, experts=4, bits=3.2, name="an/original", device=None, measured=False):
    """Facts of a plan that was solved on drawn losses; no experts make a dense model."""
    draw = np.random.default_rng(7)
    table = _table(draw, layers, experts)
    options = AllocateOptions(bits=bits, solver="lagrangian", device=device, tokens=device and 64)
    prices = {"cost_model": CostModel(load_device(device)), "tokens": 64} if device else {}
    plan = allocate(table, bits=bits, solver="lagrangian", **prices)
    plans = {"plan": plan, "uniform": best_uniform(table, storage_bits=plan.storage_bits)}
    losses = {"plan": (0.0123, 2.0), "uniform": (0.0456, 2.1)}
    return Facts(
        folder=Path("/nowhere/out"),
        plan=plan,
        record=_record(plans, losses, layers if experts else 0),
        results={found: _plan_result(found, plans[found], *loss) for found, loss in losses.items()},
        cells=make_cells(plan, table),
        model_type="fancy_moe",
        origin=Origin(
            model=ModelOptions(name),
            calibration=CalibrationOptions(),
            measure=MeasureOptions(),
            allocate=options,
            guard=True,
            hub_id=name,
            auto_class="AutoModelForCausalLM",
            original_bytes=10_000_000,
            kept={"router": layers},
        ),
        table=table,
        profile=_profile(draw, layers, experts),
        layers=_layers(draw, plan, layers) if measured else None,
        has_tokenizer=True,
        notes=(),
    )


def _table(draw, layers, experts):
    blocks = []
    for layer in range(layers):
        for path, shape in LINEAR_SHAPES.items():
            site = f"layers.{layer}.{path}"
            projection = path.rpartition(".")[2]
            blocks.append(BlockInfo(site, layer, None, projection, *shape, 900, site))
        site = f"layers.{layer}.experts"
        for expert in range(experts):
            for projection, shape in EXPERT_SHAPES.items():
                block = f"{site}.{expert}.{projection}"
                blocks.append(
                    BlockInfo(block, layer, expert, projection, *shape, 100 + expert, site)
                )
    scale = draw.lognormal(-9, 1, len(blocks))
    loss = tuple(
        tuple(0.0 if s.kind == "bf16" else float(size * 4.0**-s.w_bits) for s in MENU)
        for size in scale
    )
    quantizer = tuple(("gptq",) * len(MENU) for _ in blocks)
    return SensitivityTable(
        tuple(blocks), MENU, loss, quantizer, "fisher", "nats per token", 900, (), MADE_FROM
    )


def _profile(draw, layers, experts):
    sites = tuple(
        SiteStats(
            site=f"layers.{layer}.experts",
            tokens=tuple((int(a), int(b)) for a, b in draw.integers(0, 200, (experts, 2))),
            gate_mass=tuple((float(a), float(b)) for a, b in draw.random((experts, 2))),
            coactivation_entropy=1.0,
            coactivation_entropy_max=2.0,
            input_power=(1.0,) * experts,
            inner_power=(1.0,) * experts,
            down_max=(1.0,) * experts,
        )
        for layer in range(layers if experts else 0)
    )
    cold = ("layers.0.experts.1",) if experts else ()
    return ActivationStats(("code", "prose"), 900, sites, 64, (), cold, 0, "text", MADE_FROM)


def _record(plans, losses, layers):
    choices = tuple(ExpertChoices(layer, 5000, 10_000, 9000 - layer) for layer in range(layers))
    packs = {
        name: PackReport(plan.storage_bits // 8 + 1000, {"gptq": len(plan.schemes)}, (), choices)
        for name, plan in plans.items()
    }
    measured = {name: MeasuredLoss(5000, 1.9, nll, kl, 0.9) for name, (kl, nll) in losses.items()}
    return RunRecord("plan", packs, measured, {"config.json": "0"}, MADE_FROM)


def _plan_result(name, plan: Allocation, kl, nll):
    return PlanResult(
        written=name == "plan",
        description=plan.description,
        bits_asked=plan.asked_bits,
        bits_per_weight=plan.bits_per_weight,
        predicted_loss=plan.predicted_loss,
        unit=plan.unit,
        heldout_tokens=5000,
        kl=kl,
        nll=nll,
        original_nll=1.9,
        top1_agreement=0.9,
    )


def _layers(draw, plan, layers):
    kl = tuple(float(value) for value in draw.lognormal(-7, 1, layers))
    return MeasuredLayers(512, kl, plan_digest(plan), MADE_FROM)
