"""Other libraries on the same products. Each is optional; why one is missing is recorded.

Peers get what is best for them: inputs already gathered where they want them so, alignment tables
made before, symmetric grids, the tile shapes that their own tables choose. Their results are
compared with a float32 product of the weights that they hold before anything is timed.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from group_gemm.products import copies_needed
from group_gemm.shapes import Model, expert_counts
from mxq.scheme import Scheme

TOLERANCE = 1e-2
"""Norm of the error over the norm of the result: bf16 operands and results give under 0.5 %."""

CHECKED_EXPERTS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """One product of a case: inputs [rows, K] bf16, and the experts of each of its assignments.

    Row ``a // share`` of ``x`` is the input of assignment ``a``. ``order`` sorts assignments by
    expert, ``ends`` are the ends of the experts in that order.
    """

    x: Tensor
    index: Tensor
    experts: int
    out_features: int
    share: int
    order: Tensor
    ends: Tensor

    @property
    def sorted_x(self) -> Tensor:
        """Inputs of the assignments, gathered in the order of their experts."""
        return self.x[self.order // self.share].contiguous()


@dataclass(frozen=True, slots=True)
class PeerProduct:
    """A peer's product: ``launch(copy)`` returns results [assignments, N] in ``order``.

    ``order`` None means that of the assignments. ``decoded`` gives the float32 weight [N, K] of an
    expert; ``x`` the inputs as rounded, by assignment where ``share`` is 1.
    """

    launch: Callable[[int], Tensor]
    decoded: Callable[[int], Tensor]
    order: Tensor | None
    x: Tensor
    weight_bytes: int


Maker = Callable[[Task, Scheme, int], PeerProduct]
"""Makes the product of a task in a scheme, with so many copies of its weights."""


def make_task(x: Tensor, index: Tensor, experts: int, out_features: int, share: int) -> Task:
    """A product for the experts of a router's choice."""
    flat = index.flatten().long()
    ends = torch.tensor(expert_counts(flat, experts)).cumsum(0).to(torch.int32)
    order = flat.argsort(stable=True)
    return Task(x, flat, experts, out_features, share, order, ends.to(x.device))


def peer_pair(
    maker: Maker, scheme: Scheme, model: Model, index_TR: Tensor, device: str
) -> tuple[list[Callable[[], object]], int]:
    """Launches of both products, one for each copy of the weights, and the bytes of their weights.

    Raises:
        ValueError: If a result is not that of the weights.
    """
    tokens, slots = len(index_TR), index_TR.numel()
    index = index_TR.to(device)
    generator = torch.Generator(device).manual_seed(7)
    bits = scheme.storage_bits(1, 1024) / 1024
    reached = sum(count > 0 for count in expert_counts(index, model.experts))
    copies = copies_needed(int(reached * 3 * model.hidden * model.inner * bits / 8))
    products, read = [], 0
    for n, k, rows, share in (
        (2 * model.inner, model.hidden, tokens, model.top_k),
        (model.hidden, model.inner, slots, 1),
    ):
        x = torch.randn(rows, k, generator=generator, device=device).to(torch.bfloat16)
        task = make_task(x, index, model.experts, n, share)
        product = maker(task, scheme, copies)
        check(product, task)
        products.append(product)
        read += product.weight_bytes * reached // model.experts

    def launch(copy: int) -> None:
        for product in products:
            product.launch(copy)

    return [lambda copy=copy: launch(copy) for copy in range(copies)], read


def check(product: PeerProduct, task: Task) -> None:
    """Raise ValueError unless the outputs of a few experts are right."""
    out = product.launch(0).float().reshape(len(task.index), -1)[:, : task.out_features]
    if product.order is not None:
        by_assignment = torch.empty_like(out)
        by_assignment[product.order] = out
        out = by_assignment
    counts = expert_counts(task.index, task.experts)
    busiest = sorted(range(task.experts), key=lambda e: -counts[e])[:CHECKED_EXPERTS]
    for expert in (e for e in busiest if counts[e] > 0):
        chosen = (task.index == expert).nonzero()[:, 0]
        x = product.x[chosen // task.share].float()
        expected = x @ product.decoded(expert).T
        error = float((out[chosen] - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise ValueError(f"the result of expert {expert} is off by {error:.3g} of its norm")


def torch_maker(task: Task, scheme: Scheme, copies: int) -> PeerProduct:
    """``torch._grouped_mm`` in bf16, ``torch._scaled_grouped_mm`` in fp8 with row scales."""
    weights = _dense(task)
    x = task.sorted_x
    if scheme.kind == "bf16":
        held = [weights, *(weights.clone() for _ in range(copies - 1))]
        return PeerProduct(
            lambda copy: torch._grouped_mm(x, held[copy].transpose(1, 2), offs=task.ends),
            lambda expert: weights[expert].float(),
            task.order,
            task.x,
            weights.nbytes,
        )
    w8, w_scale = _to_fp8(weights)
    x8, x_scale = _to_fp8(x)
    held = [w8, *(w8.clone() for _ in range(copies - 1))]

    def launch(copy: int) -> Tensor:
        return torch._scaled_grouped_mm(
            x8,
            held[copy].transpose(1, 2),
            x_scale[:, 0],
            w_scale[..., 0],
            offs=task.ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    decoded_x = torch.empty_like(x, dtype=torch.float32)
    decoded_x[task.order] = x8.float() * x_scale  # by assignment
    return PeerProduct(
        launch,
        lambda expert: w8[expert].float() * w_scale[expert],
        task.order,
        decoded_x[:: task.share],
        w8.nbytes,
    )


def flag_gems_maker(task: Task, scheme: Scheme, copies: int) -> PeerProduct:
    """The fused expert kernels of flag-gems, with the tile shapes that it chooses."""
    fused = importlib.import_module("flag_gems.fused.fused_moe")
    tl = importlib.import_module("triton.language")
    widths = {"use_int4_w4a16": scheme.w_bits == 4, "use_int8_w8a16": scheme.w_bits == 8}
    weight, scale = _flag_gems_weight(task, scheme)
    name = fused._get_config_dtype_str(dtype=torch.bfloat16, **widths)
    block = None if scale is None else [0, 128]
    tokens, sizes = len(task.index) // task.share, (weight.size(), weight.size())
    config = fused.try_get_optimal_moe_config(*sizes, task.share, name, tokens, task.experts, block)
    config = {"SPLIT_K": 1, **config}
    tables = align_blocks(task.index, task.experts, config["BLOCK_SIZE_M"])
    shape = (tokens, task.share, task.out_features)
    out = torch.empty(shape, dtype=torch.bfloat16, device=task.x.device)
    held = [weight, *(weight.clone() for _ in range(copies - 1))]

    def launch(copy: int) -> Tensor:
        fused.dispatch_fused_moe_kernel(
            task.x, held[copy], out, None, scale, None, None, *tables,
            False, task.share, dict(config), compute_type=tl.bfloat16, use_fp8_w8a8=False,
            use_int8_w8a8=False, per_channel_quant=False, block_shape=block, **widths,
        )  # fmt: skip
        return out

    def decoded(expert: int) -> Tensor:
        if scale is None:
            return weight[expert].float()
        return _flag_gems_decoded(weight[expert], scale[expert], scheme.w_bits)

    read = weight.nbytes + (0 if scale is None else scale.nbytes)
    return PeerProduct(launch, decoded, None, task.x, read)


def _flag_gems_weight(task: Task, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Random bytes (one code, or two with the even input in the low half) and scales [E, N, G]."""
    if scheme.kind == "bf16":
        return _dense(task), None
    e, n, k = task.experts, task.out_features, task.x.shape[1]
    generator = torch.Generator(task.x.device).manual_seed(3)
    weight = torch.randint(
        0, 256, (e, n, k * scheme.w_bits // 8), generator=generator, device=task.x.device
    )
    return weight.to(torch.uint8), _scales((e, n, k // 128), scheme.w_bits, generator)


def _flag_gems_decoded(codes_NK: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    codes = codes_NK.int()
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    whole = codes.float() - 2 ** (bits - 1)
    # The kernel rounds each weight to bf16.
    return (whole * scale_NG.float().repeat_interleave(128, 1)).bfloat16().float()


def humming_maker(gemm_type: str) -> Maker:
    """humming-kernels, with the tile shapes that its heuristics choose for the number of rows."""

    def make(task: Task, scheme: Scheme, copies: int) -> PeerProduct:
        forward = importlib.import_module("humming.forward")
        tune = importlib.import_module("humming.tune")
        config, held, decoded = _humming_weights(task, scheme, copies)
        slots, is_indexed = len(task.index), gemm_type == "indexed"
        tuning = tune.get_heuristics_config(config, shape_m=slots, gemm_type=gemm_type)
        x = task.x if is_indexed else task.sorted_x
        values, scales = forward.may_quant_input(config, x)
        tables = _humming_tables(task, tuning["block_shape"][0], is_indexed=is_indexed)
        shape = (slots, task.out_features)
        out = torch.empty(shape, dtype=torch.bfloat16, device=task.x.device)
        locks = torch.zeros(2048, dtype=torch.int32, device=task.x.device)

        def launch(copy: int) -> Tensor:
            forward.humming_forward(
                config, inputs=values, outputs=out, input_scale=scales, locks=locks,
                compute_config={"gemm_type": gemm_type}, tuning_config=tuning,
                **held[copy], **tables,
            )  # fmt: skip
            return out

        decoded_x = x.float() if scales is None else values.float() * scales.reshape(-1, 1)
        if not is_indexed:
            by_assignment = torch.empty_like(decoded_x)
            by_assignment[task.order] = decoded_x
            decoded_x = by_assignment[:: task.share]
        order = None if is_indexed else task.order
        read = sum(tensor.nbytes for tensor in held[0].values() if tensor is not None)
        return PeerProduct(launch, decoded, order, decoded_x, read)

    return make


def _humming_tables(task: Task, block: int, *, is_indexed: bool) -> dict[str, Any]:
    """Which expert has which rows: padded blocks of assignments, or starts in sorted rows."""
    if not is_indexed:
        return {"expert_layout": torch.nn.functional.pad(task.ends.long(), (1, 0)), "top_k": 1}
    ids, owners, count = align_blocks(task.index, task.experts, block)
    return {
        "sorted_ids": ids,
        "expert_ids": owners,
        "num_tokens_padded": count.reshape(()),
        "top_k": task.share,
    }


def _humming_weights(
    task: Task, scheme: Scheme, copies: int
) -> tuple[Any, list[dict[str, Tensor | None]], Callable[[int], Tensor]]:
    """Its layer configuration, the tensors of each copy, and the decoded weight of an expert."""
    schema_module = importlib.import_module("humming.schema")
    transform = importlib.import_module("humming.transform")
    schema = schema_module.BaseWeightSchema.from_config(
        {
            "quant_method": "humming",
            "dtype": f"uint{scheme.w_bits}",
            "group_size": scheme.group_size or 0,
        }
    )
    inputs = None
    if scheme.a_bits == 8:
        inputs = schema_module.HummingInputSchema(a_dtype="int8")
    packed = schema.quant_tensor(_dense(task), schema, torch.bfloat16)
    first = {name: tensor for name, tensor in packed.items() if tensor is not None}

    def decoded(expert: int) -> Tensor:
        return schema.dequant_tensors({key: t[expert] for key, t in first.items()}).float()

    tensors = dict(first)
    config = transform.prepare_layer_config(
        shape_n=task.out_features,
        shape_k=task.x.shape[1],
        weight_schema=schema,
        input_schema=inputs,
        num_experts=task.experts,
        torch_dtype=torch.bfloat16,
        tensors=tensors,
    )
    config, tensors = transform.prepare_fp16_e8m0_scale(config, tensors)
    tensors = transform.transform_humming_tensors(config, tensors)
    names = ("weight", "weight_scale", "zero_point", "bias", "weight_scale_2")
    tensors = {name: tensors.get(name) for name in names}
    more = [
        {key: None if t is None else t.clone() for key, t in tensors.items()}
        for _ in range(copies - 1)
    ]
    return config, [tensors, *more], decoded


def align_blocks(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert, each expert padded to whole blocks; the expert of each block.

    Also the padded number of assignments, int32 [1]. Padding is the number of assignments.
    """
    ids, owners = [], []
    for expert in range(experts):
        chosen = (index == expert).nonzero()[:, 0].to(torch.int32)
        blocks = -(-len(chosen) // block)
        ids.append(
            torch.nn.functional.pad(chosen, (0, blocks * block - len(chosen)), value=len(index))
        )
        owners += [expert] * blocks
    device = index.device
    sorted_ids = torch.cat(ids)
    count = torch.tensor([len(sorted_ids)], dtype=torch.int32, device=device)
    return sorted_ids, torch.tensor(owners, dtype=torch.int32, device=device), count


MAKERS: Mapping[str, Maker] = {
    "torch": torch_maker,
    "humming-indexed": humming_maker("indexed"),
    "humming-grouped": humming_maker("grouped_contiguous"),
    "flag-gems": flag_gems_maker,
}

PACKAGES = {
    "torch": ("torch", "torch"),
    "humming-indexed": ("humming-kernels", "humming.forward"),
    "humming-grouped": ("humming-kernels", "humming.forward"),
    "flag-gems": ("flag-gems", "flag_gems.fused.fused_moe"),
}
"""Package and module of each peer."""


def available(names: Sequence[str] = tuple(MAKERS)) -> dict[str, str]:
    """``peer -> version``, or why it cannot run, starting with "missing"."""
    found = {}
    for name in names:
        package, module = PACKAGES[name]
        try:
            importlib.import_module(module)
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "version unknown"
        except Exception as error:  # noqa: BLE001  # whatever a library of others does at import
            found[name] = f"missing: {type(error).__name__}: {error}"
    return found


def _dense(task: Task) -> Tensor:
    generator = torch.Generator(task.x.device).manual_seed(11)
    shape = (task.experts, task.out_features, task.x.shape[1])
    weight = torch.empty(shape, dtype=torch.bfloat16, device=task.x.device)
    return weight.normal_(generator=generator).div_(64)


def _scales(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    random = torch.rand(shape, generator=generator, device=generator.device)
    return ((random + 0.5) / (32 * 2 ** (bits - 1))).to(torch.bfloat16)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    peak = torch.finfo(torch.float8_e4m3fn).max
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / peak
    return (x.float() / scale).to(torch.float8_e4m3fn), scale
