"""Dataset folders: whole or not there, damage is found, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings

from flywheel_ray.builds import build
from flywheel_ray.datasets import Dataset, DatasetPolicy, Example, SplitCounts, diff, load, request_id, validate
from flywheel_ray.errors import DatasetError
from flywheel_ray.records import Completion, Record, to_json_line
from flywheel_ray.splits import SPLITS, SplitPolicy
from tests.test_builds import ALWAYS, EXACT, MANY, built, called, policy, record, some_records


def repaired(folder: Path) -> Path:
    """Give a folder's manifest the hashes of its files, as somebody would who changes rows by hand."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_folder_is_written_whole_and_kept(tmp_path: Path) -> None:
    dataset = built(MANY)
    folder = dataset.save(tmp_path / "new" / "datasets")
    assert folder == tmp_path / "new" / "datasets" / dataset.fingerprint
    names = ["eval.jsonl", "manifest.json", "tools.jsonl", "train.jsonl", "validation.jsonl"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert load(folder) == dataset
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert built(MANY[::-1]).save(folder.parent) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    folder.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere") == dataset


def test_rows_share_their_tools(tmp_path: Path) -> None:
    folder = built(MANY).save(tmp_path)
    (tools,) = (folder / "tools.jsonl").read_bytes().splitlines()
    assert json.loads(tools)["tools"] == list(built(MANY).train[0].tools)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_bytes().splitlines()]
    assert {row["tools"] for row in rows} == {json.loads(tools)["id"]}
    examples = load(folder).train
    assert all(e.tools[0]["function"] is examples[0].tools[0]["function"] for e in examples)


def test_a_damaged_folder_is_an_error(tmp_path: Path) -> None:
    dataset = built(MANY)
    folder = dataset.save(tmp_path)
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    train, manifest = folder / "train.jsonl", folder / "manifest.json"
    for path, data, message in [
        (train, whole[train][:-5], "train.jsonl is not the file that was written"),
        (train, whole[train].replace(b"question 1", b"question 2", 1), "train.jsonl is not the file"),
        (folder / "tools.jsonl", b"", "tools.jsonl is not the file"),
        (manifest, b"{}", "manifest.json is unreadable"),
        (manifest, b"\xff", "manifest.json is unreadable"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=f"dataset .* is damaged: {message}.* Delete the folder"):
            load(folder)
        with pytest.raises(DatasetError, match="damaged"):
            dataset.save(tmp_path)
        path.write_bytes(whole[path])
    assert load(folder) == dataset
    train.unlink()
    with pytest.raises(DatasetError, match=r"no dataset in .*No such file.*train\.jsonl"):
        load(folder)
    with pytest.raises(DatasetError, match="no dataset in"):
        load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot write dataset"):
        dataset.save(tmp_path / "file")


def test_an_older_version_is_named(tmp_path: Path) -> None:
    folder = built(MANY).save(tmp_path)
    (folder / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(DatasetError, match=r"written by flywheel-ray 0\.1\. Build it again"):
        load(folder)


def test_an_unreadable_row_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = built(MANY).save(tmp_path)
    (folder / "eval.jsonl").write_text('{"id": 1}\n')
    dataset = load(repaired(folder))
    assert len(dataset.train)
    with pytest.raises(DatasetError, match="has an unreadable row: "):
        _ = dataset.eval


def test_validation_finds_what_a_repaired_hash_hides(tmp_path: Path) -> None:
    original = built(MANY).save(tmp_path)
    validate(load(original))
    rows = {name: (original / f"{name}.jsonl").read_bytes().splitlines(True) for name in SPLITS}
    leaked = rows["train"][0]
    changed = {
        "leaks: it or its conversation is on the side": {"eval": [*rows["eval"][:-1], leaked]},
        "eval has .* rows, not as the manifest says": {"eval": rows["eval"][:-1]},
        "the id is not that of its request": {"train": [leaked.replace(b"question", b"matter"), *rows["train"][1:]]},
        "the conversation is not that of": {
            "train": [leaked.replace(b'"conversation":"', b'"conversation":"0'), *rows["train"][1:]]
        },
        "the fingerprint .* is not that of the rows": {
            "train": [r.replace(b'"queue":"a"', b'"queue":"b"') for r in rows["train"]]
        },
    }
    for message, files in changed.items():
        folder = shutil.copytree(original, tmp_path / "changed")
        for name, lines in files.items():
            (folder / f"{name}.jsonl").write_bytes(b"".join(lines))
        with pytest.raises(DatasetError, match=message):
            validate(load(repaired(folder)))
        shutil.rmtree(folder)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    dataset = built(MANY)

    def broken(names: object) -> object:
        yield "train", b"{}"
        raise OSError(28, "No space left on device")

    with pytest.raises(DatasetError, match=r"cannot write dataset .*: No space left on device"):
        Dataset(dataset.manifest, {}, broken).save(tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_do_not_crash(tmp_path: Path) -> None:
    dataset = built([*MANY, record("half \ud83d", message=called({"a": "\ud83d"}))])
    assert load(dataset.save(tmp_path)) == dataset
    validate(dataset)
    broken = Example(
        id="1",
        conversation="c",
        timestamp=0,
        messages=({"role": "user", "content": "\ud83d"},),
        reference=Completion(text="ok"),
    )
    assert b'"\\ud83d"' in to_json_line(broken.model_dump())
    assert len(request_id(broken)) == 32


def test_what_differs_between_two_datasets() -> None:
    old = built(MANY)
    new = built([record("question 0", at=0, message={"content": "another answer"}), *MANY[2:], record("a new one")])
    found = diff(old, new)
    changed = sum(
        getattr(found.answered_otherwise, s) + getattr(found.removed, s) + getattr(found.added, s) for s in SPLITS
    )
    assert changed == 3 and found.same.total == 58 and found.moved == () and found.settings == {}
    assert diff(old, old).same == old.manifest.rows
    other = diff(old, built(MANY, policy(salt="other", conflicts="latest")))
    assert other.settings == {"split.salt": ("flywheel-1", "other"), "conflicts": ("majority", "latest")}
    assert other.moved_rows > 5 and other.moved[0].old != other.moved[0].new


def test_the_manifest_says_which_tools_a_side_never_sees() -> None:
    rare = record("only once", message=called(name="rare"), request={"tools": [{"function": {"name": "rare"}}]})
    dataset = built([*MANY, rare], policy(validation_fraction=0))
    side = "evaluation" if dataset.manifest.tools["rare"].train else "training"
    assert dataset.manifest.uncovered == {"rare": side}


@settings(max_examples=30, deadline=None)
@given(some_records)
def test_a_dataset_survives_its_folder(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    dataset = built([*ALWAYS, *records])
    loaded = load(dataset.save(tmp_path_factory.mktemp("datasets")))
    for name in SPLITS:
        assert loaded.split(name) == dataset.split(name)
    assert loaded.fingerprint == dataset.fingerprint
    validate(loaded)


def test_a_dataset_may_be_empty_of_training_rows() -> None:
    everything = DatasetPolicy(split=SplitPolicy(eval_fraction=1, validation_fraction=0), near_duplicates=None)
    dataset = build(MANY, everything, client_id="acme", workload_id="support")
    assert dataset.train == () and dataset.manifest.rows == SplitCounts(eval=60)
    assert repr(dataset) == f"<Dataset {dataset.fingerprint} of acme/support: 0 train, 0 validation, 60 eval>"
    assert dataset != EXACT
