"""llm-compressor: GPTQ of every linear with one scheme.

Run by the python of its own environment (requirements beside this file): a job (JSON) on the
standard input, a row to the file that the job names. Everything that the job does not name is at
its default.
"""

import sys
import time
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402  (imports are timed)
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modeling.moe.linearize import linearize_moe  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Stopwatch, calibration, mean_nll, read_job, versions, write_row  # noqa: E402

_IMPORTED = time.perf_counter()

IGNORED = ("lm_head", "re:.*gate$")
"""Routers and the head stay as they are, for all tools."""


def main() -> None:
    """Quantize; held-out loss is taken before the file is written, and not timed."""
    job = read_job()
    write_row(job, quantize(job))


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a run."""
    fit, heldout = calibration(job)
    watch = Stopwatch()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    linearize_moe(model)
    watch.step("load")
    weights = QuantizationArgs(type="int", strategy="group", **job["scheme"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": fit.tolist()}),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=list(IGNORED)),
        max_seq_length=fit.shape[1],
        num_calibration_samples=len(fit),
        shuffle_calibration_samples=False,
        batch_size=job["batch_rows"],
    )
    watch.step("calibrate and quantize")
    model.save_pretrained(job["output"], save_compressed=True)
    watch.step("save")
    row = {"import_s": _IMPORTED - _STARTED, **watch.row()}
    return {**row, "nll": mean_nll(model.eval(), heldout), "versions": _versions()}


def _versions() -> dict[str, str]:
    return versions("llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()
