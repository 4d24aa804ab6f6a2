"""Text of the embedded model's domains as files, for the accuracy benchmarks: FOLDER gets them.

    python benchmarks/write_demo_texts.py FOLDER

writes ``<domain>-calibration.txt`` and ``<domain>-heldout.txt``, which share no document.
"""

import argparse
from pathlib import Path

from mxq.demo.corpus import DOMAINS, documents

DOCUMENTS = 400
"""In each file."""


def main() -> None:
    """Write two files for each domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("calibration", "heldout"):
        for domain in DOMAINS:
            texts = (document.text for document in documents(split, DOCUMENTS, domain=domain))
            (folder / f"{domain}-{split}.txt").write_text("\n\n".join(texts))


if __name__ == "__main__":
    main()
