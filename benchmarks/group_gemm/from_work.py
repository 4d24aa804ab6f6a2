"""Write ``allocations.json`` and ``routing.json`` from a work folder of mxq and plans made in it.

mxq measure MODEL --work WORK ...
mxq allocate WORK --bits 4.15625; cp WORK/allocation.json w4-size.json
python benchmarks/group_gemm/from_work.py WORK --about "which model" NAME=w4-size.json ...
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Read the artifacts and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("plans", nargs="+", help="NAME=FILE of an allocation")
    parser.add_argument("--about", required=True, help="which model and which calibration text")
    arguments = parser.parse_args()
    mixes = {}
    for entry in arguments.plans:
        name, _, path = entry.partition("=")
        content = _content(Path(path))
        mixes[name] = {
            "asked_bits": content["asked_bits"],
            "bits": content["storage_bits"] / content["weights"],
            "description": content["description"],
            "layers": _layers(content["schemes"]),
        }
    sites = _content(arguments.work / "profile.json")["sites"]
    layers = [
        [sum(domains) for domains in site["tokens"]]
        for site in sites
        if site["site"].endswith(".experts")
    ]
    _write("allocations.json", {"about": arguments.about, "mixes": mixes})
    _write("routing.json", {"about": arguments.about, "layers": layers})


def _layers(schemes: dict[str, str]) -> list[dict[str, dict[str, int]]]:
    """``projection -> scheme -> experts`` of each layer."""
    found: dict[int, dict[str, dict[str, int]]] = defaultdict(dict)
    for block, scheme in sorted(schemes.items()):
        words = block.split(".")
        if words[2:3] == ["experts"]:
            counts = found[int(words[1])].setdefault(words[-1], {})
            counts[scheme] = counts.get(scheme, 0) + 1
    return [found[layer] for layer in sorted(found)]


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())["content"]
    return content


def _write(name: str, content: dict[str, Any]) -> None:
    (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
