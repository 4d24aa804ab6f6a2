"""The options of the command line, each named once: type, spelling, help, place in the help.

Help is read at 80 columns, so no word of it is longer than the column that it stands in.
"""

from pathlib import Path
from typing import Annotated

import typer

CALIBRATION = "Calibration text"
MEASURING = "Schemes, and what they cost"
RULES = "Rules of the plan"
LATENCY = "Predicted times on a GPU"
RESULT = "What is written"
MACHINE = "This machine"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, folder, or demo: a small one that mxq brings."),
]
Scope = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What is quantized: experts (the feed-forward side), all (attention too), or auto: "
        "experts where the model has some, else all.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX", help="Parameters that stay as they are, by name; can be repeated."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a hub model.", show_default="its main branch"),
]
Work = Annotated[
    Path, typer.Argument(metavar="WORK", help="Work folder of an earlier run, e.g. OUTPUT/work.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Folder for the checkpoint.")
]

Bits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Budget: mean bits of a quantized weight, scales and zero points included.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Budget: size of all weight files, e.g. 5.2GiB."),
]
Plan = Annotated[
    str | None,
    typer.Option(metavar="PLAN", help="One scheme for all in place of a budget: uniform:SCHEME."),
]

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="wikitext2, c4, pile (or several, by comma), demo, self, file:PATH, or files by "
        "domain, file:NAME=PATH,NAME=PATH.",
        show_default="wikitext2; demo for the model demo",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        metavar="COUNT",
        help="Samples to fit to; an eighth as many more are held out.",
        rich_help_panel=CALIBRATION,
    ),
]
Seqlen = Annotated[
    int, typer.Option(metavar="COUNT", help="Tokens of each sample.", rich_help_panel=CALIBRATION)
]
Seed = Annotated[
    int,
    typer.Option(metavar="NUMBER", help="Of the choice of samples.", rich_help_panel=CALIBRATION),
]
Floor = Annotated[
    int,
    typer.Option(
        metavar="COUNT",
        help="An expert that fewer tokens reach gets spare samples.",
        rich_help_panel=CALIBRATION,
    ),
]

Schemes = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Schemes to choose from, by comma. w3a16_g128_asym: 3-bit weights, 16-bit inputs, "
        "groups of 128 with a scale and a zero point each; grow is a group for a whole row, sym "
        "has no zero points. LIST;down=LIST gives the projection down its own.",
        show_default="w2a16 to w8a16, asym, groups of 128 or less; 2 to 4 bits also grow",
        rich_help_panel=MEASURING,
    ),
]
Sensitivity = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="fisher (nats of the model's predictions), layer_out (MxMoE's), or output_mse (no "
        "gradients).",
        rich_help_panel=MEASURING,
    ),
]
Effort = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Time for accuracy: balanced; fast, which loses more, most of all below 4 bits; or "
        "best, which packs several times as long. Sets --quantizer and --target where they are "
        "not given.",
        rich_help_panel=MEASURING,
    ),
]
Quantizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="kronecker (refined, then once more by what the loss hangs on in the outputs), "
        "refined (GPTQ, then codes and scales again and again), gptq, or rtn (round to nearest); "
        "all search the clip of each group.",
        show_default="refined; gptq if fast, kronecker if best",
        rich_help_panel=MEASURING,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What blocks are fitted to: stream (their outputs in the original model, and what "
        "the residual stream is off), original (those outputs alone) or local (those of their own "
        "weights, on inputs from quantized layers).",
        show_default="stream; local if fast",
        rich_help_panel=MEASURING,
    ),
]
Rotation = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Of inputs by Hadamard blocks: on, off, or auto: in layers where it measures better.",
        rich_help_panel=MEASURING,
    ),
]

Granularity = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What shares a scheme: block (each matrix alone), expert (its matrices), projection "
        "(that of all experts of a layer), or layer (all its experts).",
        rich_help_panel=RULES,
    ),
]
TieGateUp = Annotated[
    bool,
    typer.Option(
        "--tie-gate-up",
        metavar="",
        help="Gate and up of an expert share a scheme.",
        rich_help_panel=RULES,
    ),
]
FloorBits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Least mean bits of every layer.",
        show_default="none",
        rich_help_panel=RULES,
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Least loss of the model (loss), or in each layer least loss^r x time^(1-r) (mxmoe).",
        rich_help_panel=RULES,
    ),
]
Pin = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto: experts whose outputs are far above those of their layer keep 8 bits or the "
        "widest scheme, as the model may break without them (not with mxmoe); or off.",
        rich_help_panel=RULES,
    ),
]
R = Annotated[
    float,
    typer.Option("--r", metavar="NUMBER", help="The r of mxmoe.", rich_help_panel=RULES),
]
Solver = Annotated[
    str,
    typer.Option(metavar="NAME", help="pulp (with CBC) or lagrangian.", rich_help_panel=RULES),
]
ENGINES_HELP = "vllm, sglang, transformers (without mxq) or trtllm."
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Keep to what an engine reads: {ENGINES_HELP}",
        show_default="any plan, for mxq itself",
        rich_help_panel=RULES,
    ),
]
EngineName = Annotated[str, typer.Option("--engine", metavar="NAME", help=ENGINES_HELP)]
_RANKS = "Ranks of the engine, each with a part of every weight."
TensorParallel = Annotated[
    int, typer.Option("--tp", metavar="COUNT", help=_RANKS, rich_help_panel=RULES)
]
Ranks = Annotated[int, typer.Option("--tp", metavar="COUNT", help=_RANKS)]

Device = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        help="Predict times on h200, h100, a100, rtx4090, or the GPU of a JSON file.",
        show_default="no times",
        rich_help_panel=LATENCY,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT", help="Tokens of one step; with --device.", rich_help_panel=LATENCY
    ),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        help="Most milliseconds of a step, all blocks together.",
        show_default="none",
        rich_help_panel=LATENCY,
    ),
]

WorkOption = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="WORK",
        help="Folder for the stages' results.",
        show_default="OUTPUT/work",
        rich_help_panel=RESULT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Replace a checkpoint that is there, and its card.",
        rich_help_panel=RESULT,
    ),
]
Guard = Annotated[
    bool,
    typer.Option(
        metavar="",
        help="Pack the best uniform plan that fits too, and write what measures better "
        "(none with --floor-bits).",
        rich_help_panel=RESULT,
    ),
]

Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Most memory for kept activations; what is over it goes to files.",
        rich_help_panel=MACHINE,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        metavar="",
        help="Start even if memory or disk look too small.",
        rich_help_panel=MACHINE,
    ),
]
Compute = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        help="cpu, cuda, cuda:N, or auto: a GPU if there is one.",
        rich_help_panel=MACHINE,
    ),
]

Checkpoint = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint that mxq wrote.")]
CheckpointWork = Annotated[
    Path | None,
    typer.Option(
        "--work", metavar="WORK", help="Work folder of its run.", show_default="FOLDER/work"
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")]
To = Annotated[str, typer.Option(metavar="FORMAT", help="compressed-tensors, gptq or dequantized.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="With --to dequantized: bfloat16, float16 or float32.",
        show_default="bfloat16",
    ),
]
CheckpointFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="With --to gptq: gptq or gptq_v2.",
        show_default="gptq_v2 if there are zero points, else gptq",
    ),
]

TuneSource = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="Work folder or model whose shapes are timed.",
        show_default="experts of three sizes",
    ),
]
TuneSchemes = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Schemes to time, by comma.",
        show_default="those of quantize, w4a8, w8a8, fp8, bf16",
    ),
]
TuneShapes = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Shapes in place of SOURCE, by comma: OUTPUTSxINPUTS, e.g. 2816x2048.",
    ),
]
TunePlans = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Tile plans, by comma: decode, middle, prefill.", show_default="all"
    ),
]
TuneDevice = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        help="Name or file of the GPU's published figures.",
        show_default="by the driver's name",
    ),
]
TuneReplays = Annotated[int, typer.Option(metavar="COUNT", help="Times to run each launch.")]
TuneOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Folder for the profile.",
        show_default="the user's cache",
    ),
]
