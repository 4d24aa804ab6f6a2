"""A model as linear blocks: which weights get a scheme, which stay, and how they are seen at work.

A *site* is a module whose inputs are captured as one: a plain linear, or all routed experts of a
layer. Everything above this folder works with blocks and sites and knows no family's name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mxq.blocks import LinearBlock, read_block, write_block
from mxq.counted import counted
from mxq.models.experts import (
    Experts,
    expert_count,
    is_fused_experts,
    locate,
    projection_shapes,
    route,
    run_expert,
)
from mxq.models.skeleton import EXPERTS_FUNCTION
from mxq.models.source import ModelSource
from mxq.numerics import fake_quantize_input, rotate, unrotate
from mxq.scheme import Scheme

_ROUTER_PARTS = {"gate", "router", "shared_expert_gate"}
"""Roles in a module path that decide where a token goes; they stay in their type."""

_FEED_FORWARD_PARTS = {"mlp", "shared_mlp", "feed_forward", "shared_expert", "shared_experts"}
"""Names of a decoder layer's children that are on its feed-forward side, beside the experts'."""

_OTHER_SENSES = re.compile(r"vision|visual|image|video|audio")
"""Roles in a module path that calibration text does not reach; they stay in their type."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Capture:
    """What one call of one site saw.

    For a linear, ``index_TR`` and ``weights_TR`` are None and every row of ``x_TK`` passes; for
    experts they are the router's choice and R is its top-k. ``output`` is part of the graph where
    gradients are on, and None where inputs alone are recorded, before the site computes.
    """

    site: str
    x_TK: Tensor
    output: Tensor | None = None
    index_TR: Tensor | None = None
    weights_TR: Tensor | None = None


Sink = Callable[[Capture], None]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every parameter of the model: quantized, or kept with the reason."""

    quantized: tuple[str, ...]
    kept: Mapping[str, str]


class ModelAdapter:
    """The blocks of a model and the sites where they work.

    ``scope`` "experts" takes the feed-forward side (routed and shared experts, dense layers'
    MLPs), "all" every linear of the decoder layers, "auto" the first for a mixture of experts and
    the second for a dense model. ``keep`` are regular expressions of parameter names to leave.

    Raises:
        ValueError: If a parameter looks like a weight and neither a block nor a rule covers it.
    """

    def __init__(
        self, source: ModelSource, *, scope: str = "auto", keep: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.keep = tuple(keep)
        self._keep = [re.compile(pattern) for pattern in keep]
        experts = [name for name, m in source.model.named_modules() if is_fused_experts(m)]
        self.is_moe = any(name.startswith(source.layers_name + ".") for name in experts)
        self.scope = scope if scope != "auto" else ("experts" if self.is_moe else "all")
        self._feed_forward = {self._relative(name).split(".")[0] for name in experts}
        self._feed_forward |= _FEED_FORWARD_PARTS if self.is_moe else set()
        self.sites: dict[str, str] = {}
        self._blocks = tuple(self._find_blocks())
        self._by_name = {block.name: block for block in self._blocks}
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self.coverage = self._cover()

    def blocks(self, layer: int | None = None) -> tuple[LinearBlock, ...]:
        """All blocks, or those of one layer, in the order of the module tree."""
        return tuple(b for b in self._blocks if layer is None or b.layer == layer)

    def block(self, name: str) -> LinearBlock:
        """The block of that name."""
        return self._by_name[name]

    def site_blocks(self, site: str) -> tuple[LinearBlock, ...]:
        """The blocks of one site; a single one for a linear."""
        return tuple(block for block in self._blocks if self.site_of(block) == site)

    def layer_sites(self, layer: int) -> tuple[str, ...]:
        """The sites of a layer, sorted."""
        return tuple(sorted({self.site_of(block) for block in self.blocks(layer)}))

    def site_of(self, block: LinearBlock) -> str:
        """The site that a block belongs to."""
        return block.name if block.expert is None else block.name.rsplit(".", 2)[0]

    def module(self, site: str) -> nn.Module:
        """The module of a site."""
        return self.source.model.get_submodule(self.sites[site])

    def parameter(self, block: LinearBlock) -> nn.Parameter:
        """The parameter that holds a block."""
        return self.source.model.get_parameter(block.tensor)

    def weight(self, name: str) -> Tensor:
        """View [N, K] of a block's weight as it is now."""
        block = self.block(name)
        return read_block(self.parameter(block), block)

    @contextmanager
    def recording(self, layer: int, sink: Sink, *, inputs_only: bool = False) -> Iterator[None]:
        """Give every call of the layer's sites to ``sink`` while the context is open.

        With ``inputs_only`` the sink is called before a site computes, so it may end the forward.
        """
        with ExitStack() as undo:
            for site in self.layer_sites(layer):
                module = self.module(site)
                if is_fused_experts(module):
                    undo.callback(_set(module, "mxq_sink", (site, sink, inputs_only)))
                elif inputs_only:
                    hook = module.register_forward_pre_hook(_input_sink(site, sink))
                    undo.callback(hook.remove)
                else:
                    undo.callback(module.register_forward_hook(_linear_hook(site, sink)).remove)
            yield

    def install(self, block: str, w_NK: Tensor, scheme: Scheme, rotated: bool) -> None:
        """Put a dequantized weight (unrotated) into its loaded layer; round its inputs too.

        ``rotated`` says in which frame the inputs are rounded.
        """
        place = self.block(block)
        write_block(self.parameter(place), place, w_NK)
        if scheme.a_bits == 16:
            return
        module = self.module(self.site_of(place))
        if place.expert is None:
            hook = _input_hook(scheme, rotated)
            self._hooks.setdefault(place.layer, []).append(module.register_forward_pre_hook(hook))
        else:
            inputs = getattr(module, "mxq_inputs", {})
            inputs[place.expert, place.projection] = _input_rounding(scheme, rotated)
            setattr(module, "mxq_inputs", inputs)  # noqa: B010  (not a declared field)

    def uninstall(self, layer: int) -> None:
        """Stop rounding inputs in a layer; its weights are to be freed or loaded anew."""
        for handle in self._hooks.pop(layer, []):
            handle.remove()
        for block in self.blocks(layer):
            module = self.module(self.site_of(block))
            if hasattr(module, "mxq_inputs"):
                del module.mxq_inputs

    def _relative(self, name: str) -> str:
        """Path below the decoder layer: ``mlp.experts`` of ``model.layers.0.mlp.experts``."""
        return name[len(self.source.layers_name) + 1 :].partition(".")[2]

    def _find_blocks(self) -> Iterator[LinearBlock]:
        for layer, module in enumerate(self.source.layers):
            inner = dict(module.named_modules())
            fused = [p for p, m in inner.items() if is_fused_experts(m) and not _stays(p)]
            for path, child in inner.items():
                if path in fused:
                    label = path.rsplit(".", 1)[-1] if len(fused) == 1 else path
                    yield from self._expert_blocks(layer, path, label, child)
                elif type(child) is nn.Linear and self._takes(layer, path, child):
                    yield self._linear_block(layer, path, child)

    def _takes(self, layer: int, path: str, linear: nn.Linear) -> bool:
        name = f"{self.source.layer_path(layer)}.{path}.weight"
        if _stays(path) or any(pattern.search(name) for pattern in self._keep):
            return False
        return self.scope == "all" or self._is_feed_forward(layer, path)

    def _is_feed_forward(self, layer: int, path: str) -> bool:
        """Whether a linear is on the side of its layer where experts are in this model.

        A layer of a single branch without experts (attention or state space alone) has no such
        side, whatever the branch is called.
        """
        child = path.split(".")[0]
        if child not in self._feed_forward:
            return False
        inner = dict(self.source.layers[layer].named_modules())
        branches = {name.split(".")[0] for name, module in inner.items() if _is_plain(module)}
        return len(branches) > 1 or any(is_fused_experts(module) for module in inner.values())

    def _linear_block(self, layer: int, path: str, linear: nn.Linear) -> LinearBlock:
        name = f"layers.{layer}.{path}"
        module = f"{self.source.layer_path(layer)}.{path}"
        self.sites[name] = module
        return LinearBlock(
            name=name,
            layer=layer,
            expert=None,
            projection=path.rsplit(".", 1)[-1],
            out_features=linear.out_features,
            in_features=linear.in_features,
            tensor=f"{module}.weight",
            module=module,
        )

    def _expert_blocks(
        self, layer: int, path: str, label: str, module: nn.Module
    ) -> Iterator[LinearBlock]:
        site, full = f"layers.{layer}.{label}", f"{self.source.layer_path(layer)}.{path}"
        # Experts stay or go together: their parameters are fused.
        if any(pattern.search(f"{full}.down_proj") for pattern in self._keep):
            return
        self.sites[site] = full
        transposed = cast(Experts, module).is_transposed
        for expert in range(expert_count(module)):
            for projection, (n, k) in projection_shapes(module).items():
                tensor, index = locate(module, expert, projection)
                yield LinearBlock(
                    name=f"{site}.{expert}.{projection}",
                    layer=layer,
                    expert=expert,
                    projection=projection,
                    out_features=n,
                    in_features=k,
                    tensor=f"{full}.{tensor}",
                    module=f"{full}.{expert}.{projection}_proj",
                    index=index,
                    transposed=transposed,
                )

    def _cover(self) -> Coverage:
        quantized = {block.tensor for block in self._blocks}
        kept, uncovered = {}, []
        modules = dict(self.source.model.named_modules())
        for name, parameter in self.source.model.named_parameters():
            reason = self._reason_to_keep(name, parameter, modules[name.rpartition(".")[0]])
            if name in quantized:
                continue
            if reason is None:
                uncovered.append(f"{name} {tuple(parameter.shape)}")
            else:
                kept[name] = reason
        for pattern in self._keep:
            self._check_kept(pattern, quantized, kept)
        if uncovered:
            listed = "\n  ".join(uncovered[:20])
            many = "look like weights and no rule covers them"
            looks = "looks like a weight and no rule covers it" if len(uncovered) == 1 else many
            raise ValueError(
                f"{counted(len(uncovered), 'parameter')} {looks}:\n"
                f"  {listed}"
                "\nKeep them in their type with --keep PATTERN (a regular expression of the name)"
            )
        return Coverage(tuple(sorted(quantized)), kept)

    def _check_kept(
        self, pattern: re.Pattern[str], quantized: set[str], kept: Mapping[str, str]
    ) -> None:
        """Raise ValueError if a pattern is not honoured, or is of nothing in this model."""
        ignored = sorted(name for name in quantized if pattern.search(name))
        if ignored:
            raise ValueError(
                f"--keep {pattern.pattern!r} names {ignored[0]}, a part of fused experts; keep all "
                "experts of a layer with a pattern that also names their down_proj"
            )
        if not any(pattern.search(name) for name in kept):
            raise ValueError(f"--keep {pattern.pattern!r} matches no parameter of this model")

    def _reason_to_keep(self, name: str, parameter: Tensor, module: nn.Module) -> str | None:
        inside = name.startswith(self.source.layers_name + ".")
        path = name.rpartition(".")[0]
        reasons = {
            "kept on request": any(pattern.search(name) for pattern in self._keep),
            "vector (norm, bias)": parameter.dim() < 2,
            "outside the decoder layers (embedding, head)": not inside,
            "router": is_router(path),
            "of images or sound": _sees_or_hears(self._relative(path)),
            "expert bias": is_fused_experts(module) and name.endswith("_bias"),
            "convolution": isinstance(module, _CONVOLUTIONS),
            f"outside the scope {self.scope!r}": _is_plain(module),
            "beside the experts, no linear": inside and self._is_beside_experts(path),
            "shared experts without an interface": "shared_experts" in path.split("."),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _is_beside_experts(self, path: str) -> bool:
        """Whether a module of a mixture of experts is outside its layer's feed-forward side."""
        layer = path[len(self.source.layers_name) + 1 :].partition(".")[0]
        return self.is_moe and not self._is_feed_forward(int(layer), self._relative(path))


def is_router(path: str) -> bool:
    """Whether a module path names a part that decides where a token goes."""
    return any(part in _ROUTER_PARTS or part.startswith("router") for part in path.split("."))


def _sees_or_hears(path: str) -> bool:
    """Whether a module path below a decoder layer names a part for images or sound."""
    return any(_OTHER_SENSES.match(part) for part in path.split("."))


def _stays(path: str) -> bool:
    return is_router(path) or _sees_or_hears(path)


def run_experts(
    module: nn.Module, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor
) -> Tensor:
    """The experts function that mxq registers with transformers: plain, recordable."""

    def output(expert: int, x_TH: Tensor) -> Tensor:
        return run_expert(module, expert, x_TH)

    watched: tuple[str, Sink, bool] | None = getattr(module, "mxq_sink", None)
    site, sink, inputs_only = watched or ("", None, False)
    if sink is not None and inputs_only:
        sink(Capture(site, hidden_TH, None, index_TR, weights_TR))
    total_TH = route(hidden_TH, index_TR, weights_TR, expert_count(module), output)
    if sink is not None and not inputs_only:
        sink(Capture(site, hidden_TH, total_TH, index_TR, weights_TR))
    return total_TH


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, run_experts)


def _linear_hook(site: str, sink: Sink) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sink(Capture(site, args[0].flatten(0, -2), output))

    return hook


def _input_sink(site: str, sink: Sink) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: sink(Capture(site, args[0].flatten(0, -2)))


def _input_hook(scheme: Scheme, rotated: bool) -> Callable[[nn.Module, Any], tuple[Tensor, ...]]:
    round_input = _input_rounding(scheme, rotated)
    return lambda module, args: (round_input(args[0]), *args[1:])


def _input_rounding(scheme: Scheme, rotated: bool) -> Callable[[Tensor], Tensor]:
    if not rotated:
        return lambda x: fake_quantize_input(x, scheme)
    return lambda x: unrotate(fake_quantize_input(rotate(x), scheme))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _set(module: nn.Module, name: str, value: object) -> Callable[[], None]:
    setattr(module, name, value)
    return lambda: delattr(module, name)
