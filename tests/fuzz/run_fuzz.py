"""Fuzz one target with atheris, by hand: guided by the coverage of mxq's own code.

    pip install atheris    # not a dependency; Linux, Python 3.11
    python tests/fuzz/run_fuzz.py plan_fields --inputs 100000 --json plan_fields.json

A finding stops the run; its input is written beside, to be put into ``tests/fuzz/corpus`` once the
code is fixed, where ``test_fuzz.py`` tries it for ever.
"""

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRITON_INTERPRET": "1"}

import atheris

with atheris.instrument_imports(include=["mxq"]):
    import targets
    from trial import accepts, empty_root

import torch
import transformers

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    arguments = _parser().parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    root, started = empty_root(), time.monotonic()
    counts = {"inputs": 0, "accepted": 0}

    def try_one(data: bytes) -> None:
        if counts["inputs"] == arguments.inputs:
            return  # libFuzzer counts in a way of its own
        counts["inputs"] += 1
        try:
            counts["accepted"] += accepts(arguments.target, data, root)
        except BaseException as finding:
            report(f"{type(finding).__name__}: {finding}", data)
            raise
        if counts["inputs"] == arguments.inputs:
            report("no finding", None)

    def report(outcome: str, data: bytes | None) -> None:
        shutil.rmtree(root, ignore_errors=True)
        row = {
            "target": arguments.target,
            **counts,
            "seconds": round(time.monotonic() - started, 1),
            "outcome": outcome,
            "input": None if data is None else data.hex(),
            "seed": arguments.seed,
            "atheris": version("atheris"),
        }
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")

    limits = [f"-runs={arguments.inputs + 100}", f"-timeout={targets.LIMIT_S + 1}", "-max_len=512"]
    seeds = [str(CORPUS / arguments.target)] if (CORPUS / arguments.target).is_dir() else []
    grown = arguments.json.with_suffix(".corpus")
    grown.mkdir(exist_ok=True)
    options = [
        f"-seed={arguments.seed}",
        "-print_final_stats=0",
        "-verbosity=0",
        f"-artifact_prefix={arguments.json}.",
    ]
    atheris.Setup([sys.argv[0], *limits, *options, str(grown), *seeds], try_one)
    atheris.Fuzz()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fuzz one reader of files of mxq.")
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="file for what was found")
    return parser


if __name__ == "__main__":
    main()
