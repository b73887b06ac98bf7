"""`flywheel judge calibrate` and `flywheel label` as a person types them, with answers on standard input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flywheel_ray.cli import app
from flywheel_ray.datasets import Dataset
from flywheel_ray.errors import FlywheelError
from flywheel_ray.judge import Order, Verdict
from flywheel_ray.labels import Label, append, read, sample_order
from flywheel_ray.ledger import Ledger
from flywheel_ray.results import Outcome, Scored
from flywheel_ray.scoring import SIMILARITY, TOOL_CALLING_CORRECTNESS
from tests.test_cli import flywheel, refused
from tests.values import dataset, scored

KEY, OTHER = "abc1234500000000", "def6789000000000"


@pytest.fixture(scope="module")
def examples() -> Dataset:
    return dataset(200)


def judged(examples: Dataset, key: str = KEY, right: float = 0.7) -> Scored:
    """A trial whose judge accepts every second wrong answer."""
    trial = scored(examples, key=key, right=right)
    outcomes = [
        o.model_copy(update={"scores": o.scores | {TOOL_CALLING_CORRECTNESS: 1.0}}) if i % 2 else o
        for i, o in enumerate(trial.outcomes)
    ]
    return trial.model_copy(update={"outcomes": tuple(outcomes), "judge": "llama (LLM)"})


def keep(runs: Path, examples: Dataset, *trials: Scored) -> None:
    examples.save(runs / "datasets")
    for trial in trials:
        Ledger(runs / "ledger").put(trial)


def run(runs: Path, *arguments: str, said: str = "") -> Result:
    return CliRunner(env={"FLYWHEEL_RUNS": str(runs)}).invoke(app, list(arguments), input=said)


def refusal(done: Result) -> str:
    assert isinstance(done.exception, FlywheelError), done.output
    return str(done.exception)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_given_skipped_corrected_and_resumed(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, judged(examples))
    path = tmp_path / "labels" / f"{examples.fingerprint}.jsonl"
    first = run(tmp_path, "label", "--n", "6", "--labeler", "ana", said="m odd tone\n1\nmaybe\n0\nback\n1\ns\nq\n")
    assert first.exit_code == 0, first.output
    assert "'maybe' is no answer" in first.output
    assert "2 of 6 rows labelled by ana (1 skipped), 4 remain" in first.output
    order = sample_order(examples.fingerprint, [e.id for e in examples.eval])
    sample, *given = rows(path)
    assert (sample["dataset"], sample["seed"]) == (examples.fingerprint, 0)
    assert sample["population"] == len(examples.eval)
    assert [(g["example_id"], g.get("value")) for g in given] == [
        (order[0], 1.0),
        (order[1], 0.0),
        (order[1], 1.0),
        (order[2], None),
    ]
    assert given[0]["note"] == "odd tone" and "note" not in given[1]
    second = run(tmp_path, "label", "abc", "--n", "6", "--labeler", "ana", said="0\n0\n0\n0\n")
    assert "2 of 6 labelled, 4 remain" in second.output and "flywheel judge calibrate" in second.output
    # Six labels are wanted: another row is drawn for the one that was skipped.
    assert read(path).of(judged(examples), TOOL_CALLING_CORRECTNESS) == {
        order[0]: 1.0, order[1]: 1.0, order[3]: 0.0, order[4]: 0.0, order[5]: 0.0, order[6]: 0.0,
    }  # fmt: skip
    again = run(tmp_path, "label", "abc", "--n", "6", "--labeler", "ana", said="1\n")
    assert "6 of 6 rows labelled by ana (1 skipped), 0 remain" in again.output and len(rows(path)) == 9
    another = run(tmp_path, "label", f"{examples.fingerprint[:6]}/abc", "--n", "6", "--labeler", "ben", said="1\n")
    assert "1 of 6 rows labelled by ben, 5 remain" in another.output  # the end of input is as good as q
    assert len(rows(path)) == 10
    assert "--seed 0" in refusal(run(tmp_path, "label", "--seed", "1"))


def test_a_row_shows_both_answers_and_not_the_verdict(tmp_path: Path, examples: Dataset) -> None:
    trial = judged(examples)
    completion = trial.outcomes[0].completion
    assert completion is not None
    nasty = completion.model_copy(update={"text": "\x1b[31mred [bold]x[/bold]" + "long " * 1000, "tool_calls": ()})
    outcomes = tuple(o.model_copy(update={"completion": nasty}) for o in trial.outcomes)
    keep(tmp_path, examples, trial.model_copy(update={"outcomes": outcomes}))
    shown = run(tmp_path, "label", "--n", "1", said="f\nq\n").output
    assert "A: teacher" in shown and "B: candidate" in shown and '"queue":' in shown and "tools: route" in shown
    assert "\x1b" not in shown and "red [bold]x[/bold]" in shown
    assert len(re.findall("characters left out", shown)) == 1  # and not when asked for in full
    assert "the judge says" not in shown
    open_ = run(tmp_path, "label", "--n", "1", "--blind", "--show-verdict", said="q\n").output
    assert "the judge says" in open_ and "teacher" not in open_ and "candidate" not in open_


def _with(trial: Scored, metric: str, orders: tuple[Order, ...] = ()) -> Scored:
    def one(o: Outcome) -> Outcome:
        verdicts = tuple(
            Verdict(metric=metric, value=0.5, order=v, reference_chars=1, candidate_chars=1) for v in orders
        )
        return o.model_copy(update={"scores": {metric: 0.5}, "verdicts": verdicts})

    return trial.model_copy(update={"outcomes": tuple(one(o) for o in trial.outcomes)})


def test_ratings_and_preferences_become_values(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, _with(judged(examples), SIMILARITY), _with(judged(examples, OTHER), "preference"))
    path = tmp_path / "labels.jsonl"
    run(tmp_path, "label", "abc", "--n", "2", "--labels", str(path), said="11\n0\n10\n3\n")
    assert [r["value"] for r in rows(path)[1:]] == [1.0, 0.3]
    # Blind, the candidate is A in about half of the rows: "a" is then a preference for it.
    run(tmp_path, "label", "def", "--n", "30", "--blind", "--labels", str(path), said="a\n" * 29 + "t\n")
    values = [r["value"] for r in rows(path) if r["trial"] == OTHER and "value" in r]
    assert values[-1] == 0.5 and 5 < sum(values[:-1]) < 24
    run(tmp_path, "label", "def", "--n", "2", "--labeler", "open", "--labels", str(path), said="a\nb\n")
    assert [r["value"] for r in rows(path)[-2:]] == [0.0, 1.0]


def test_a_judge_is_calibrated_by_program_and_by_hand(tmp_path: Path, examples: Dataset) -> None:
    trials = judged(examples), judged(examples, OTHER, right=0.4)
    keep(tmp_path, examples, *trials)
    by_program = run(tmp_path, "judge", "calibrate")
    assert by_program.exit_code == 0, by_program.output
    for words in ("llama (LLM)", "Cohen's κ", "program", "not asked in both orders", "do not rank candidates"):
        assert words in by_program.output
    assert "the leaderboard takes people's only" in by_program.output and "flywheel label" not in by_program.output
    right = dict.fromkeys((o.example_id for o in trials[1].outcomes[: round(len(examples.eval) * 0.4)]), "1")
    order = sample_order(examples.fingerprint, [e.id for e in examples.eval])
    said = "".join(right.get(id, "0") + "\n" for id in order[:30])
    run(tmp_path, "label", "def", "--n", "30", "--labeler", "ana", said=said)
    found = run(tmp_path, "judge", "calibrate", "--json")
    data = json.loads(found.stdout)
    [mine] = [e for e in data["estimates"] if e["source"] == "human" and e["key"] == OTHER]
    assert mine["labels"] == 30
    calibrated = mine["calibrated_interval"]
    assert calibrated["low"] <= 0.4 <= calibrated["high"] < mine["raw"]["low"] + 0.2
    assert calibrated["high"] - calibrated["low"] < mine["gold"]["high"] - mine["gold"]["low"]
    ledger = Ledger(tmp_path / "ledger")
    kept = ledger.calibration(examples.fingerprint)
    assert kept is not None
    for estimate in data["estimates"]:
        del estimate["calibrated_interval"]
    assert kept.model_dump(mode="json") == {k: data[k] for k in kept.model_dump()}
    # The leaderboard ranks the judge's metric by what the labels correct it to.
    ledger.put_sweep(examples.fingerprint, {"config": {"leaderboard": {"metric": mine["metric"]}}})
    [row] = [r for r in ledger.board(examples.fingerprint).rows if r.calibrated]
    assert row.key == OTHER and row.quality and row.quality.estimate == mine["calibrated"]["estimate"]
    shown = run(tmp_path, "judge", "calibrate", "--dataset", examples.fingerprint[:6]).output
    assert "10 labels missing" in shown  # the trial nobody labelled


def test_what_threatens_the_estimate_is_said(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, judged(examples))
    path = tmp_path / "labels.jsonl"
    for who, values in (("ana", (1, 0, 1, 0)), ("ben", (1, 0, 1, 1))):
        for example, value in zip(examples.eval, values, strict=False):
            append(path, Label(
                trial=KEY, example_id=example.id, metric=TOOL_CALLING_CORRECTNESS, value=value, labeler=who
            ))  # fmt: skip
    calibrate = ("judge", "calibrate", "--labels", str(path))
    shown = run(tmp_path, *calibrate).output
    assert "nothing says how the labelled rows were chosen" in shown
    assert "ana and ben agree with κ 0.500" in shown
    assert re.search(r"Label 46 more rows: flywheel label abc12345 --n 50", shown)
    assert "By people's labels: 4 labels are too few" in shown
    run(tmp_path, "label", "--n", "5", "--labels", str(path), "--labeler", "cleo", said="s\ns\n1\n")
    assert "were skipped or left out" in run(tmp_path, *calibrate).output


def test_the_advised_command_works_after_skips_and_ends_with_the_rows(tmp_path: Path, examples: Dataset) -> None:
    rest = len(examples.eval)
    keep(tmp_path, examples, judged(examples))
    path = tmp_path / "labels.jsonl"

    def advised() -> list[str]:
        shown = run(tmp_path, "judge", "calibrate", "--labels", str(path)).output
        found = re.search(r"Label (\d+) more rows: flywheel (label \w+ --n \d+)", shown)
        return [found[1], *found[2].split()] if found else []

    label = ("--labels", str(path), "--labeler", "ana")
    run(tmp_path, "label", "--n", "8", *label, said="s\n" * (rest - 20) + "1\n" * 8)
    more, *command = advised()
    assert (more, command[-1]) == ("12", "20")  # of 50 that are wanted: the trial has no more
    done = run(tmp_path, *command, *label, said="1\n" * 100)
    assert f"20 of 20 rows labelled by ana ({rest - 20} skipped), 0 remain" in done.output
    assert advised() == []
    over = run(tmp_path, "label", "--n", "50", *label, said="1\n")
    assert f"20 of 50 rows labelled by ana ({rest - 20} skipped), and the trial has no more rows" in over.output


def test_labels_survive_another_judge(tmp_path: Path, examples: Dataset) -> None:
    first = judged(examples)
    keep(tmp_path, examples, first)
    run(tmp_path, "label", "--n", "12", "--labeler", "ana", said="1\n0\n" * 6)
    again = first.model_copy(update={"key": OTHER, "judge": "another (LLM)"})
    different = judged(examples, "fed9876000000000", right=0.1).model_copy(update={"judge": again.judge})
    keep(tmp_path, examples, again, different)
    Ledger(tmp_path / "ledger").put_sweep(examples.fingerprint, {"keys": [OTHER, different.key]})
    shown = run(tmp_path, "judge", "calibrate", "--json")
    found = {e["key"]: e for e in json.loads(shown.stdout)["estimates"] if e["source"] == "human"}
    assert found[OTHER]["labels"] == 12 and found[OTHER]["calibrated"]
    assert found[different.key]["labels"] == 0 and not found[different.key]["calibrated"]
    waits = run(tmp_path, "judge", "calibrate").output
    assert "were answered otherwise here" in waits and "flywheel label fed98760 --n 12" in waits
    done = run(tmp_path, "label", "def", "--n", "12", "--labeler", "ana", said="")
    assert "12 of 12 rows labelled by ana" in done.output
    # The rows where the answers differ are asked for first, and then the others count.
    run(tmp_path, "label", "fed", "--n", "12", "--labeler", "ana", said="0\n" * 12)
    path = tmp_path / "labels" / f"{examples.fingerprint}.jsonl"
    order = sample_order(examples.fingerprint, [e.id for e in examples.eval])
    assert set(read(path).of(different, TOOL_CALLING_CORRECTNESS)) == set(order[:12])
    assert sum(r["trial"] == different.key and r["type"] == "label" for r in rows(path)) < 12


def test_notes_help_case_and_the_last_row(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, judged(examples))
    path = tmp_path / "labels.jsonl"
    label = ("label", "--labels", str(path), "--labeler", "ana")
    shown = run(tmp_path, *label, "--n", "2", said="1\nM mine\nBACK\n0\n?\n1\nB\n0\nx\n\n").output
    assert "the note is dropped" in shown and "skip: you saw the row" in shown and "'x' is no answer" in shown
    assert "2 of 2 rows labelled by ana, 0 remain. Enter to finish, b to go back" in shown
    order = sample_order(examples.fingerprint, [e.id for e in examples.eval])
    assert [(r["example_id"], r["value"], r.get("note")) for r in rows(path)[1:]] == [
        (order[0], 1.0, None),
        (order[0], 0.0, None),
        (order[1], 1.0, None),
        (order[1], 0.0, None),
    ]
    lost = run(tmp_path, *label, "--n", "3", said="m Too Long\nQ\n").output
    assert "the note is dropped: no answer followed" in lost
    # From the end one may go further back than the last row, and see it in full.
    run(tmp_path, *label, "--n", "3", said="1\nb\nF\nback\n1\nq\n")
    assert [(r["example_id"], r["value"]) for r in rows(path)[-2:]] == [(order[2], 1.0), (order[1], 1.0)]


@pytest.mark.slow
def test_an_interrupt_ends_a_sitting_as_the_end_of_input_does(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, judged(examples))
    command = [
        sys.executable,
        "-m",
        "flywheel_ray.cli",
        "label",
        "--n",
        "5",
        "--labeler",
        "ana",
        "--runs",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sitting:
        assert sitting.stdin and sitting.stdout
        sitting.stdin.write("1\nm why\n")
        sitting.stdin.flush()
        while "noted" not in sitting.stdout.readline():
            assert sitting.poll() is None
        sitting.send_signal(signal.SIGINT)
        said = sitting.stdout.read()
        assert sitting.wait(timeout=30) == 0
    assert "the note is dropped" in said and "1 of 5 rows labelled by ana, 4 remain" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes another user's number")
def test_a_user_without_a_name_is_asked_for_one() -> None:
    code = (
        "import os; from flywheel_ray.cli_judge import _user; from flywheel_ray.errors import ConfigError\n"
        "os.setuid(54321)\ntry: _user()\nexcept ConfigError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "--labeler NAME" in done.stdout, done.stderr


def test_a_row_changes_between_skipped_and_labelled(tmp_path: Path, examples: Dataset) -> None:
    keep(tmp_path, examples, judged(examples))
    label = ("label", "--labeler", "ana", "--n", "2")
    both = run(tmp_path, *label, said="s\nback\n1\n0\n").output
    assert "2 of 2 rows labelled by ana, 0 remain; labels" in both
    fewer = run(tmp_path, *label, "--labeler", "ben", said="1\nBack\nS\n0\nq\n").output
    assert "1 of 2 rows labelled by ben (1 skipped), 1 remain; labels" in fewer
    assert "1 of 2 rows labelled by ben (1 skipped), 1 remain" in run(tmp_path, *label, "--labeler", "ben").output


def test_several_judged_metrics_are_told_apart(tmp_path: Path, examples: Dataset) -> None:
    trial = judged(examples)
    mixed = tuple(
        o.model_copy(update={"scores": {SIMILARITY: 0.5}}) if i % 2 else o for i, o in enumerate(trial.outcomes)
    )
    keep(tmp_path, examples, trial.model_copy(update={"outcomes": mixed}))
    path = tmp_path / "labels.jsonl"
    label = ("label", "--labels", str(path), "--labeler", "ana", "--metric", SIMILARITY)
    run(tmp_path, *label, "--n", "3", said="3\n4\n5\n")
    shown = run(tmp_path, "judge", "calibrate", "--labels", str(path)).output
    found = re.search(rf"flywheel (label \w+ --n (\d+) --metric {SIMILARITY})", shown)
    assert found and int(found[2]) == min(50, len(mixed) // 2)
    assert "3 of 3 rows" in run(tmp_path, *label, "--n", "3").output
    append(path, Label(trial=KEY, example_id="elsewhere", metric=SIMILARITY, value=1, labeler="ana"))
    assert "3 of 4 rows" in run(tmp_path, *label, "--n", "4").output


def test_what_was_not_answered_is_wrong(tmp_path: Path, examples: Dataset) -> None:
    trial = judged(examples, right=1.0)
    half = tuple(o.model_copy(update={"completion": None}) if i % 2 else o for i, o in enumerate(trial.outcomes))
    keep(tmp_path, examples, trial.model_copy(update={"outcomes": half}))
    run(tmp_path, "label", "--n", "20", "--labeler", "ana", said="1\n" * 20)
    shown = run(tmp_path, "judge", "calibrate").output
    assert "where no answer counts as 0" in shown
    data = json.loads(run(tmp_path, "judge", "calibrate", "--json").stdout)
    [mine] = [e for e in data["estimates"] if e["source"] == "human"]
    assert mine["gold"]["estimate"] == 1 and mine["calibrated"]["estimate"] == pytest.approx(mine["answered"])
    assert 0.4 < mine["answered"] < 0.6


def test_mistakes_have_a_remedy(tmp_path: Path, examples: Dataset) -> None:
    assert "flywheel sweep" in refusal(run(tmp_path, "judge", "calibrate"))
    unjudged = scored(examples)
    bare = tuple(o.model_copy(update={"scores": {"function_name_accuracy": 1.0}}) for o in unjudged.outcomes)
    keep(tmp_path, examples, unjudged.model_copy(update={"outcomes": bare, "key": KEY}))
    assert "name a judge" in refusal(run(tmp_path, "judge", "calibrate"))
    assert "its judged metrics: none" in refusal(run(tmp_path, "label"))
    keep(tmp_path, examples, judged(examples), judged(examples, OTHER))
    assert "name one trial" in refusal(run(tmp_path, "label")) and OTHER[:8] in refusal(run(tmp_path, "label"))
    assert "no trial" in refusal(run(tmp_path, "label", "zzz"))
    assert "no such label file" in refusal(run(tmp_path, "judge", "calibrate", "--labels", "absent.jsonl"))
    assert examples.fingerprint in refusal(run(tmp_path, "judge", "calibrate", "--dataset", "zz"))
    path = tmp_path / "labels.jsonl"
    append(path, Label(trial="elsewhere", example_id="e", metric=SIMILARITY, value=1, labeler="ana"))
    strange = refusal(run(tmp_path, "judge", "calibrate", "--labels", str(path)))
    assert "none of the 1 labels" in strange and "whole key" in strange
    path.write_text('{"trial": "t"}\n')
    assert "line 1, example_id" in refusal(run(tmp_path, "judge", "calibrate", "--labels", str(path)))


@pytest.mark.slow
def test_the_commands_are_there(tmp_path: Path) -> None:
    refused(flywheel(tmp_path, "judge", "calibrate"), "has no results")
    for arguments in (("label",), ("judge",), ("judge", "calibrate")):
        assert "Usage:" in flywheel(tmp_path, *arguments, "--help").stdout
