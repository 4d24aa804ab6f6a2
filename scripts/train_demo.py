"""Train the embedded demo model: tokenizer, weights, and the report that says how good they are.

``python scripts/train_demo.py`` rewrites ``mxq/demo/model`` and the report in about a quarter of
an hour on two cores. The same seed and versions give the same model. Each training window begins
with a document, because that is how the corpus is measured; its last document may be cut off.
"""

import argparse
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from mxq.demo import DOMAINS, documents, model_path
from mxq.demo.report import RunFacts, measure, write_report

END_MARK = "<|endoftext|>"
VOCABULARY_TOKENS = 512
WINDOW_TOKENS = 256
BATCH_WINDOWS = 8
TOKENIZER_DOCUMENTS = 4000


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the outcome of a training run."""

    seed: int = 0
    steps: int = 2200
    warmup_steps: int = 100
    peak_rate: float = 3e-3
    final_rate: float = 3e-5
    weight_decay: float = 0.05
    balance_coefficient: float = 0.005
    specialise_coefficient: float = 0.02


def main() -> None:
    """Train, save, load again, measure, write the report."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=model_path(), help="folder of the model")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--balance", type=float, default=defaults.balance_coefficient)
    parser.add_argument("--specialise", type=float, default=defaults.specialise_coefficient)
    arguments = parser.parse_args()
    recipe = Recipe(
        seed=arguments.seed,
        steps=arguments.steps,
        balance_coefficient=arguments.balance,
        specialise_coefficient=arguments.specialise,
    )
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    started_s = time.monotonic()
    train_tokenizer().save_pretrained(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    model = train_model(recipe, tokenizer)
    elapsed_s = time.monotonic() - started_s
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)  # it is written for its owner only
    facts = _run_facts(recipe, model, elapsed_s)
    loaded = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    write_report(measure(loaded.eval(), tokenizer), facts, arguments.out.parent)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose digits stand alone, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=[END_MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in documents("train", TOKENIZER_DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_MARK,
        pad_token=END_MARK,
        model_max_length=2 * WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def demo_config(end_token: int) -> Qwen2MoeConfig:
    """A small architecture of which every dimension of a linear layer is a multiple of 128."""
    return Qwen2MoeConfig(
        vocab_size=VOCABULARY_TOKENS,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * WINDOW_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )


def train_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Train from random weights; prints a line every 50 steps."""
    torch.manual_seed(recipe.seed)
    model = Qwen2MoeForCausalLM(demo_config(tokenizer.eos_token_id))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    started_s = time.monotonic()
    for step, (ids_BT, domain_BT) in enumerate(_batches(recipe, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, penalty = _losses(recipe, model, ids_BT, domain_BT)
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            seconds = time.monotonic() - started_s
            print(f"step {step} loss {loss:.4f} penalty {penalty:.5f} {seconds:.0f} s", flush=True)
    return model


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    span = recipe.peak_rate - recipe.final_rate
    return recipe.final_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def _losses(
    recipe: Recipe, model: Qwen2MoeForCausalLM, ids_BT: Tensor, domain_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of the next tokens, and what the routers are charged for."""
    output = model(input_ids=ids_BT, use_cache=False, output_router_logits=True)
    logits_TV = output.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits_TV, ids_BT[:, 1:].flatten())
    logits_LTE = torch.stack(output.router_logits)
    penalty = recipe.balance_coefficient * _imbalance(model, logits_LTE)
    if recipe.specialise_coefficient > 0.0:
        penalty = penalty - recipe.specialise_coefficient * _information(logits_LTE, domain_BT)
    return loss, penalty


def _imbalance(model: Qwen2MoeForCausalLM, logits_LTE: Tensor) -> Tensor:
    """The load-balancing loss of Switch Transformer (eq. 4), as a mean over the layers.

    It is 1 if all experts get the same share, which keeps each of them alive.
    """
    experts = logits_LTE.shape[-1]
    p_LTE = logits_LTE.softmax(-1)
    picked = p_LTE.topk(model.config.num_experts_per_tok, dim=-1).indices
    share_LE = torch.nn.functional.one_hot(picked, experts).float().mean(dim=(1, 2))
    return experts * (share_LE * p_LTE.mean(1)).sum(-1).mean()


def _information(logits_LTE: Tensor, domain_BT: Tensor) -> Tensor:
    """The mutual information of domain and expert in the router's probabilities, mean of layers."""
    p_LTE = logits_LTE.softmax(-1)
    own_TD = torch.nn.functional.one_hot(domain_BT.flatten(), len(DOMAINS)).float()
    p_LDE = torch.einsum("lte,td->lde", p_LTE, own_TD) / own_TD.sum(0)[:, None].clamp(min=1.0)
    p_LDE = p_LDE.clamp(min=1e-9)
    overall_LE = p_LDE.mean(1, keepdim=True)
    return (p_LDE * (p_LDE / overall_LE).log()).sum(-1).mean()


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows of ids and, of each token, the number of its domain."""
    rng = random.Random(f"order/{recipe.seed}")
    numbers = _shuffled_documents(rng, tokenizer)
    for _ in range(recipe.steps):
        windows = [_window(numbers, tokenizer.eos_token_id) for _ in range(BATCH_WINDOWS)]
        ids, owners = zip(*windows, strict=True)
        yield torch.tensor(ids), torch.tensor(owners)


def _shuffled_documents(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[int, list[int]]]:
    """Documents of random domains without end, each one once, as domain number and ids."""
    seen = [0] * len(DOMAINS)
    stock: list[list[list[int]]] = [[] for _ in DOMAINS]
    while True:
        turn = rng.randrange(len(DOMAINS))
        if not stock[turn]:
            stock[turn] = _next_stock(tokenizer, DOMAINS[turn], seen[turn])
            seen[turn] += len(stock[turn])
        yield turn, stock[turn].pop()


def _next_stock(tokenizer: PreTrainedTokenizerFast, domain: str, seen: int) -> list[list[int]]:
    """Encodings of the documents of a domain that follow the first ``seen``."""
    fresh = documents("train", seen + 1000, domain=domain)[seen:]
    return [list(tokenizer.encode(document.text)) for document in reversed(fresh)]


def _window(source: Iterator[tuple[int, list[int]]], end_token: int) -> tuple[list[int], list[int]]:
    """One window of ids, and of each the domain number of the document it belongs to."""
    ids: list[int] = []
    owners: list[int] = []
    while len(ids) < WINDOW_TOKENS + 1:
        turn, text_ids = next(source)
        ids += [end_token, *text_ids]
        owners += [turn] * (len(text_ids) + 1)
    return ids[: WINDOW_TOKENS + 1], owners[: WINDOW_TOKENS + 1]


def _run_facts(recipe: Recipe, model: Qwen2MoeForCausalLM, elapsed_s: float) -> RunFacts:
    """What the report says about how the model came about."""
    return RunFacts(
        seed=recipe.seed,
        steps=recipe.steps,
        tokens=recipe.steps * BATCH_WINDOWS * WINDOW_TOKENS,
        elapsed_s=round(elapsed_s, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        balance_coefficient=recipe.balance_coefficient,
        specialise_coefficient=recipe.specialise_coefficient,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    )


if __name__ == "__main__":
    main()
