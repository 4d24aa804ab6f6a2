"""What a user reads about latencies: plans beside each other, and predicted against measured."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from mxq.artifacts import Allocation
from mxq.counted import counted
from mxq.latency import LatencyReport, MeasuredBranch, TuneResult
from mxq.terminal import make_console


def show_latency(report: LatencyReport, plans: Mapping[str, Allocation]) -> None:
    """The time of each plan in one step, where it comes from, and what was measured."""
    console = make_console()
    console.print(step_table(report, plans))
    for note in report.notes:
        console.print(f"[yellow]{note}")
    if report.measured:
        console.print(measured_table(report.measured))


def step_table(report: LatencyReport, plans: Mapping[str, Allocation]) -> Table:
    """Each plan: the additive time that the solver limits, and launch by launch."""
    table = Table(title=f"Latency of the blocks in a step of {counted(report.tokens, 'token')}, us")
    for column in ("plan", "additive", "by launch", "launches", "overhead", "tiles in turn"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, plan in plans.items():
        step = report.steps.get(name)
        cells = ["-"] * 4
        if step is not None:
            cells = [
                f"{step.total_us:.1f}",
                str(step.launches),
                f"{step.launch_us:.1f}",
                f"{step.rounds:.1f}",
            ]
        label = "plan" if name == "plan" else str(next(iter(plan.schemes.values())))
        table.add_row(label, f"{report.additive_us[name]:.1f}", *cells)
    table.caption = (
        f"Predicted: {report.source}. Additive: the sum over blocks that --max-latency limits. By "
        "launch: each launch lasts until its last tile ends. Routing, input rounding, "
        "rotation and activation functions are not counted."
    )
    return table


def measured_table(branches: Sequence[MeasuredBranch]) -> Table:
    """Each branch: its largest timed launch, and the errors over all of its timings."""
    table = Table(title="Predicted against measured, us")
    for column in ("branch", "largest launch", "measured", "predicted", "unmeasured", "n", "error"):
        left = column in {"branch", "largest launch"}
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "branch")
    for branch in branches:
        case = branch.timing.case
        table.add_row(
            branch.branch,
            f"{case.experts} x {case.tokens} x {case.out_features} x {case.in_features}",
            f"{branch.timing.median_us:.1f}",
            f"{branch.predicted_us:.1f}",
            f"{branch.compiled_us:.1f}",
            str(branch.timings),
            f"{branch.median_error:.1%} ({branch.median_compiled_error:.1%})",
        )
    table.caption = (
        "Largest launch: experts x tokens of each x outputs x inputs. Predicted: from constants "
        "fitted to the other timings. Unmeasured: from compiled figures and the device file alone; "
        "its error in brackets. Errors: medians over n launches."
    )
    return table


def show_tuning(result: TuneResult) -> None:
    """All branches that were timed, and where the profile is."""
    console: Console = make_console()
    console.print(measured_table(result.measured))
    profile = result.profile
    clocks = ", ".join(f"{name} {value:g} MHz" for name, value in profile.clocks_mhz.items())
    console.print(f"{profile.describe()}; a launch takes {profile.launch_us:.2f} us")
    console.print(f"Clocks: {clocks or 'not known'}")
    console.print(f"Written to [bold]{result.path}[/]")
