"""Text of the device functions that turn packed words into matrix operands, in two dialects.

A word holds codes of one thread of the matrix instruction (see ``mxq.kernels.layout``), so a mask
and an OR give a register that already is a pair of bfloat16 or four int8 of its operand.

bfloat16 has 7 bits below its leading one, so ``0x4300 | q << f`` is the number ``128 + q * 2**f``
for any field that ends below bit 7. One fused multiply-add then gives ``q - zero`` exactly:
``(128 + q * 2**f) * 2**-f + offset``, with the offset ``-(2**(7-f) + zero)``. Every value on the
way is an integer below 256, which bfloat16 holds.
"""

from mxq.kernels.dequant_plain import render_plain
from mxq.kernels.dequant_ptx import render_ptx
from mxq.kernels.spec import Dialect, WeightFormat


def render_unpack(form: WeightFormat, dialect: Dialect) -> str:
    """The device function that unpacks planes, [128, 128] in logical order.

    "centred": ``(planes..., offset) -> code - zero`` in bfloat16, with ``offset`` [128, 1] of
    ``-(128 + zero)``, or ``-zero`` for 8 bits. "raised": ``(planes...) -> 128 + code``, or
    ``code`` for 8 bits. "int8": ``(planes...) -> code``.
    """
    if dialect != "ptx":
        return render_plain(form)
    return render_ptx(form)
