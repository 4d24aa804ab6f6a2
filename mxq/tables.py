"""What a user reads after a command: plans, losses and profiles as tables."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxq.artifacts import Allocation, BlockInfo, SensitivityTable
from mxq.counted import counted, spoken_bytes, spoken_seconds
from mxq.engines import format_warnings, load_rules
from mxq.finish import QuantizeResult
from mxq.heldout import MeasuredLoss
from mxq.machine import Machine
from mxq.profiling.activation import ActivationStats
from mxq.profiling.super_experts import find_super_experts
from mxq.report.comparison import HEADS, Compared, caption, original_row, plan_row
from mxq.report.words import (
    cold_experts,
    engine_line,
    few_tokens,
    is_uniform,
    kept_choices,
    measured_on,
    pin_lines,
    plan_name,
    unrouted_experts,
)
from mxq.resources import Needs
from mxq.scheme import Scheme
from mxq.terminal import make_console
from mxq.workspace import Workspace


def show_result(result: QuantizeResult) -> None:
    """The plan, what it lost, the uniform plan beside it, and what was written."""
    console = make_console()
    chosen = result.plans[result.written]
    show_allocation(chosen, result.blocks)
    console.print(comparison(result))
    if chosen.predicted_latency_us is not None:
        console.print(f"Latency of the blocks in one step: {_latency(chosen)}")
    _show_engine(result.plans["plan"], console)
    tokens = _first(result.losses).tokens
    routed = kept_choices(result.packs[result.written].expert_choices)
    for line in (*_yellow(few_tokens(tokens)), *routed, *coverage_lines(result)):
        console.print(line)
    if result.written == "uniform":
        console.print(
            "[yellow]The uniform plan measured better on held-out text and is what was written."
        )
    console.print(f"Written to [bold]{result.folder}[/]")


def show_plans(plans: Mapping[str, Allocation], table: SensitivityTable) -> None:
    """A plan that was solved, and the uniform plan of the same size."""
    show_allocation(plans["plan"], table.blocks)
    summary = Table(title="Predicted")
    for column in ("plan", "bits asked", "bits reached", "loss", "bound", "latency"):
        summary.add_column(column, justify="left" if column == "plan" else "right")
    for plan in plans.values():
        summary.add_row(
            plan_name(plan.description),
            "" if is_uniform(plan.description) else f"{plan.asked_bits:.4f}",
            f"{plan.bits_per_weight:.4f}",
            f"{plan.predicted_loss:.6g}",
            f"{plan.bound:.6g}" if plan.proven else f"{plan.bound:.6g} (not proven)",
            _latency(plan).partition(" (")[0],  # the table of latencies names their source
        )
    console = make_console()
    console.print(summary)
    _show_engine(plans["plan"], console)
    _show_pins(plans["plan"], console)


def show_allocation(plan: Allocation, blocks: Sequence[BlockInfo]) -> None:
    """Bits by layer and projection, and how many blocks have each scheme."""
    console = make_console()
    console.print(bits_table(plan, blocks))
    console.print(scheme_table(plan, blocks))


def bits_table(plan: Allocation, blocks: Sequence[BlockInfo]) -> Table:
    """Mean stored bits per weight by layer and projection."""
    sums: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    projections: list[str] = []
    for block in blocks:
        label = _column_of(block)
        if label not in projections:
            projections.append(label)
        for key in ((block.layer, label), (block.layer, "all")):
            size = block.out_features * block.in_features
            bits = plan.schemes[block.name].storage_bits(block.out_features, block.in_features)
            sums[key][0] += bits
            sums[key][1] += size
    table = Table(title="Bits per weight by layer and projection")
    table.add_column("layer", justify="right")
    for label in (*projections, "all"):
        table.add_column(label, justify="right")
    for layer in sorted({block.layer for block in blocks}):
        cells = [_mean(sums.get((layer, label))) for label in (*projections, "all")]
        table.add_row(f"{layer}{' (rotated)' if layer in plan.rotated_layers else ''}", *cells)
    return table


def scheme_table(plan: Allocation, blocks: Sequence[BlockInfo]) -> Table:
    """Blocks of experts and plain linears in each scheme."""
    experts: Counter[Scheme] = Counter()
    linears: Counter[Scheme] = Counter()
    for block in blocks:
        (linears if block.expert is None else experts)[plan.schemes[block.name]] += 1
    table = Table(title="Blocks in each scheme")
    for column in ("scheme", "of experts", "plain linears"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for scheme in sorted({*experts, *linears}):
        table.add_row(str(scheme), str(experts[scheme]), str(linears[scheme]))
    return table


def comparison(result: QuantizeResult) -> Table:
    """The uniform plan over the budget, and each packed plan: bits, size, loss."""
    first = _first(result.losses)
    rows = [original_row(first.original_perplexity, None)]
    if result.above is not None:
        rows.append(plan_row(_compared(result.above, None, None)))
    for name, plan in result.plans.items():
        packed = _compared(plan, result.packs[name].tensor_bytes, result.losses[name])
        rows.append(plan_row(replace(packed, is_written=name == result.written)))
    table = comparison_table(rows, first.tokens)
    table.caption = caption(result.unit)
    return table


def _compared(plan: Allocation, tensor_bytes: int | None, loss: MeasuredLoss | None) -> Compared:
    asked, reached = plan.asked_bits, plan.bits_per_weight
    return Compared(plan.description, asked, reached, plan.predicted_loss, tensor_bytes, loss)


def comparison_table(rows: Sequence[Sequence[str]], heldout_tokens: int) -> Table:
    """Rows under the heads of ``mxq.report.comparison``."""
    table = Table(title=measured_on(heldout_tokens))
    for number, head in enumerate(HEADS):
        # Two lines of a head leave room for the names of plans in 100 columns.
        table.add_column(head.replace(" ", "\n"), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def coverage_lines(result: QuantizeResult) -> list[str]:
    """What was quantized, what was kept and which experts were cold."""
    lines = [f"Quantized {counted(len(result.blocks), 'linear block')}; kept in their type:"]
    lines += [f"  {counted(count, 'tensor')}: {why}" for why, count in sorted(result.kept.items())]
    lines += pin_lines(result.plans[result.written], result.profile)
    unrouted = result.packs[result.written].unrouted
    return lines + _yellow([*cold_experts(result.profile), *unrouted_experts(unrouted)])


def show_profile(stats: ActivationStats) -> None:
    """Tokens of experts by layer, and where they come from."""
    counts = counted(stats.total_tokens, "profiled token")
    table = Table(title=f"Experts by the tokens routed to them, of {counts}")
    for column in ("experts", "least", "median", "most", "unused", "pair entropy", "of"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    for site in stats.sites:
        tokens = sorted(sum(row) for row in site.tokens)
        table.add_row(
            site.site,
            f"{tokens[0]:,}",
            f"{tokens[len(tokens) // 2]:,}",
            f"{tokens[-1]:,}",
            str(tokens.count(0)),
            f"{site.coactivation_entropy:.3f}",
            f"{site.coactivation_entropy_max:.3f}",
        )
    console = make_console()
    console.print(table)
    console.print(f"Domains: {', '.join(stats.domains)}")
    console.print(
        f"{counted(len(stats.topped_up), 'expert')} topped up with "
        f"{counted(stats.added_samples, 'spare sample')}, {len(stats.cold)} still under "
        f"{counted(stats.floor, 'fitting token')}"
    )
    for expert in find_super_experts(stats.sites):
        console.print(
            f"{expert.name} puts out {expert.times:.0f} times what its layer's other experts do: "
            "plans keep it wide (--pin)"
        )


def show_sensitivity(table: SensitivityTable) -> None:
    """Loss of the whole model under each uniform scheme."""
    shown = Table(title=f"Predicted loss of uniform plans ({table.metric}, {table.unit})")
    for column in ("scheme", "bits per weight", "loss"):
        shown.add_column(column, justify="left" if column == "scheme" else "right")
    weights = sum(b.out_features * b.in_features for b in table.blocks)
    for place, scheme in enumerate(table.schemes):
        bits = sum(scheme.storage_bits(b.out_features, b.in_features) for b in table.blocks)
        loss = sum(row[place] for row in table.loss)
        shown.add_row(str(scheme), f"{bits / weights:.4f}", f"{loss:.6g}")
    make_console().print(shown)


def show_work(space: Workspace) -> None:
    """The artifacts of a work folder."""
    settings = space.settings()
    make_console().print(f"Work folder for {settings.model.model}, {settings.calibration.spec}")
    if space.path("profile").is_file():
        show_profile(space.profile())
    if space.path("sensitivity").is_file():
        show_sensitivity(space.sensitivity())
        if space.path("allocation").is_file():
            show_allocation(space.allocation(), space.sensitivity().blocks)
            _show_pins(space.allocation(), make_console())


def show_needs(needs: Needs, found: Machine) -> None:
    """What a run will take of the machine, beside what is free; printed where progress is."""
    table = Table(title="This run will need")
    for column in ("", "for", "about", "free"):
        table.add_column(column, justify="right" if column in ("about", "free") else "left")
    for kind, parts, free in (
        ("memory", needs.memory_bytes, found.memory_bytes),
        ("disk", needs.disk_bytes, found.disk_bytes),
    ):
        taken = {name: count for name, count in parts.items() if count > 0}
        for name, count in taken.items():
            table.add_row(kind if name == next(iter(taken)) else "", name, spoken_bytes(count), "")
        total = f"[bold]{spoken_bytes(sum(taken.values()))}"
        label = "" if taken else kind
        table.add_row(label, "in all", total, spoken_bytes(free), end_section=True)
    for name, seconds in needs.seconds.items():
        table.add_row(
            "time" if name == next(iter(needs.seconds)) else "", name, spoken_seconds(seconds), ""
        )
    table.caption = (
        "Time: counted operations over this machine's speed just now, an order of magnitude."
    )
    console = make_console(stderr=True)
    console.print(table)
    for note in needs.notes:
        console.print(escape(note))


def show_address(url: str) -> None:
    """Where a page is served, and how to end it."""
    make_console().print(f"The plans are at [bold]{url}[/] (Ctrl-C ends the page)")


def show_error(message: str) -> None:
    """One clear message on the error stream."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}")


def _show_engine(plan: Allocation, console: Console) -> None:
    line = engine_line(plan)
    if line is None or plan.engine is None:
        return
    console.print(escape(line))
    for warning in format_warnings(load_rules(plan.engine), plan.schemes.values()):
        console.print(f"[yellow]{escape(warning)}")


def _show_pins(plan: Allocation, console: Console) -> None:
    for line in pin_lines(plan):
        console.print(escape(line))


def _column_of(block: BlockInfo) -> str:
    """Heading of a block's column: the projection, or a plain linear's path on several lines."""
    if block.expert is not None:
        return block.projection
    return "\n".join(block.name.split(".")[2:])


def _latency(plan: Allocation) -> str:
    if plan.predicted_latency_us is None:
        return "-"
    return f"{plan.predicted_latency_us:.1f} us ({plan.latency_source})"


def _mean(total: list[int] | None) -> str:
    return "" if total is None else f"{total[0] / total[1]:.2f}"


def _yellow(lines: Sequence[str]) -> list[str]:
    return [f"[yellow]{line}" for line in lines]


def _first(losses: Mapping[str, MeasuredLoss]) -> MeasuredLoss:
    return next(iter(losses.values()))
