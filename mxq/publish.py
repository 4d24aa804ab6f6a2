"""The last step of a run: the chosen checkpoint moves into the output folder, config.json last."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from mxq.artifacts import Allocation
from mxq.config import OutputOptions
from mxq.heldout import MeasuredLoss
from mxq.storage import save_artifact


def check_output(options: OutputOptions) -> None:
    """Raise ValueError if the output folder holds something that a run would spoil."""
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for --output")
    if folder.is_dir() and not options.overwrite:
        taken = sorted(path.name for path in folder.iterdir() if path.name != "work")
        if taken:
            raise ValueError(
                f"{folder} is not empty (it holds {taken[0]}); choose another --output, or allow "
                "--overwrite"
            )


def check_apart(options: OutputOptions, source: Path) -> None:
    """Raise ValueError if the output folder is the model's own."""
    if options.output.resolve() == source.resolve():
        raise ValueError(f"--output is {source}, the model's own folder; give another")


def publish(
    options: OutputOptions,
    folder: Path,
    written: str,
    plans: Mapping[str, Allocation],
    losses: Mapping[str, MeasuredLoss],
) -> None:
    """Move the chosen checkpoint into the output folder, config.json last.

    Weights and their index that the folder held before go; other files stay.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "config.json").unlink(missing_ok=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for stale in options.output.glob(pattern):
            stale.unlink()
    chosen = sorted(folder.iterdir(), key=lambda path: path.name == "config.json")
    save_artifact(options.output / "mxq_plan.json", plans[written])
    facts = {name: _facts(plans[name], losses[name], name == written) for name in plans}
    (options.output / "mxq_report.json").write_text(
        json.dumps(facts, indent=1, allow_nan=False) + "\n"
    )
    for path in chosen:
        shutil.move(path, options.output / path.name)


def _facts(plan: Allocation, loss: MeasuredLoss, written: bool) -> dict[str, object]:
    return {
        "written": written,
        "description": plan.description,
        "bits_asked": plan.asked_bits,
        "bits_per_weight": plan.bits_per_weight,
        "predicted_loss": plan.predicted_loss,
        "unit": plan.unit,
        "heldout_tokens": loss.tokens,
        "kl": loss.kl,
        "nll": loss.nll,
        "original_nll": loss.original_nll,
        "top1_agreement": loss.top1_agreement,
    }
