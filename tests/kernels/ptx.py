"""Runs the text of generated device functions without Triton and without a GPU.

``load_functions`` executes a generated module with a stand-in for ``triton.language`` that computes
on numpy arrays; its ``inline_asm_elementwise`` parses the PTX and runs it on registers of 32 bits.
A tensor is a ``Value``: bfloat16 is held as its bits, so that nothing is rounded unseen.
"""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

# --- Instructions ---


def _fma_bf16x2(a, b, c):
    halves = [
        bf16_bits(fused(*(bf16_values((register >> shift) & 0xFFFF) for register in (a, b, c))))
        for shift in (0, 16)
    ]
    return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << 16)


def _lop3(a, b, c, table):
    """Bit i of the table is the result where (a, b, c) are the binary digits of i."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma_bf16x2,
}


def bf16_values(bits):
    """float64 of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bf16_bits(values):
    """uint16 bits of the nearest bfloat16, ties to even; subnormal numbers are kept."""
    values = np.asarray(values, dtype=np.float64)
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - 8, -133)  # 8 significant bits, or the least subnormal number
    # What passes the largest bfloat16 is a float32 too, or overflows to infinity as it should.
    rounded = np.ldexp(np.rint(np.ldexp(values, -step)), step).astype(np.float32)
    return (rounded.view(np.uint32) >> 16).astype(np.uint16)


def fused(a, b, c):
    """a * b + c of bfloat16 values in float64, rounded to odd, so that it can be rounded again."""
    product = a * b  # 16 significant bits: exact
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)  # what the sum lacks (Knuth's TwoSum)
    is_even = (total.view(np.uint64) & 1) == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & is_even, odd, total)


# --- One asm text ---


@dataclass(frozen=True, slots=True)
class Instruction:
    operation: str
    target: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asm:
    """The instructions of a text, and the constraints of its operands $0, $1, ..."""

    instructions: tuple[Instruction, ...]
    constraints: tuple[str, ...]

    @property
    def outputs(self):
        return [f"${i}" for i, text in enumerate(self.constraints) if text.startswith("=")]

    @property
    def inputs(self):
        return [f"${i}" for i, text in enumerate(self.constraints) if not text.startswith("=")]

    @property
    def must_be_early(self):
        """Outputs that are written while an input, which may share their register, is needed."""
        reads = [
            i for i, line in enumerate(self.instructions) for s in line.sources if s in self.inputs
        ]
        writes = {}
        for i, line in enumerate(self.instructions):
            writes.setdefault(line.target, i)
        return [name for name in self.outputs if writes[name] < max(reads)]

    @property
    def marked_early(self):
        return [f"${i}" for i, text in enumerate(self.constraints) if text == "=&r"]


def parse_asm(text, constraints):
    """Raises AssertionError for a name that is not declared, or read before it is written."""
    text = text.strip()
    assert text.startswith("{"), text
    assert text.endswith("}"), text
    constraints = tuple(constraints.split(","))
    assert set(constraints) <= {"=r", "=&r", "r"}, constraints
    declared, instructions = set(), []
    written = {f"${i}" for i, kind in enumerate(constraints) if kind == "r"}
    for statement in text[1:-1].split(";"):
        operation, _, rest = statement.strip().partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if operation == ".reg":
            names[0] = names[0].removeprefix(".b32 ")
            assert not declared & set(names), f"declared twice: {names}"
            declared |= set(names)
        elif operation:
            target, *sources = names
            for name in sources:
                assert _is_number(name) or name in written, f"{name} is read before: {statement}"
            assert target in declared or target in _operands(constraints, "=r", "=&r"), statement
            written.add(target)
            instructions.append(Instruction(operation, target, tuple(sources)))
    missing = _operands(constraints, "=r", "=&r") - written
    assert not missing, f"never written: {missing}"
    return Asm(tuple(instructions), constraints)


def run_asm(asm, registers):
    """Output registers, uint32 arrays, from the input registers."""
    values = dict(zip(asm.inputs, registers, strict=True))
    like = np.zeros_like(registers[0])
    for line in asm.instructions:
        sources = [
            like + np.uint32(int(name, 0)) if _is_number(name) else values[name]
            for name in line.sources
        ]
        if line.operation == "lop3.b32":
            sources[3] = int(line.sources[3], 0)
        values[line.target] = OPERATIONS[line.operation](*sources)
    return [values[name] for name in asm.outputs]


def _operands(constraints, *kinds):
    return {f"${i}" for i, kind in enumerate(constraints) if kind in kinds}


def _is_number(name):
    return re.fullmatch(r"0x[0-9A-F]+|\d+", name) is not None


# --- Tensors: as much of triton.language as the functions use ---


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor; ``bits`` is uint16 for bfloat16, else an array of the type itself."""

    bits: np.ndarray
    dtype: str

    @property
    def shape(self):
        return self.bits.shape

    def to(self, dtype, bitcast=False):
        if bitcast:
            view = np.uint16 if dtype == "bf16" else dtype
            return Value(np.ascontiguousarray(self.bits).view(view), dtype)
        number = bf16_values(self.bits) if self.dtype == "bf16" else self.bits
        if dtype == "bf16":
            return Value(bf16_bits(number), dtype)
        return Value(number.astype(dtype), dtype)

    def __getitem__(self, index):
        return Value(self.bits[index], self.dtype)

    def __add__(self, other):
        if self.dtype == "bf16":  # with a constant, which takes the type of the tensor
            constant = bf16_values(bf16_bits(float(other)))
            return Value(bf16_bits(bf16_values(self.bits) + constant), "bf16")
        right = other.bits if isinstance(other, Value) else np.float32(other)
        return Value(self.bits + right, self.dtype)

    def __mul__(self, factor):
        return Value(self.bits * np.int32(factor), self.dtype)

    def __rshift__(self, count):
        return Value(self.bits >> count, self.dtype)

    def __lshift__(self, count):
        return Value(self.bits << count, self.dtype)

    def __and__(self, mask):
        return Value(self.bits & np.int32(mask), self.dtype)

    def __or__(self, other):
        return Value(self.bits | other.bits, self.dtype)


def _join(a, b):
    assert a.dtype == b.dtype
    return Value(np.stack([a.bits, b.bits], -1), a.dtype)


class Emulator:
    """``load`` gives the functions of a generated module; ``asms`` collects what they ran."""

    def __init__(self):
        self.asms = []

    def load(self, source):
        """The names of a module, with ``triton`` and ``tl`` replaced."""
        names = {"triton": SimpleNamespace(jit=lambda function: function), "tl": self._language()}
        text = re.sub(r"^import triton.*$", "", source, flags=re.MULTILINE)
        exec(text, names)
        return names

    def _language(self):
        return SimpleNamespace(
            constexpr=int,
            bfloat16="bf16",
            float32="float32",
            int8="int8",
            int16="int16",
            uint16="uint16",
            int32="int32",
            broadcast_to=lambda x, shape: Value(np.broadcast_to(x.bits, shape), x.dtype),
            join=_join,
            permute=lambda x, order: Value(x.bits.transpose(order), x.dtype),
            reshape=lambda x, shape: Value(x.bits.reshape(shape), x.dtype),
            inline_asm_elementwise=self._run_inline,
        )

    def _run_inline(self, asm, constraints, args, dtype, is_pure, pack):
        """Each program runs the text on ``pack`` elements of every tensor at a time.

        Which ones a thread has next to each other is a matter of layouts that the text does not
        choose: in the operand of a matrix instruction they are of different rows. So any.
        """
        assert is_pure
        parsed = parse_asm(asm, constraints)
        self.asms.append(parsed)
        shape = np.broadcast_shapes(*(value.shape for value in args))
        order = np.random.default_rng(0).permutation(int(np.prod(shape)))
        registers = [
            register
            for value in args
            for register in _to_registers(np.broadcast_to(value.bits, shape).flat[order], pack)
        ]
        outputs = run_asm(parsed, registers)
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        results, storage = [], {"bf16": np.uint16, "int8": np.int8, "int32": np.int32}
        for kind in dtypes:
            taken = pack * storage[kind]().itemsize // 4
            words = np.stack(outputs[:taken], -1)
            found = np.empty(shape, storage[kind])
            found.flat[order] = words.view(storage[kind]).ravel()
            results.append(Value(found, kind))
            outputs = outputs[taken:]
        assert not outputs, "more registers than the results have"
        return tuple(results) if isinstance(dtype, tuple) else results[0]


def _to_registers(bits, pack):
    """Neighbours side by side in registers, the first one lowest."""
    words = np.ascontiguousarray(bits).reshape(-1, pack).view(np.uint32)
    return [words[:, i].copy() for i in range(words.shape[1])]
