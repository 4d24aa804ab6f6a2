"""Which module of the original has which scheme, by the names that other engines know."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mxq.checkpoint.export.names import Stored, stored_modules
from mxq.checkpoint.export.packed import PackedBlock, PackedCheckpoint, Shard
from mxq.checkpoint.export.targets import Rule, describe, matches
from mxq.counted import counted
from mxq.scheme import Scheme

Label = Scheme | None
"""None: the module keeps a plain weight."""


@dataclass(frozen=True, slots=True)
class Naming:
    """``modules`` are the stored modules by block path; ``rules`` say which modules have a scheme.

    ``unnamed`` are the paths of experts whose weights the original stores in one tensor: here each
    has the name of its path.
    """

    stored: Stored
    modules: Mapping[str, str]
    rules: Mapping[Label, tuple[Rule, ...]]
    unnamed: tuple[str, ...]


def name_blocks(checkpoint: PackedCheckpoint) -> Naming:
    """Names of all blocks, and rules for them and for the linears beside them.

    Raises:
        ValueError: If a block is rotated, or the original stores a linear in another arrangement.
    """
    _check_unrotated(checkpoint)
    blocks = checkpoint.blocks.values()
    own = stored_modules(checkpoint.model, blocks)
    for block in blocks:
        if block.path not in own and block.experts is None:
            raise ValueError(
                f"the original of this model does not store {block.path} as a matrix of its own, "
                "and this format has no other way; export --to dequantized"
            )
    unnamed = {b.experts for b in blocks if b.experts is not None and b.path not in own}
    modules = {block.path: own.get(block.path, block.path) for block in blocks}
    stored = Stored.of(checkpoint.model)
    rules = _rules(checkpoint, stored, modules)
    return Naming(stored, modules, rules, tuple(sorted(unnamed)))


def plain_tensors(naming: Naming, shard: Shard) -> dict[str, Tensor]:
    """What a file holds beside quantized weights, by the names in the original's files."""
    kept, named = dict(shard.kept), {}
    for block in shard.blocks:
        module = naming.modules[block.path]
        if block.scheme.kind == "bf16":
            named[f"{module}.weight"] = shard.tensors[block.path]["weight"]
        if block.experts is not None and f"{block.path}.bias" in kept:
            named[f"{module}.bias"] = kept.pop(f"{block.path}.bias")
    return {**naming.stored.restore(kept), **named}


def label_of(block: PackedBlock) -> Label:
    """The scheme of a block, None where its weight is plain."""
    return None if block.scheme.kind == "bf16" else block.scheme


def _check_unrotated(checkpoint: PackedCheckpoint) -> None:
    """Raise ValueError if a weight meets a rotated input, which no other engine rotates."""
    rotated = [block.path for block in checkpoint.blocks.values() if block.is_rotated]
    if rotated:
        raise ValueError(
            f"{checkpoint.folder} has {counted(len(rotated), 'weight')} with rotated inputs (first "
            f"{rotated[0]}), and other engines do not rotate: the model would be wrong there. "
            "Quantize with --rotation off, or export --to dequantized"
        )


def _rules(
    checkpoint: PackedCheckpoint, stored: Stored, modules: Mapping[str, str]
) -> dict[Label, tuple[Rule, ...]]:
    """Rules by the stored names; for transformers, also by those of its tree if they differ."""
    plain = _plain_linears(checkpoint)
    labels: dict[str, Label] = dict.fromkeys(stored.modules_of(plain))
    labels |= {modules[block.path]: label_of(block) for block in checkpoint.blocks.values()}
    rules = describe(labels)
    tree: dict[str, Label] = dict.fromkeys(path for path in plain if path not in labels)
    for block in checkpoint.blocks.values():
        if block.experts is None and block.path not in labels:
            tree[block.path] = label_of(block)
    unmatched = {path: label for path, label in tree.items() if not matches(rules[label], path)}
    for label, others in describe(unmatched).items():
        rules[label] = (*rules[label], *others)
    return rules


def _plain_linears(checkpoint: PackedCheckpoint) -> list[str]:
    """Paths of modules that keep a matrix which an engine may hold in a linear of its own."""
    model = checkpoint.model
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    found = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = weight is not None and weight.dim() == 2
        is_linear = is_matrix and not isinstance(module, nn.Embedding)
        if module is head or (is_linear and f"{path}.weight" in checkpoint.kept):
            found.append(path)
    return found
