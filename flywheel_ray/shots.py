"""Shots are training examples shown to a model before the conversation, so that it answers in kind without training.

    shots = choose_shots(dataset.train, InContext(shots=3, max_shot_tokens=512))
    messages, tools = candidate.prompt(example.messages, example.tools, shots)

One set serves every prompt of a candidate, so that its prefix is computed once. They are spread over the tools, because
a model copies what it is shown: three shots of one tool teach it to call that tool.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from flywheel_ray.candidates import InContext
from flywheel_ray.datasets import NO_TOOL, Example
from flywheel_ray.errors import DatasetError
from flywheel_ray.values import canonical_json, content_hash

Shot = tuple[dict[str, Any], ...]
"""Chat messages of one example, ending with the assistant's reference answer."""


def estimate_tokens(text: str) -> int:
    """About how many tokens a text takes: its UTF-8 bytes over four, rounded up.

    No tokenizer is at hand before a model is chosen, and the same shots should go to all of them. English comes out
    near what common tokenizers count; scripts of three bytes a character at 0.75 tokens a character.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def shot_of(example: Example) -> Shot:
    """The example as a shot: its messages without instructions (every prompt has its own), then the reference."""
    asked = (dict(m) for m in example.messages if m.get("role") not in ("system", "developer"))
    return (*asked, example.reference.message())


def shot_tokens(shot: Sequence[Mapping[str, Any]]) -> int:
    """Estimated tokens of a shot: its messages as JSON, which stands for the chat template's own marks."""
    return sum(estimate_tokens(canonical_json(message)) for message in shot)


def choose_shots(train: Sequence[Example], adaptation: InContext) -> tuple[Shot, ...]:
    """The in-context examples of a candidate: the same ones for the same training rows, whatever their order.

    Tools (the first one called, or none) take turns, the most frequent first. Within one tool answers differ as far as
    they can, and examples come from the shorter half before the longer one, in an order drawn by `adaptation.seed`.
    Examples that no longer fit into `max_shot_tokens` are passed over, so fewer may come back than asked for.

    Args:
        train: the training split.
        adaptation: how many shots, within how many estimated tokens all together, by which seed.

    Raises:
        DatasetError: no training example fits at all.
    """
    classes: dict[str, list[tuple[int, Example]]] = defaultdict(list)
    for example in train:
        shot = shot_of(example)
        if len(shot) > 1:
            calls = example.reference.tool_calls
            classes[calls[0].name if calls else NO_TOOL].append((shot_tokens(shot), example))
    turns = sorted(classes, key=lambda name: (-len(classes[name]), name))
    queues = {name: _order(classes[name], adaptation.seed) for name in turns}

    budget = adaptation.max_shot_tokens
    chosen: list[Shot] = []
    while turns and len(chosen) < adaptation.shots:
        for name in list(turns):
            # The budget only shrinks, so what does not fit now never will.
            queues[name] = [(tokens, example) for tokens, example in queues[name] if tokens <= budget]
            if not queues[name]:
                turns.remove(name)
            elif len(chosen) < adaptation.shots:
                tokens, example = queues[name].pop(0)
                budget -= tokens
                chosen.append(shot_of(example))
    if not chosen:
        shortest = min((tokens for queue in classes.values() for tokens, _ in queue), default=None)
        if shortest is None:
            raise DatasetError("in-context examples need training records; there are none. Widen `since`.")
        raise DatasetError(
            f"no training example fits into max_shot_tokens={adaptation.max_shot_tokens}: "
            f"the shortest takes about {shortest}. Raise max_shot_tokens."
        )
    return tuple(chosen)


def _order(examples: list[tuple[int, Example]], seed: int) -> list[tuple[int, Example]]:
    middle = sorted(tokens for tokens, _ in examples)[(len(examples) - 1) // 2]
    drawn = sorted(examples, key=lambda item: (item[0] > middle, content_hash([seed, item[1].id])))
    seen: Counter[str] = Counter()
    ranked = []
    for tokens, example in drawn:
        answer = canonical_json(example.reference.message())
        # First every answer once, then every answer twice: a stable sort keeps the drawn order among equals.
        ranked.append((tokens > middle, seen[answer], tokens, example))
        seen[answer] += 1
    return [(tokens, example) for _, _, tokens, example in sorted(ranked, key=lambda item: item[:2])]
