"""One mistake of a user's: the form of the tables in ``bad_models.py`` and ``bad_requests.py``.

``says`` are the parts of the message that decide what the user does next: what was found, what was
expected, what to do. A status of 0 marks what looks like a mistake and is none.
"""

from dataclasses import dataclass

import damage
from damage import Mistake

QUANTIZE = (
    "quantize {model} --calibration file:{text} --samples 6 --seqlen 16 --quantizer rtn "
    "--sensitivity output_mse --rotation off --schemes w4a16_g32_asym,w8a16_g32_asym "
    "--output {output} --work {fresh}"
)
"""A run that is fast and ends well; a later option of the same name wins."""

RUN = QUANTIZE + " --bits 5"
AGAIN = RUN + " --work {work}"
ALLOCATE = "allocate {work} --bits 5"
PACK = "pack {work} --output {output}"
EVALUATE = "perplexity {packed} --text {text} --window 8 --device cpu"


@dataclass(frozen=True, slots=True)
class Case:
    """One mistake: what is spoiled, the command, its exit status and what it must say."""

    says: tuple[str, ...]
    command: str = RUN
    mistake: Mistake = damage.nothing
    status: int = 1
