"""Small ways to spoil a model folder, a text, a work folder or a checkpoint: one mistake each.

A place holds fresh copies of everything that a command reads, so a mistake may edit them freely.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Mistake = Callable[["Place"], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of one case with its own copies; ``output`` does not exist yet."""

    root: Path

    @property
    def model(self):
        return self.root / "model"

    @property
    def text(self):
        return self.root / "text.txt"

    @property
    def work(self):
        return self.root / "work"

    @property
    def fresh(self):
        return self.root / "fresh"

    @property
    def packed(self):
        return self.root / "packed"

    @property
    def output(self):
        return self.root / "out"

    @property
    def weights(self):
        return self.model / "model.safetensors"


def nothing(place):
    """The mistake is in the command."""


def together(*mistakes):
    """Several edits that are one mistake."""
    return lambda place: [mistake(place) for mistake in mistakes]


# Files


def remove(name):
    return lambda place: (place.root / name).unlink()


def write(name, content):
    """Replace a file by a text or bytes."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda place: (place.root / name).write_bytes(raw)


def cut(name, keep):
    """Leave the first bytes of a file; a negative number is taken off its end."""
    return lambda place: (place.root / name).write_bytes((place.root / name).read_bytes()[:keep])


def flip(name, offset, bit=0x40):
    """Turn one bit of a file."""

    def apply(place):
        content = bytearray((place.root / name).read_bytes())
        content[offset] ^= bit
        (place.root / name).write_bytes(content)

    return apply


def replace(name, old, new):
    """Replace a text in a file that holds it."""

    def apply(place):
        content = (place.root / name).read_text()
        assert old in content
        (place.root / name).write_text(content.replace(old, new))

    return apply


def link_outside(name):
    """Put a link in place of a file, to where the file now is: outside of its folder."""

    def apply(place):
        moved = place.root / "elsewhere"
        moved.mkdir()
        path = place.root / name
        shutil.move(path, moved / path.name)
        path.symlink_to(moved / path.name)

    return apply


# JSON and tensors


def config(name="model/config.json", **fields):
    """Set fields of a JSON file; None removes one."""

    def apply(place):
        path = place.root / name
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return apply


def plan(**fields):
    """Set fields of the checkpoint's plan."""

    def apply(place):
        path = place.packed / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"].update(fields)
        path.write_text(json.dumps(content))

    return apply


def tensor(key, change):
    """Change one tensor of the model; to None, to leave it out."""

    def apply(place):
        tensors = load_file(place.weights)
        changed = change(tensors.pop(key))
        tensors |= {} if changed is None else {key: changed.contiguous()}
        save_file(tensors, place.weights, {"format": "pt"})

    return apply


def value(number, *index):
    """A change of a tensor: one value."""

    def change(old):
        new = old.clone()
        new[index or (0,) * old.dim()] = number
        return new

    return change


def header(change):
    """Edit the header of the model's file as JSON; the tensors stay as they are."""

    def apply(place):
        content = place.weights.read_bytes()
        length = int.from_bytes(content[:8], "little")
        fields = json.loads(content[8 : 8 + length])
        change(fields)
        text = json.dumps(fields).encode()
        place.weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def index(change):
    """Cut the model's file in two, with an index whose map of files is edited."""

    def apply(place):
        tensors = load_file(place.weights)
        place.weights.unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, members in parts.items():
            save_file({n: tensors[n] for n in members}, place.model / file, {"format": "pt"})
        files = {name: file for file, members in parts.items() for name in members}
        fields = {"metadata": {}, "weight_map": change(files)}
        (place.model / "model.safetensors.index.json").write_text(json.dumps(fields))

    return apply


def rename(old, new):
    """A change of an index: another name for a file."""
    return lambda files: {key: new if file == old else file for key, file in files.items()}


def beside(name, *mistakes):
    """An index that names a second file outside, and what lies there."""

    def apply(place):
        index(rename("a.safetensors", name.format(root=place.root)))(place)
        shutil.move(place.model / "a.safetensors", place.root / "a.safetensors")
        for mistake in mistakes:
            mistake(place)

    return apply


# Models that are not damaged, but odd


def unreached_experts(place):
    """Of six experts only four can win: the largest of v.x, -v.x and of w.x, -w.x are above 0."""
    tensors = load_file(place.weights)
    for key in [key for key in tensors if key.endswith("mlp.gate.weight")]:
        gate = tensors[key]
        tensors[key] = torch.stack([gate[0], -gate[0], gate[1], -gate[1], *(0 * gate[4:6])])
    save_file(tensors, place.weights, {"format": "pt"})


def silent_layer(place):
    """A layer whose blocks see zeros alone."""
    name = "model.layers.1.post_attention_layernorm.weight"
    tensor(name, torch.zeros_like)(place)


def snapshot_of_the_hub(place):
    """The model as the hub's cache holds it: links from a snapshot to the blobs beside it."""
    blobs, snapshot = place.root / "hub" / "blobs", place.root / "hub" / "snapshots" / "1f"
    shutil.copytree(place.model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
