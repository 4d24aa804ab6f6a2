"""The options of the command line, each named once: type, spelling and help."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hub id, model folder, or 'demo' (the embedded one).")]
Work = Annotated[Path, typer.Argument(help="Work folder of an earlier run.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Bits = Annotated[float | None, typer.Option(help="Stored bits per weight of the blocks.")]
Size = Annotated[str | None, typer.Option(help="Size of all weight files, e.g. 5.2GiB.")]
Plan = Annotated[str | None, typer.Option(help="Force a plan: uniform:SCHEME.")]
Schemes = Annotated[
    str | None,
    typer.Option(
        help="Candidates, e.g. w2a16_g128_asym,w4a16_g64_sym; a projection's own after it: "
        "'w2a16_g128_asym,w3a16_g128_asym;down=w4a16_g128_asym'."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="wikitext2, c4, pile, demo, self, file:PATH or file:NAME=PATH,NAME=PATH."),
]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
Seqlen = Annotated[int, typer.Option(help="Tokens of each sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of samples.")]
Floor = Annotated[int, typer.Option(help="Tokens below which an expert is topped up.")]
Scope = Annotated[str, typer.Option(help="auto, experts (feed-forward side) or all.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Regular expression of parameters to leave; repeatable.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Sensitivity = Annotated[str, typer.Option(help="fisher, layer_out or output_mse.")]
Quantizer = Annotated[str, typer.Option(help="gptq or rtn.")]
Rotation = Annotated[str, typer.Option(help="auto (by measured gain, per layer), on or off.")]
Granularity = Annotated[
    str, typer.Option(help="What shares a scheme: block, expert, projection or layer.")
]
TieGateUp = Annotated[bool, typer.Option(help="One scheme for gate and up of an expert.")]
FloorBits = Annotated[float | None, typer.Option(help="Least mean bits of every layer.")]
Objective = Annotated[str, typer.Option(help="loss (global) or mxmoe (per layer, L^r T^(1-r)).")]
R = Annotated[float, typer.Option("--r", help="Exponent r of the mxmoe objective.")]
Solver = Annotated[str, typer.Option(help="pulp or lagrangian.")]
Device = Annotated[str | None, typer.Option(help="Device of latencies, e.g. h200, or a JSON file.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of one step, for latencies.")]
MaxLatency = Annotated[
    float | None, typer.Option(help="Most milliseconds of all blocks for one step.")
]
Engine = Annotated[
    str | None,
    typer.Option(help="Plan inside its rules: vllm, sglang, transformers (without mxq) or trtllm."),
]
EngineName = Annotated[
    str, typer.Option("--engine", help="vllm, sglang, transformers (without mxq) or trtllm.")
]
TensorParallel = Annotated[
    int, typer.Option("--tp", help="Ranks that the engine splits each weight over.")
]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Folder of the stages' results; default OUTPUT/work.")
]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint that mxq wrote.")]
CheckpointWork = Annotated[
    Path | None, typer.Option("--work", help="Work folder of its run; default FOLDER/work.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint that --output holds.")]
Guard = Annotated[
    bool, typer.Option(help="Pack the uniform plan too and write the better of the two.")
]
Memory = Annotated[
    str, typer.Option(help="Most memory for kept activations; the rest goes to files.")
]
Force = Annotated[bool, typer.Option(help="Start even if memory or disk look too small.")]
Compute = Annotated[
    str,
    typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."),
]
Destination = Annotated[Path, typer.Argument(help="Folder to write.")]
To = Annotated[str, typer.Option(help="compressed-tensors, gptq or dequantized.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of dequantized weights: bfloat16 (default), float16 or float32."),
]
CheckpointFormat = Annotated[
    str | None,
    typer.Option(help="Of --to gptq: gptq or gptq_v2; default the latter for zero points."),
]
Replace = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a checkpoint that the folder holds, its card too."),
]
