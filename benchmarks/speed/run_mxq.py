"""One run of mxq in this process: a job (JSON) on the standard input, a row to a file.

    python benchmarks/speed/run_mxq.py < job.json

Loading is no step of its own: mxq reads each layer when its turn comes, and the clock has that time
as the part "load weights".
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

import torch  # noqa: E402  (imports are timed)
from safetensors.torch import load_file  # noqa: E402

import mxq  # noqa: E402
import mxq.pipeline  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed.clock import Clock, install  # noqa: E402

_IMPORTED = time.perf_counter()


def main() -> None:
    """Run the job that the standard input describes."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    Path(job["row"]).write_text(json.dumps(run(job)))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize every linear of the decoder layers; options that are not given have defaults."""
    tokens = load_file(job["tokens"])
    output = Path(job["output"])
    clock = Clock()
    install(clock)
    started, before = time.perf_counter(), os.times()
    result = mxq.quantize(
        job["model"],
        output=output,
        bits=job["bits"],
        plan=job["plan"],
        scope="all",
        calibration=tokens["all"],
        samples=len(tokens["fit"]),
        seqlen=tokens["fit"].shape[1],
        schemes=",".join(job["schemes"]),
        effort=job["effort"],
    )
    total = time.perf_counter() - started
    after = os.times()
    used = load_file(output / "work" / "calibration.safetensors")
    if not all(torch.equal(used[part], tokens[part]) for part in ("fit", "heldout")):
        raise SystemExit("mxq did not calibrate on the tokens that the peers are given")
    loss = result.losses[result.written]
    return {
        "import_s": _IMPORTED - _STARTED,
        "total_s": total,
        "processor_s": after.user + after.system - before.user - before.system,
        "system_s": after.system - before.system,
        "clock": clock.rows(),
        "bits": result.plans[result.written].bits_per_weight,
        "written": result.written,
        "nll": loss.nll,
        "original_nll": loss.original_nll,
        "quantized_weights": result.plans[result.written].weights,
        "versions": {"mxq": mxq.__version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    main()
