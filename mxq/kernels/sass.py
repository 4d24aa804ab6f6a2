"""Loops of machine code, and what their instructions are.

The text is that of ``nvdisasm -c -g``. Loops are found in its flow graph, not by the addresses of
its jumps: ptxas moves rarely taken blocks behind the kernel, and they jump back. What is peeled
off a loop or runs ahead of it is outside. Triton always writes line numbers; they say which ``for``
of the source a loop comes from.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """One loop of the machine code, the loops inside it included.

    ``function`` and ``line`` are those of its ``for`` in the source ("" and 0: not known).
    ``opcodes`` counts instructions by first word, loads and stores also by width ("LDG.128").
    ``matrix`` counts matrix instructions by full name; ``products`` are the multiplications that
    they do in one pass for one program, None if the names do not tell. ``local`` counts loads
    and stores of local memory, where registers spill. ``holds_matrix_loop``: not the innermost.
    """

    function: str
    line: int
    depth: int
    instructions: int
    opcodes: Mapping[str, int]
    matrix: Mapping[str, int]
    products: int | None
    local: int
    holds_matrix_loop: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, the source line it comes from, and where it may go besides the next one."""

    opcode: str
    operands: str
    line: int
    is_guarded: bool
    targets: tuple[str, ...]

    @property
    def word(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies matrices: HGMMA, IGMMA, QGMMA, HMMA, IMMA, QMMA, UTCHMMA, ..."""
        return self.word.endswith("MMA")

    @property
    def ends_flow(self) -> bool:
        """Whether the next instruction is reached by jumps alone."""
        # "BRA.U UP0, `(.L_x_1)" and "BRA P1, `(.L_x_1)" are conditional without a guard.
        is_plain = self.word in ("BRX", "EXIT", "RET", "KILL") or self.operands.startswith("`")
        return not self.is_guarded and self.word in _ENDS and is_plain


_ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")
_JUMPS = ("BRA", "BRX", "JMP", "JMX", "CALL")


@dataclass(frozen=True, slots=True)
class Listing:
    """The instructions of a kernel; ``labels`` gives the index that each label stands before."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


_CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"([.$\w]+):\s*$")
_LINE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')


def parse_listing(text: str, source_name: str) -> Listing:
    """Read the output of ``nvdisasm -c -g``; lines of other files than ``source_name`` count 0.

    Raises:
        ValueError: If a jump goes where the text does not say.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    meetings: dict[str, tuple[str, ...]] = {}
    line = 0
    for row in text.splitlines():
        if found := _CODE.match(row):
            guard, opcode, operands = found.groups()
            targets = _targets(opcode, operands, meetings)
            instructions.append(Instruction(opcode, operands, line, guard is not None, targets))
        elif found := _LABEL.match(row):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(row):
            line = int(found[2]) if Path(found[1]).name == source_name else 0
    return Listing(tuple(instructions), labels)


def _targets(opcode: str, operands: str, meetings: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Labels that an instruction jumps to; ``meetings`` keeps those of open BSSY barriers."""
    word, barrier = opcode.split(".")[0], operands.split(",")[0]
    table = re.search(r"BRANCH_TARGETS ([^\"*]+)", operands)
    named = table[1].strip().split(",") if table else re.findall(r"`\(([^)]+)\)", operands)
    if word == "BSSY":
        meetings[barrier] = tuple(named)
    if word == "BSYNC":
        return meetings.get(barrier, ())
    if word not in _JUMPS:
        return ()
    if not named and word != "CALL":
        raise ValueError(f"the target of {opcode} {operands} is not in the listing")
    return tuple(named)


def find_loops(listing: Listing) -> list[frozenset[int]]:
    """Natural loops, each as the set of its instructions' indices, in order of first address."""
    end = len(listing.instructions)
    following = [_successors(listing, index) for index in range(end)]
    starts = {0}
    for index, after in enumerate(following):
        if after != (index + 1,):
            starts |= {index + 1, *after}
    ordered = sorted(start for start in starts if start < end)
    blocks = dict(zip(ordered, [*ordered[1:], end], strict=True))
    bodies = _natural_loops({start: following[stop - 1] for start, stop in blocks.items()})
    loops = (frozenset(i for start in body for i in range(start, blocks[start])) for body in bodies)
    return sorted(loops, key=lambda loop: (min(loop), -len(loop)))


def _successors(listing: Listing, index: int) -> tuple[int, ...]:
    instruction = listing.instructions[index]
    after = [] if instruction.ends_flow else [index + 1]
    # A function that is called elsewhere comes back.
    is_call = instruction.word == "CALL"
    names = [name for name in instruction.targets if not is_call or name in listing.labels]
    after += [listing.labels[name] for name in names]
    return tuple(i for i in after if i < len(listing.instructions))


def _natural_loops(graph: Mapping[int, Sequence[int]]) -> list[set[int]]:
    """Bodies of the loops of a graph that is entered at 0, one for each head."""
    order = _reverse_postorder(graph)
    before: dict[int, list[int]] = defaultdict(list)
    for node in order:
        for target in graph[node]:
            before[target].append(node)
    dominators = _dominators(order, before)
    bodies: dict[int, set[int]] = {}
    for node in order:
        for head in graph[node]:
            if head not in dominators[node]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [node]
            while waiting:
                member = waiting.pop()
                if member not in body:
                    body.add(member)
                    waiting += before[member]
    return list(bodies.values())


def _reverse_postorder(graph: Mapping[int, Sequence[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    waiting = [(0, iter(graph[0]))]
    while waiting:
        node, targets = waiting[-1]
        target = next((t for t in targets if t not in seen), None)
        if target is None:
            order.append(node)
            waiting.pop()
        else:
            seen.add(target)
            waiting.append((target, iter(graph[target])))
    return order[::-1]


def _dominators(order: Sequence[int], before: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """For each node, the nodes that every way to it passes, itself included."""
    dominators = {node: set(order) for node in order}
    dominators[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = set.intersection(*(dominators[b] for b in before[node])) | {node}
            changed |= common != dominators[node]
            dominators[node] = common
    return dominators


def loop_figures(listing: Listing, source: str, num_warps: int) -> tuple[LoopFigures, ...]:
    """Figures of every loop in a listing whose line numbers are those of ``source``."""
    loops = find_loops(listing)
    places = _source_loops(loops, listing, source)
    return tuple(
        _figures_of(loop, loops, listing, place, num_warps)
        for loop, place in zip(loops, places, strict=True)
    )


def _figures_of(
    loop: frozenset[int],
    loops: Sequence[frozenset[int]],
    listing: Listing,
    place: tuple[str, int],
    num_warps: int,
) -> LoopFigures:
    instructions = [listing.instructions[i] for i in loop]
    words = Counter(instruction.word for instruction in instructions)
    widths = Counter(_with_width(i.opcode) for i in instructions if i.word in _MEMORY_WORDS)
    matrix = Counter(i.opcode for i in instructions if i.is_matrix)
    return LoopFigures(
        function=place[0],
        line=place[1],
        depth=sum(loop <= other for other in loops),
        instructions=len(loop),
        opcodes=dict(sorted((words + widths).items())),
        matrix=dict(sorted(matrix.items())),
        products=_products(matrix, num_warps),
        local=words["LDL"] + words["STL"],
        holds_matrix_loop=any(other < loop and _has_matrix(other, listing) for other in loops),
    )


def _has_matrix(loop: Iterable[int], listing: Listing) -> bool:
    return any(listing.instructions[i].is_matrix for i in loop)


_MEMORY_WORDS = ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL")
_WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")


def _with_width(opcode: str) -> str:
    word, *modifiers = opcode.split(".")
    return f"{word}.{next((name for name in modifiers if name in _WIDTHS), '32')}"


def _products(matrix: Mapping[str, int], num_warps: int) -> int | None:
    """Multiplications of one pass: four warps share an instruction of Hopper's, else one does."""
    total = 0
    for opcode, count in matrix.items():
        if found := re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = map(int, found.groups())
            total += count * m * n * k * num_warps // 4
        elif found := re.match(r"[HIQ]MMA\.168(\d+)", opcode):
            total += count * 16 * 8 * int(found[1]) * num_warps
        else:
            return None
    return total


def _source_loops(
    loops: Sequence[frozenset[int]], listing: Listing, source: str
) -> list[tuple[str, int]]:
    """For each loop the function and line of the ``for`` that most of its own code comes from."""
    innermost = _innermost_for(ast.parse(source))
    places: dict[frozenset[int], tuple[str, int]] = {}
    # Innermost first: what runs ahead of a pipelined loop has its lines, but is in the outer one.
    for loop in sorted(loops, key=len):
        inner = [other for other in loops if other < loop]
        own = loop.difference(*inner)
        taken = {places[other] for other in inner if _has_matrix(other, listing)}
        lines = (innermost.get(listing.instructions[i].line) for i in own)
        votes = Counter(place for place in lines if place is not None and place not in taken)
        places[loop] = votes.most_common(1)[0][0] if votes else ("", 0)
    return [places[loop] for loop in loops]


def _innermost_for(tree: ast.Module) -> dict[int, tuple[str, int]]:
    """Source line -> (function, line) of the innermost ``for`` or ``while`` around it."""
    found: dict[int, tuple[str, int]] = {}
    # Breadth first, so an inner statement is met after the outer one and replaces it.
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.While):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found.update(dict.fromkeys(lines, (function.name, node.lineno)))
    return found
