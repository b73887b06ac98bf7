"""LoRA by supervised fine-tuning (Hu et al. 2021, arXiv:2106.09685): loss on the answer only, many rows a sequence.

    rows = rows_of(base, examples)
    outcome = train(base, rows, validation, Lora(rank=16), report=print, cancelled=event.is_set)
    outcome.model.save_pretrained("adapter")

All rows of a workload begin alike, so a batch is packed as one sequence `[prefix][row 1][row 2]…`: a mask lets each row
see the prefix and itself, positions restart after the prefix, and logits are computed only where a target is predicted.
Gradients equal those of the padded batch; the shared prefix is paid for once.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from flywheel_ray.candidates import Lora
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError
from flywheel_ray.platforms.local.formatting import ChatFormat
from flywheel_ray.platforms.local.jobs import Cancelled
from flywheel_ray.platforms.local.models import Base
from flywheel_ray.results import LossPoint

PACKABLE = {"llama", "qwen2", "qwen3"}
"""Model types whose packed gradients are tested; all others get padded batches."""

MAX_VALIDATION_ROWS = 64
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One training row: token ids of prompt and answer; the answer begins at `prompt_tokens`."""

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Progress:
    """What training tells while it runs: a step done of so many, the new loss point, tokens of all rows seen so far."""

    step: int
    steps: int
    tokens: int
    train: LossPoint | None = None
    validation: LossPoint | None = None


@dataclass(frozen=True)
class Trained:
    """The PEFT model (a tree of its own; the base is untouched), seconds spent, tokens and rows of the training set."""

    model: Any
    train_s: float
    train_tokens: int
    train_records: int


def rows_of(base: Base, examples: Sequence[Example]) -> list[Row]:
    """Examples as token ids; those longer than the model's context are left out."""
    chat = ChatFormat(base.tokenizer)
    rows = []
    for example in examples:
        prompt = chat.prompt_ids(example.messages, example.tools)
        rows.append(Row((*prompt, *chat.target_ids(example.reference)), len(prompt)))
    return [row for row in rows if len(row.ids) <= base.context]


def train(
    base: Base,
    rows: Sequence[Row],
    validation: Sequence[Row],
    lora: Lora,
    report: Callable[[Progress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Trained:
    """Fine-tune and return the model with its adapter; deterministic for a seed on one machine.

    Args:
        base: the model to adapt; it is not changed.
        rows: training rows, in an order that does not matter.
        validation: rows for the validation loss, taken twice an epoch (at most 64 rows of them).
        lora: the adapter's shape and the optimizer's settings.
        report: called after every step and every validation.
        cancelled: asked before every forward pass.

    Raises:
        PlatformError: there is no training row.
        Cancelled: `cancelled()` became true.
    """
    if not rows:
        raise PlatformError(
            f"no training row fits model '{base.name}' (context {base.context} tokens): give at least one record with "
            "a shorter prompt"
        )
    model = with_lora(base, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lora.learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(rows) / lora.batch_size)
    steps = lora.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    started, tokens = time.perf_counter(), 0
    for step, batch in enumerate(batches(rows, lora), start=1):
        model.train()
        loss = accumulate(model, batch, cancelled)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(len(row.ids) for row in batch)
        epoch = step / steps_per_epoch
        report(Progress(step, steps, tokens, train=LossPoint(step=step, epoch=epoch, value=loss)))
        if validation and _validates(step, steps_per_epoch):
            value = validation_loss(model, validation[:MAX_VALIDATION_ROWS], lora.batch_size, cancelled)
            report(Progress(step, steps, tokens, validation=LossPoint(step=step, epoch=epoch, value=value)))
    return Trained(model.eval(), time.perf_counter() - started, tokens, len(rows))


def with_lora(base: Base, lora: Lora) -> Any:
    """A tree of the base with a fresh adapter on every linear layer, initialised from the seed."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.effective_alpha,  # PEFT only divides by it
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        model = get_peft_model(base.tree(), config)
    model.peft_config["default"].base_model_name_or_path = base.name
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps (at most 10), then linear decay to a twentieth."""
    warm_up = max(1, min(10, steps // 20))
    return min(1.0, (step + 1) / warm_up) * max(0.05, 1 - step / steps)


def batches(rows: Sequence[Row], lora: Lora) -> Iterator[list[Row]]:
    """Batches of all epochs, shuffled anew each epoch by the seed alone."""
    rng = random.Random(lora.seed)
    order = list(rows)
    for _ in range(lora.epochs):
        rng.shuffle(order)
        for start in range(0, len(order), lora.batch_size):
            yield order[start : start + lora.batch_size]


def accumulate(model: Any, batch: Sequence[Row], cancelled: Callable[[], bool] = lambda: False) -> float:
    """Add the batch's gradients to the parameters and return its loss: the mean over all target tokens, in nats."""
    targets = sum(len(row.ids) - row.prompt_tokens for row in batch)
    total = 0.0
    for part in parts(model.config, batch):
        if cancelled():
            raise Cancelled
        loss = summed_loss(model, part) / targets
        loss.backward()
        total += loss.item()
    return total


def validation_loss(
    model: Any, rows: Sequence[Row], batch_size: int, cancelled: Callable[[], bool] = lambda: False
) -> float:
    """Mean loss per target token over the rows, in nats, without dropout."""
    model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            for part in parts(model.config, rows[start : start + batch_size]):
                if cancelled():
                    raise Cancelled
                total += summed_loss(model, part).item()
                targets += sum(len(row.ids) - row.prompt_tokens for row in part)
    return total / targets


def summed_loss(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy summed over the target tokens of the rows: one forward pass, packed where the model allows it."""
    with _autocast(model.device):
        return packed_loss(model, rows) if packable(model.config) else padded_loss(model, rows)


def packable(config: Any) -> bool:
    """True for models that attend to everything before a token, in every layer, in an architecture that was tested."""
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return config.model_type in PACKABLE and set(layers) == {"full_attention"}


def parts(config: Any, batch: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The batch cut into forward passes of about `pack_tokens` each; gradients add up to the whole batch's."""
    prefix = shared_prefix(batch)
    limit = pack_tokens(config, prefix)
    part: list[Row] = []
    length = prefix
    for row in batch:
        extra = len(row.ids) - prefix
        if part and length + extra > limit:
            yield part
            part, length = [], prefix
        part.append(row)
        length += extra
    yield part


def pack_tokens(config: Any, prefix: int) -> int:
    """The sequence length, in tokens, at which a pack of rows with that prefix costs least.

    A longer pack pays for the prefix less often but for attention between rows that the mask throws away: cost a token
    is about prefix/length + length/scale, where `scale` is the length at which attention costs as much as the layers.
    """
    scale = 5 * int(getattr(config, "hidden_size", 576))
    return int(min(4096, max(384, math.sqrt(max(prefix, 1) * scale))))


def shared_prefix(rows: Sequence[Row]) -> int:
    """How many tokens all prompts share from the start; each keeps at least its last prompt token to itself."""
    limit = min(row.prompt_tokens for row in rows) - 1
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)  # differ soonest of all pairs
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def packed_loss(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Summed loss of rows as one sequence `[prefix][row 1][row 2]…` of shape (1, tokens)."""
    prefix = shared_prefix(rows)
    ids, positions, segments = list(rows[0].ids[:prefix]), list(range(prefix)), [0] * prefix
    predicting: list[int] = []
    labels: list[int] = []
    for number, row in enumerate(rows, start=1):
        # The token before a target predicts it; it belongs to the same row because the prefix ends before it.
        predicting += [len(ids) + i - prefix - 1 for i in range(row.prompt_tokens, len(row.ids))]
        labels += row.ids[row.prompt_tokens :]
        ids += row.ids[prefix:]
        positions += range(prefix, len(row.ids))
        segments += [number] * (len(row.ids) - prefix)
    device = model.device
    logits = model(
        input_ids=torch.tensor([ids], device=device),
        attention_mask=block_mask(torch.tensor(segments, device=device), next(model.parameters()).dtype),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor(predicting, device=device),
        use_cache=False,
    ).logits[0]
    return cross_entropy(logits.float(), torch.tensor(labels, device=device), reduction="sum")


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask (1, 1, n, n): each token sees earlier tokens of its own segment and of segment 0."""
    n = segments.shape[0]
    earlier = torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()
    seen = earlier & ((segments[:, None] == segments[None, :]) | (segments[None, :] == 0))
    return torch.zeros(n, n, dtype=dtype, device=segments.device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def padded_loss(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Summed loss of rows as a right-padded batch of shape (rows, longest); logits only from the first target on."""
    width = max(len(row.ids) for row in rows)
    first = min(row.prompt_tokens for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=model.device)
    seen = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=model.device)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        labels[i, row.prompt_tokens : len(row.ids)] = ids[i, row.prompt_tokens : len(row.ids)]
    logits = model(input_ids=ids, attention_mask=seen, logits_to_keep=width - first + 1, use_cache=False).logits
    wanted = labels[:, first:].reshape(-1)
    return cross_entropy(logits[:, :-1].reshape(len(wanted), -1).float(), wanted, ignore_index=IGNORED, reduction="sum")


def _validates(step: int, steps_per_epoch: int) -> bool:
    within = (step - 1) % steps_per_epoch + 1
    return within == steps_per_epoch or (steps_per_epoch >= 4 and within == steps_per_epoch // 2)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
