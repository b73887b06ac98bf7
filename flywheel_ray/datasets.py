"""A dataset is a workload's teacher-served records, deduplicated and split once and for all by conversation.

    dataset = build(records, source, SplitPolicy(eval_fraction=0.2, validation_fraction=0.1))
    dataset.fingerprint        # "3f9a0c2d41b7e655": names the folder; two leaderboards compare only on the same one
    folder = dataset.save(out) # out/3f9a…/{train,validation,eval}.jsonl, manifest.json
    load(folder) == dataset

The side of a record is a threshold on a hash of its conversation: adding logs never moves a record, the turns of one
conversation stay together, and so do duplicates. The evaluation set only ever grows.
"""

from __future__ import annotations

from typing import Any

from flywheel_ray.records import Completion
from flywheel_ray.values import Value


class Example(Value):
    """One row of a dataset: what was asked, and the teacher's answer as the reference.

    `id` is the record's request hash; `conversation` groups rows that are not independent.
    """

    id: str
    conversation: str
    timestamp: float
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    reference: Completion
