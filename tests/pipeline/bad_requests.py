"""Texts, budgets, folders and earlier results that do not fit, and what mxq answers.

See ``bad_case.py`` for the form. What EARLY lists is told before anything is computed.
"""

from collections.abc import Mapping

import damage
from bad_case import AGAIN, ALLOCATE, EVALUATE, PACK, QUANTIZE, RUN, Case

TEXTS: Mapping[str, Case] = {
    "no tokenizer": Case(
        ("text needs a tokenizer; pass the model's tokenizer (tokenizer.json in its",),
        mistake=damage.together(
            damage.remove("model/tokenizer.json"), damage.remove("model/tokenizer_config.json")
        ),
    ),
    "a damaged tokenizer": Case(("tokenizer",), mistake=damage.cut("model/tokenizer.json", 300)),
    "a tokenizer of another model": Case(
        ("is outside the vocabulary of 257; use the tokenizer that belongs to the model",),
        mistake=damage.replace("model/tokenizer.json", '"t": 83', '"t": 8300'),
    ),
    "a text of one token": Case(
        ("has 1 token, but", "give more text, or lower samples or seqlen"),
        mistake=damage.write("text.txt", "x"),
    ),
    "an empty text": Case(
        ("text.txt is empty; give a file with text in it",),
        mistake=damage.write("text.txt", ""),
    ),
    "a text of white space": Case(
        ("text.txt is empty; give a file with text in it",),
        mistake=damage.write("text.txt", " \n\n"),
    ),
    "a text that is not UTF-8": Case(
        ("text.txt is not UTF-8", "convert it first"),
        mistake=damage.write("text.txt", b"caf\xe9 " * 100),
    ),
    "an absent text": Case(
        ("text.txt does not exist; give a .txt file, or a .jsonl file",),
        mistake=damage.remove("text.txt"),
    ),
    "a folder for a text": Case(
        ("model is a folder; give a .txt file",), RUN + " --calibration file:{model}"
    ),
    "rows without a text": Case(
        ("rows.jsonl line 1 has no string field 'text' (found: body)",),
        RUN + " --calibration file:{root}/rows.jsonl",
        mistake=damage.write("rows.jsonl", '{"body": "x"}\n'),
    ),
    "a text for the name of a text": Case(
        ("calibration set 'The clock struck nine. ", "is unknown", "file:PATH"),
        RUN + " --calibration {sentence}",
    ),
    "a long text for the name of a text": Case(
        ("calibration set 'The clock struck nine. The clock", "...' is unknown", "file:PATH"),
        RUN + " --calibration {long}",
    ),
    "a long text for the path of a text": Case(
        (
            "text file The clock struck nine.",
            "... does not exist; give a .txt",
        ),
        RUN + " --calibration file:{long}",
    ),
    "a set of the hub without a network": Case(
        ("text set 'wikitext2'", "is there a network?", "file:PATH"),
        RUN + " --calibration wikitext2",
    ),
    "no sample": Case(("samples is 0; it must be at least 2",), RUN + " --samples 0"),
    "samples of one token": Case(("seqlen is 1; it must be at least 2",), RUN + " --seqlen 1"),
    "samples longer than the model reads": Case(
        ("samples of 300 tokens are longer than the model's 128 positions; lower --seqlen",),
        RUN + " --calibration demo --seqlen 300",
    ),
}

BUDGETS: Mapping[str, Case] = {
    "no bits": Case(("--bits 0 is not between 0 and 16 bits",), QUANTIZE + " --bits 0"),
    "fewer bits than the cheapest scheme": Case(
        ("1.2 bits per weight were asked for, but the cheapest plan needs 4.62",),
        QUANTIZE + " --bits 1.2",
    ),
    "more bits than the model has": Case(
        ("--bits 40 is not between 0 and 16 bits",), QUANTIZE + " --bits 40"
    ),
    "bits that are no number": Case(("--bits nan is not",), QUANTIZE + " --bits nan"),
    "bits that are a word": Case(
        ("Invalid value for '--bits'", "valid number"), QUANTIZE + " --bits few", status=2
    ),
    "a size that holds nothing": Case(
        ("--size is 1,000 bytes, but what stays in its type takes",), QUANTIZE + " --size 1kB"
    ),
    "a size of 0": Case(("--size is 0; it must be above 0",), QUANTIZE + " --size 0GB"),
    "a floor above the budget": Case(
        ("--floor-bits 6 is above --bits 5",), RUN + " --floor-bits 6"
    ),
    "an unknown scheme": Case(
        ("scheme 'int4' is not of the form w<bits>a<bits>",), RUN + " --schemes int4"
    ),
    "bits that no scheme has": Case(
        ("weight bits of 7 is not supported; choose one of 2, 3",),
        RUN + " --schemes w7a16_g32_asym",
    ),
    "groups that do not divide": Case(
        ("has 64 input features and none of w4a16_g128_asym has a group size",),
        RUN + " --schemes w4a16_g128_asym",
    ),
    "groups that do not divide, in a forced plan": Case(
        ("has 64 input features and none of w4a16_g128_asym",),
        QUANTIZE + " --plan uniform:w4a16_g128_asym",
    ),
    "an unknown solver": Case(
        ("no solver 'simplex'; choose one of pulp, lagrangian",), RUN + " --solver simplex"
    ),
    "an unknown quantizer": Case(
        ("quantizer 'awq' is unknown; choose one of gptq, kronecker, refined, rtn",),
        RUN + " --quantizer awq",
    ),
    "an unknown sensitivity": Case(
        ("sensitivity 'x' is unknown; choose one of",), RUN + " --sensitivity x"
    ),
    "an unknown device": Case(
        ("no device 'b300'; choose one of", "or give a JSON file"),
        RUN + " --device b300 --tokens 8",
    ),
    "a device file that does not exist": Case(
        ("no device", "b300.json", "choose one of"), RUN + " --device {root}/b300.json --tokens 8"
    ),
    "a device file that is none": Case(
        ("config.json is not a device file",), RUN + " --device {model}/config.json --tokens 8"
    ),
    "a device without tokens": Case(("--device and --tokens go together",), RUN + " --device h200"),
    "no tokens": Case(("--tokens is 0; it must be above 0",), RUN + " --device h200 --tokens 0"),
    "a pattern that matches nothing": Case(
        ("--keep 'nothing' matches no parameter of this model",), RUN + " --keep nothing"
    ),
    "an option that does not exist": Case(("No such option: --bit",), RUN + " --bit 4", status=2),
}

OUTPUTS: Mapping[str, Case] = {
    "an output that is not empty": Case(
        ("out is not empty (it holds mine.txt); choose another --output, or allow --overwrite",),
        mistake=damage.together(
            lambda place: place.output.mkdir(), damage.write("out/mine.txt", "x")
        ),
    ),
    "an output that is a file": Case(
        ("text.txt is a file; give a folder for --output",), RUN + " --output {text}"
    ),
    "an output below a file": Case(
        ("text.txt/out cannot be written",), RUN + " --output {text}/out"
    ),
    "an output that cannot be written": Case(
        ("/proc/mxq cannot be written",), RUN + " --output /proc/mxq"
    ),
    "a work folder that cannot be written": Case(
        ("/proc/mxq cannot be written",), RUN + " --work /proc/mxq"
    ),
    "a work folder that is a file": Case(("text.txt",), RUN + " --work {text}"),
    "the model's folder for the output": Case(
        ("--output is", "model, the model's own folder; give another"),
        RUN + " --output {model} --overwrite",
    ),
    "an output inside the model's folder": Case(
        ("out is inside the model's folder", "give another"), RUN + " --output {model}/out"
    ),
    "the model's folder for the work": Case(
        ("--work is", "model, the model's own folder; give another"), RUN + " --work {model}"
    ),
    "a work folder inside the model's folder": Case(
        ("work is inside the model's folder", "give another"), RUN + " --work {model}/work"
    ),
    "one folder for output and work": Case(
        ("both is inside the --work folder or the same; give one outside of it",),
        RUN + " --output {root}/both --work {root}/both",
    ),
    "an output inside the work folder": Case(
        ("packed-plan is inside the --work folder or the same; give one outside of it",),
        RUN + " --output {fresh}/packed-plan",
    ),
}

STALE: Mapping[str, Case] = {
    "a latency that nothing reaches": Case(
        ("budget 'latency us' is 0.001, but the cheapest plan needs", "raise the budget"),
        ALLOCATE + " --device h200 --tokens 8 --max-latency 0.000001",
    ),
    "a work folder of another model": Case(
        ("Written to",),
        AGAIN,
        mistake=damage.tensor("lm_head.weight", lambda w: -w),
        status=0,
    ),
    "pack of a model that has changed": Case(
        ("model is not the model that", "was measured on", "run mxq measure again"),
        PACK,
        damage.tensor("lm_head.weight", lambda w: -w),
    ),
    "a damaged artifact, made anew": Case(
        ("Written to",), AGAIN, damage.cut("work/sensitivity.json", 500), status=0
    ),
    "a damaged artifact that is needed": Case(
        ("sensitivity.json is not an mxq artifact", "run its stage again"),
        ALLOCATE,
        damage.cut("work/sensitivity.json", 500),
    ),
    "an edited artifact": Case(
        ("sensitivity.json was edited or damaged: its checksum differs; run its stage again",),
        ALLOCATE,
        damage.replace("work/sensitivity.json", '"output_mse"', '"output_mes"'),
    ),
    "damaged calibration tokens": Case(
        ("calibration.safetensors", "run mxq measure"),
        PACK,
        damage.cut("work/calibration.safetensors", -8),
    ),
    "calibration tokens of another file": Case(
        ("calibration.safetensors", "run mxq measure"),
        PACK,
        lambda place: (place.work / "calibration.safetensors").write_bytes(
            place.weights.read_bytes()
        ),
    ),
    "edited calibration tokens": Case(
        ("were measured on another model or other calibration text",),
        PACK,
        damage.flip("work/calibration.safetensors", -8, 1),
    ),
    "pack before allocate": Case(
        ("allocation.json does not exist; run the stage that makes it first",),
        PACK,
        damage.remove("work/allocation.json"),
    ),
    "a folder that is no work folder": Case(
        ("sensitivity.json does not exist; run the stage",), "allocate {model} --bits 5"
    ),
    "a folder to inspect that is nothing": Case(
        ("model is neither an mxq checkpoint nor a work folder of mxq",), "inspect {model}"
    ),
    "a checkpoint with a flipped bit": Case(
        ("is damaged or was edited: its SHA-256 is", "copy or download it again"),
        EVALUATE,
        damage.flip("packed/model-layer-00000.safetensors", -1),
    ),
    "a checkpoint that was cut": Case(
        ("is not a whole safetensors file", "copy or download it again"),
        EVALUATE,
        damage.cut("packed/model-layer-00000.safetensors", -50),
    ),
    "a checkpoint without a shard": Case(
        ("model-layer-00001.safetensors",),
        EVALUATE,
        damage.remove("packed/model-layer-00001.safetensors"),
    ),
    "a checkpoint whose plan was edited": Case(
        ("weight_", "the plan in config.json was edited"),
        EVALUATE,
        damage.replace("packed/config.json", "w4a16_g32_asym", "w6a16_g32_asym"),
    ),
    "a checkpoint with a plan of a newer version": Case(
        ("has mxq format version 7, this mxq reads 1; install the mxq that wrote it",),
        EVALUATE,
        damage.plan(format_version=7),
    ),
    "a checkpoint whose plan has a negative place": Case(
        ("quantization_config", "edited or damaged"),
        EVALUATE,
        damage.plan(linears={"model.layers.0.mlp.shared_expert.up_proj": -1}),
    ),
    "a checkpoint whose plan is a method's name": Case(
        ("quantization_config", "'plan'"), EVALUATE, damage.plan(plan=3)
    ),
    "a checkpoint of a billion layers": Case(
        ("num_hidden_layers", "1000000000"),
        EVALUATE,
        damage.config("packed/config.json", num_hidden_layers=10**9, layer_types=None),
    ),
    "a checkpoint of more layers than files": Case(
        ("config.json says num_hidden_layers is 100, but this checkpoint has 3 files",),
        EVALUATE,
        damage.config("packed/config.json", num_hidden_layers=100, layer_types=None),
    ),
    "an edited plan of a checkpoint": Case(
        ("mxq_plan.json was edited or damaged",),
        "inspect {packed}",
        damage.replace("packed/mxq_plan.json", "w4a16_g32_asym", "w8a16_g32_asym"),
    ),
}

EARLY = {*BUDGETS, *OUTPUTS}
