"""Time the products of experts on packed weights: schemes, mixes, routings, launches, and peers.

On a machine with a CUDA GPU, from the root of the repository, with mxq installed (or PYTHONPATH=.):

    python benchmarks/bench_group_gemm.py --json benchmarks/results/group-gemm-h200.json

It first compares every format and tile plan with the float32 definition on the device, in several
processes (which also fills Triton's cache), and refuses to time what differs. Then it times the
cases in order of importance and writes the file after each, until ``--minutes`` are spent; run it
again with the same file to go on where it stopped, also after an interruption. The last output is a
table of goals; ``--goals-only`` prints it again from a file.

A time is the median over replays of a CUDA graph that launches the case on at least 4 copies of the
weights (more, until 240 MB of those that it reads take turns), so that the cache holds none of
them. A "pair" is both products of a layer on inputs that are there: routing, tile tables, rounding
of inputs, the activation, and the sum of slices or of experts are left out, for peers too. A
"layer" is all of that. Clocks are read, never set. Peers are optional (README.md beside this file).

``--dry-run`` does everything on tiny shapes on the CPU in Triton's interpreter and times nothing:
its rows have no times, and it refuses to write under results/.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    """Check, time, judge; the exit status is 1 if a check failed or a case of ours was refused."""
    arguments = _arguments()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before imports
    from group_gemm.checks import check_worker
    from group_gemm.run import Options, run

    if arguments.check is not None:
        check_worker(*arguments.check)
        return 0
    return run(
        Options(
            arguments.json,
            arguments.minutes,
            arguments.workers,
            arguments.only,
            is_dry=arguments.dry_run,
            goals_only=arguments.goals_only,
            retry=arguments.retry,
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="results file, continued if it is there")
    parser.add_argument("--minutes", type=float, default=18.0, help="of this run, checks included")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--only", default="", help="cases whose key contains this text")
    parser.add_argument("--goals-only", action="store_true", help="judge a file, time nothing")
    parser.add_argument("--retry", action="store_true", help="failed checks and left out cases")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, without times")
    parser.add_argument("--check", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check is None and arguments.json is None:
        parser.error("name the results file with --json")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
