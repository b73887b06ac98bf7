"""A student answering prompts in batches, computing what all prompts begin with once.

    chat = LocalChat(base, adapted(base, Path("runs/local/jobs/3f9a/adapter")), Generation(max_tokens=64))
    chat.complete([ChatPrompt(messages=({"role": "user", "content": "Where is my card?"},))])
    # [Completion(tool_calls=(ToolCall(name="route", …),), finish_reason="tool_calls", latency_s=1.3, …)]

The prompts of a workload share system message, tools and in-context examples; their keys and values are computed in one
forward pass and repeated for each batch. Latency is the wall time of the batch a prompt was answered in.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from flywheel_ray.errors import PlatformError
from flywheel_ray.platforms.local.formatting import ChatFormat
from flywheel_ray.platforms.local.models import Base
from flywheel_ray.platforms.local.parsing import parse
from flywheel_ray.records import Completion
from flywheel_ray.services import ChatPrompt, Generation, Unanswered

BATCH_SIZE = 32
BATCH_TOKENS = 32_768
"""Prompt and answer tokens of a batch together: bounds the memory of keys and values."""

MIN_PREFIX = 8
"""Shorter shared prefixes are not worth a forward pass of their own."""

KEPT_PREFIXES = 2


def adapted(base: Base, adapter: Path | None) -> Any:
    """The model ready to generate, with an adapter or without; the base is not changed.

    On CPU the adapter is merged into copies of the weights it touches: many small matrix products cost more than memory
    there. On CUDA it stays beside them.

    Raises:
        PlatformError: the folder holds no adapter of this model.
    """
    if adapter is None:
        return base.model
    try:
        model = PeftModel.from_pretrained(base.tree(), str(adapter), is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PlatformError(f"'{adapter}' holds no adapter for model '{base.name}': {error}") from error
    if base.device.type == "cpu":
        # safe_merge computes a new tensor; merging in place would write into the base's weights.
        model = model.merge_and_unload(safe_merge=True)
    return model.eval()


class LocalChat:
    """A `ChatModel` over a loaded model. One thread at a time uses an instance."""

    def __init__(self, base: Base, model: Any, generation: Generation, batch_size: int = BATCH_SIZE) -> None:
        self._base = base
        self._model = model
        self._generation = generation
        self._batch_size = batch_size
        self._chat = ChatFormat(base.tokenizer)
        self._prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def complete(
        self, prompts: Sequence[ChatPrompt], on_done: Callable[[int], None] | None = None
    ) -> list[Completion | Unanswered]:
        """Answer every prompt, in order; see `ChatModel.complete`. A prompt that leaves no room is Unanswered."""
        answers: list[Completion | Unanswered | None] = [None] * len(prompts)
        ids: dict[int, tuple[int, ...]] = {}
        for i, prompt in enumerate(prompts):
            encoded = self._encode(prompt)
            if isinstance(encoded, Unanswered):
                answers[i] = encoded
            else:
                ids[i] = encoded
        prefix = self._prefix(list(ids.values()))
        done = len(prompts) - len(ids)
        for batch in length_batches(ids, self._batch_size, self._generation.max_tokens):
            for i, answer in zip(batch, self._answer([ids[i] for i in batch], prefix), strict=True):
                answers[i] = answer
            done += len(batch)
            if on_done:
                on_done(done)
        return [answer for answer in answers if answer is not None]

    def _encode(self, prompt: ChatPrompt) -> tuple[int, ...] | Unanswered:
        try:
            ids = tuple(self._chat.prompt_ids(prompt.messages, prompt.tools))
        except PlatformError as error:
            return Unanswered(reason=str(error))
        context, room = self._base.context, self._generation.max_tokens
        if len(ids) + room > context:
            return Unanswered(
                reason=f"the prompt has {len(ids)} tokens; with {room} for the answer that is more than the context "
                f"of {self._base.name} ({context} tokens)"
            )
        return ids

    def _prefix(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The prefix to reuse: what all prompts share, or a kept one that covers most of it. May be empty."""
        shared = common_prefix(prompts)
        for kept in self._prefixes:
            if shared[: len(kept)] == kept and (len(prompts) == 1 or 2 * len(kept) >= len(shared)):
                return kept
        return shared if len(prompts) > 1 and len(shared) >= MIN_PREFIX else ()

    def _cache(self, prefix: tuple[int, ...], rows: int) -> Any:
        """Keys and values of the prefix for a batch of `rows`, computed at most once while it is kept."""
        if prefix not in self._prefixes:
            cache = DynamicCache(config=self._model.config)
            ids = torch.tensor([prefix], device=self._base.device)
            with torch.inference_mode():
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._prefixes[prefix] = output.past_key_values
            while len(self._prefixes) > KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(prefix)
        with torch.inference_mode():
            repeated = copy.deepcopy(self._prefixes[prefix])
            repeated.batch_repeat_interleave(rows)
        return repeated

    def _answer(self, batch: Sequence[tuple[int, ...]], prefix: tuple[int, ...]) -> list[Completion]:
        started = time.perf_counter()
        generated = self._generate(batch, prefix)
        latency_s = time.perf_counter() - started
        return [
            self._completion(len(prompt), answer, latency_s) for prompt, answer in zip(batch, generated, strict=True)
        ]

    def _generate(self, batch: Sequence[tuple[int, ...]], prefix: tuple[int, ...]) -> list[list[int]]:
        """New token ids of each prompt, including the stop token where one was written."""
        pad, device = self._base.tokenizer.pad_token_id, self._base.device
        n, width = len(prefix), max(map(len, batch))
        # Padding goes between the shared prefix and the rest of a prompt, and is masked; positions follow the mask.
        ids = [[*prefix, *[pad] * (width - len(p)), *p[n:]] for p in batch]
        mask = [[1] * n + [0] * (width - len(p)) + [1] * (len(p) - n) for p in batch]
        stops = self._stops()
        sampling: dict[str, Any] = {"do_sample": False}
        if self._generation.temperature > 0:
            sampling = {"do_sample": True, "temperature": self._generation.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                past_key_values=self._cache(prefix, len(batch)) if prefix else None,
                max_new_tokens=self._generation.max_tokens,
                pad_token_id=pad,
                eos_token_id=stops,
                **sampling,
            )
        return [_until_stop(row, stops) for row in output[:, width:].tolist()]

    def _stops(self) -> list[int]:
        configured = self._base.model.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        known = (self._chat.end_of_turn, self._base.tokenizer.eos_token_id, *more)
        return sorted({i for i in known if i is not None})

    def _completion(self, prompt_tokens: int, generated: list[int], latency_s: float) -> Completion:
        parsed = parse(self._base.tokenizer.decode(generated, skip_special_tokens=True))
        stopped = bool(generated) and generated[-1] in self._stops()
        return Completion(
            text=parsed.text,
            tool_calls=parsed.tool_calls,
            finish_reason="length" if not stopped else "tool_calls" if parsed.tool_calls else "stop",
            latency_s=latency_s,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(generated),
        )


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens all prompts begin with, leaving each at least one token of its own."""
    if not prompts:
        return ()
    first, last = min(prompts), max(prompts)  # differ soonest of all pairs
    limit = min(map(len, prompts)) - 1
    return first[: next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))]


def length_batches(prompts: dict[int, tuple[int, ...]], rows: int, new_tokens: int) -> list[list[int]]:
    """Keys of the prompts, shortest prompts first, in batches of at most `rows` rows and BATCH_TOKENS tokens."""
    batches: list[list[int]] = []
    for i in sorted(prompts, key=lambda i: len(prompts[i])):
        size = (len(batches[-1]) + 1) * (len(prompts[i]) + new_tokens) if batches else 0
        if not batches or len(batches[-1]) == rows or size > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _until_stop(generated: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(generated) if token in stops), len(generated) - 1)
    return generated[: end + 1]
