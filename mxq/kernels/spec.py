"""What a generated kernel is made of: weight formats, tile shapes, and why a scheme is refused.

A *format* is what the inner loop sees of a scheme: the grid's symmetry is gone, because the zero
point is data. A *branch* is the loop for one format and one tile shape; a kernel holds the branches
that a layer needs and picks one for every tile at run time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mxq.scheme import Scheme

UNIT = 128
"""Inputs in one unit of kernel order, and in one step of a loop over K (bf16 takes half of it)."""

ROW_TILE = 128
"""Output features of a tile; a weight is padded to a multiple of it when it is loaded."""

HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on a Hopper GPU."""

Input = Literal["bf16", "int8", "int4", "fp8"]
"""What the input of a product is made of; int4 is rounded to 4 bits and computed as int8."""

Dialect = Literal["ptx", "plain", "interpreted"]
"""Device functions as inline PTX, or in plain Triton for targets without that form.

"interpreted" is plain with float32 operands of every product: Triton's interpreter multiplies the
bit patterns of bfloat16.
"""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Code width, input, and where the scale is applied.

    ``group_size`` None means one scale for an output row, applied after the loop.
    """

    w_bits: int
    input: Input
    group_size: int | None = None

    def __str__(self) -> str:
        if self.w_bits == 16:
            return "bf16"
        if self.input == "fp8":
            return "fp8"
        a_bits = {"bf16": 16, "int8": 8, "int4": 4}[self.input]
        return f"w{self.w_bits}a{a_bits}_g{self.group_size or 'row'}"

    def __lt__(self, other: "WeightFormat") -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[int, str, int]:
        return self.w_bits, self.input, self.group_size or 0

    @property
    def is_integer(self) -> bool:
        """Whether weights are codes on a grid, not floats."""
        return self.w_bits != 16 and self.input != "fp8"

    @property
    def arithmetic(self) -> Literal["bf16", "int8", "fp8"]:
        """The type that the matrix instruction multiplies."""
        return "int8" if self.input == "int4" else self.input

    @property
    def step(self) -> int:
        """Inputs that one step of the loop over K takes."""
        return UNIT // 2 if self.w_bits == 16 else UNIT

    @property
    def step_bytes(self) -> int:
        """Bytes of one output row in one step."""
        return self.step * self.w_bits // 8


def format_of(scheme: Scheme) -> WeightFormat:
    """The kernel format of a scheme.

    Raises:
        ValueError: If no kernel serves it, with the reason and what to use instead.
    """
    if scheme.kind == "bf16":
        return WeightFormat(16, "bf16")
    if scheme.kind == "fp8":
        return WeightFormat(8, "fp8")
    reason = _refusal(scheme)
    if reason is not None:
        raise ValueError(f"no kernel computes {scheme}: {reason}")
    inputs: dict[int, Input] = {16: "bf16", 8: "int8", 4: "int4"}
    return WeightFormat(scheme.w_bits, inputs[scheme.a_bits], scheme.group_size)


def _refusal(scheme: Scheme) -> str | None:
    if scheme.a_bits == 16 or scheme.group_size is None:
        return None
    if scheme.group_size != UNIT:
        return (
            f"integer products are rescaled once for {UNIT} inputs; use g{UNIT} or grow "
            "with 4- and 8-bit inputs"
        )
    if scheme.w_bits == 8 and not scheme.symmetric:
        return "code minus zero does not fit in int8; use a symmetric grid or grow"
    return None


@dataclass(frozen=True, slots=True)
class Branch:
    """The loop for one format: tile of ``tokens`` x 128 outputs, ``stages`` of its pipeline."""

    format: WeightFormat
    tokens: int
    stages: int

    def __str__(self) -> str:
        return f"{self.format}/{self.tokens}"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One generated kernel; its text is a function of these fields and nothing else.

    ``max_registers`` caps the registers of a thread (None leaves it to the compiler).
    """

    branches: tuple[Branch, ...]
    num_warps: int
    max_registers: int | None = None
    has_bias: bool = False
    dialect: Dialect = "ptx"

    def __post_init__(self) -> None:
        """Raise ValueError for a kernel without branches, or with the same one twice."""
        if not self.branches:
            raise ValueError("a kernel needs at least one branch")
        names = [str(branch) for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError(f"a branch is there twice: {', '.join(names)}")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Kinds of input that the branches read, each once, in a fixed order."""
        used = {branch.format.input for branch in self.branches}
        order: tuple[Input, ...] = ("bf16", "int8", "int4", "fp8")
        return tuple(kind for kind in order if kind in used)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How the kernels of one workload are shaped: chosen by the tokens that an expert gets."""

    name: str
    tokens: int
    num_warps: int
    max_registers: int | None
    ctas_per_sm: int
    most_tokens: float


# From kernels compiled for sm_90 (docs/results.md has the table): 4 warps keep 3 or more programs
# on a multiprocessor while the weights stream; tiles of more tokens need 8 warps not to spill.
TILE_PLANS = (
    TilePlan("decode", 16, 4, 128, 4, 24.0),
    TilePlan("middle", 64, 8, 128, 2, 96.0),
    TilePlan("prefill", 128, 8, None, 1, float("inf")),
)


def tile_plan(tokens_per_expert: float) -> TilePlan:
    """The plan for that many tokens at an average expert that is reached."""
    return next(plan for plan in TILE_PLANS if tokens_per_expert <= plan.most_tokens)


def make_spec(
    formats: Iterable[WeightFormat],
    plan: TilePlan,
    *,
    has_bias: bool = False,
    dialect: Dialect = "ptx",
    shared_bytes: int = HOPPER_SHARED_BYTES,
) -> KernelSpec:
    """The kernel for these formats under a plan, one branch for each format.

    ``shared_bytes`` is what a program may have on the GPU.
    """
    branches = tuple(
        Branch(form, plan.tokens, stages(form, plan, shared_bytes)) for form in sorted(set(formats))
    )
    # Before Hopper and on consumer Blackwell, which have less shared memory, both operands and the
    # sums of a product are in registers: tiles of 64 tokens would spill under the cap.
    is_capped = plan.name == "decode" or shared_bytes >= HOPPER_SHARED_BYTES
    max_registers = plan.max_registers if is_capped else None
    return KernelSpec(branches, plan.num_warps, max_registers, has_bias, dialect)


def stages(form: WeightFormat, plan: TilePlan, shared_bytes: int = HOPPER_SHARED_BYTES) -> int:
    """Depth of the load pipeline: all branches hold about as many bytes in flight.

    Shared memory of a kernel is that of its largest branch, so one deep branch would cost all the
    others their second and third program on a multiprocessor.
    """
    step_bytes = 128 * form.step_bytes + plan.tokens * form.step * _input_bytes(form)
    # Where unpacked weights do not stay in registers (before Hopper), they take the other half.
    budget = min(_STAGE_BYTES[plan.name], shared_bytes // 2)
    for depth in (4, 3):
        if depth * step_bytes <= budget:
            return depth
    return 2


_STAGE_BYTES = {"decode": 60 * 1024, "middle": 96 * 1024, "prefill": 112 * 1024}


def _input_bytes(form: WeightFormat) -> int:
    return 2 if form.input == "bf16" else 1


def single_specs(spec: KernelSpec) -> tuple[KernelSpec, ...]:
    """One kernel for each format of a kernel: the launch-per-scheme baseline."""
    forms = sorted({branch.format for branch in spec.branches})
    return tuple(
        replace(spec, branches=tuple(b for b in spec.branches if b.format == form))
        for form in forms
    )


PROBLEM_FIELDS = ("w_off", "meta_off", "n", "n_pad", "k_pad", "column", "expert", "bias_off")
"""Columns of a problem table; offsets in bytes of words, items of metadata and of biases."""

TILE_FIELDS = ("branch", "problem", "row0", "nrows", "n0", "unit0", "units", "slices")
"""Columns of a tile table; the last one is ``slice | slices << 8``."""
