"""AutoRound: AutoScheme chooses widths, then export without tuning (``iters=0``).

Run by the python of its own environment (requirements beside this file): a job (JSON) on the
standard input, a row to the file that the job names. Its data loader is replaced by one over the
token ids of the job, because AutoScheme takes the name of a data set and nothing else; everything
that the job does not name is at its default.
"""

import sys
import time
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

import auto_round.auto_scheme.delta_loss as scoring  # noqa: E402  (imports are timed)
import torch  # noqa: E402
from auto_round import AutoRound, AutoScheme, calib_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Stopwatch, calibration, mean_nll, read_job, versions, write_row  # noqa: E402

_IMPORTED = time.perf_counter()


def main() -> None:
    """Quantize, or evaluate what an earlier process has written."""
    job = read_job()
    write_row(job, evaluate(job) if job["task"] == "evaluate" else quantize(job))


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Choose schemes and export; the evaluation is a job of its own, for a process of its own."""
    fit, _ = calibration(job)
    served = serve(fit)
    watch = Stopwatch()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    watch.step("load")
    scheme = AutoScheme(
        avg_bits=job["bits"],
        options=job["schemes"],
        nsamples=job["scored_samples"],
        seqlen=job["scored_seqlen"],
    )
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        iters=0,
        nsamples=len(fit),
        seqlen=fit.shape[1],
        device_map="cpu",
    )
    watch.step("set up")
    rounder.quantize()
    watch.step("AutoScheme and rounding")
    rounder.save_quantized(job["output"], format="auto_round")
    watch.step("export")
    return {
        "import_s": _IMPORTED - _STARTED,
        **watch.row(),
        "served": served,
        "layers": _widths(rounder.layer_config),
        "versions": versions("auto-round"),
    }


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Nats per token of the exported model on held-out ids."""
    _, heldout = calibration(job)
    model = AutoModelForCausalLM.from_pretrained(job["output"], dtype=torch.float32)
    return {"nll": mean_nll(model.eval(), heldout)}


def serve(fit: torch.Tensor) -> list[list[int]]:
    """Make every data loader give rows of ``fit``; the shapes that were asked for."""
    served: list[list[int]] = []

    def get_dataloader(
        tokenizer: object, seqlen: int, *args: object, bs: int = 8, nsamples: int = 512, **_: object
    ) -> list[dict[str, torch.Tensor]]:
        rows = fit[:nsamples, :seqlen]
        served.append([*rows.shape])
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(bs)
        ]

    calib_dataset.get_dataloader = get_dataloader
    scoring.get_dataloader = get_dataloader
    return served


def _widths(layer_config: dict[str, Any]) -> dict[str, int]:
    """How many layers have how many bits."""
    found: dict[str, int] = {}
    for config in layer_config.values():
        bits = config.get("bits") if isinstance(config, dict) else getattr(config, "bits", None)
        found[str(bits)] = found.get(str(bits), 0) + 1
    return found


if __name__ == "__main__":
    main()
