"""The ledger keeps what trials found: one folder for each dataset fingerprint, one for each candidate key inside it.

    ledger = Ledger("runs/ledger")                    # or "s3://bucket/ledger": any file system pyarrow reads
    ledger.put(result, wall_s=312.0)                  # runs/ledger/<fingerprint>/<key>/{result.json,lineage.json}
    ledger.results(fingerprint)                       # [Scored(…), Failed(…), …]

Files are written whole or not at all, so a killed sweep leaves finished trials and nothing else. A `Scored` result is
final; a `Failed` one is kept for reading and run again next time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from pydantic import TypeAdapter, ValidationError

from flywheel_ray.calibration import CalibrationReport
from flywheel_ray.datasets import Example
from flywheel_ray.errors import LedgerError
from flywheel_ray.leaderboard import Leaderboard, LeaderboardSettings, leaderboard
from flywheel_ray.results import TRIAL_RESULT, Failed, Price, Scored
from flywheel_ray.stats import ScoreMean
from flywheel_ray.values import canonical_json

_PRICES: TypeAdapter[dict[str, Price]] = TypeAdapter(dict[str, Price])


class Ledger:
    """Results by fingerprint and key on a disk or an object store.

    Args:
        url: a local path, or a URI such as s3://bucket/prefix or gs://bucket/prefix.

    Raises:
        LedgerError: the URL names no file system that can be used.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            if "://" in self.url:
                self._fs, self._root = pafs.FileSystem.from_uri(self.url)
            else:
                self._fs, self._root = pafs.LocalFileSystem(), str(Path(self.url).absolute())
        except Exception as error:
            raise LedgerError(f"ledger {self.url!r} cannot be opened: {error}") from None

    def put(self, result: Scored | Failed, wall_s: float | None = None, lineage: dict[str, Any] | None = None) -> None:
        """Keep a result under its fingerprint and key, replacing an earlier one.

        Args:
            result: what the trial ended as.
            wall_s: wall time of the trial in seconds.
            lineage: what else made the result (code version, configuration), kept beside it.
        """
        folder = f"{result.fingerprint}/{result.key}"
        if lineage is not None or wall_s is not None:
            self._write(f"{folder}/lineage.json", canonical_json({"wall_s": wall_s, **(lineage or {})}))
        # Last, because its presence is what says that the trial is finished.
        self._write(f"{folder}/result.json", canonical_json(result.model_dump(mode="json")))

    def get(self, fingerprint: str, key: str) -> Scored | Failed | None:
        """The result of one trial, or None where there is none."""
        text = self._read(f"{fingerprint}/{key}/result.json")
        return None if text is None else self._parse(text, f"{fingerprint}/{key}/result.json")

    def results(self, fingerprint: str) -> list[Scored | Failed]:
        """Every result on that dataset, by key."""
        keys = self._folders(fingerprint)
        found = (self.get(fingerprint, key) for key in keys)
        return [result for result in found if result is not None]

    def lineage(self, fingerprint: str, key: str) -> dict[str, Any]:
        """What was kept beside a result; empty where nothing was."""
        text = self._read(f"{fingerprint}/{key}/lineage.json")
        return {} if text is None else json.loads(text)

    def fingerprints(self) -> list[str]:
        """Every dataset that has a result, the one written to last at the end."""
        folders = self._folders("")
        newest = {
            name: max((self._modified(f"{name}/{key}/result.json") for key in self._folders(name)), default=0.0)
            for name in folders
        }
        return sorted((name for name in folders if newest[name] > 0), key=lambda name: newest[name])

    def latest(self) -> str:
        """The fingerprint of the dataset whose results were written last. Raises LedgerError where there is none."""
        if known := self.fingerprints():
            return known[-1]
        raise LedgerError(f"ledger {self.url} has no results; run `flywheel sweep configs/sweeps/….yaml` first")

    def board(self, fingerprint: str, evaluation: Sequence[Example] = (), every: bool = False) -> Leaderboard:
        """The leaderboard of the latest sweep on a dataset, ranked and priced as that sweep's configuration says.

        Args:
            fingerprint: of the dataset.
            evaluation: its evaluation split, for the teacher's latency, tokens and cost.
            every: also rank trials of earlier sweeps, which may have answered other examples.

        Raises:
            LedgerError: there is no result on this dataset.
        """
        sweep = self.sweep(fingerprint) or {}
        config = sweep.get("config", {})
        results = self.results(fingerprint) if every else self.swept(fingerprint)
        if not results:
            known = ", ".join(self.fingerprints()) or "none"
            raise LedgerError(f"ledger {self.url} has no results on dataset {fingerprint}; it has results on: {known}")
        how = LeaderboardSettings.model_validate(config.get("leaderboard", {}))
        return leaderboard(
            results,
            evaluation[: config.get("max_eval_records")],
            metric=how.metric,
            prices=_PRICES.validate_python(config.get("prices", {})),
            margin=how.margin,
            confidence=how.confidence,
            corrected=self._corrected(fingerprint),
            trust_judge=how.trust_judge,
        )

    def swept(self, fingerprint: str) -> list[Scored | Failed]:
        """The results of the latest sweep on a dataset; all results where no sweep is kept."""
        keys = (self.sweep(fingerprint) or {}).get("keys")
        return [r for r in self.results(fingerprint) if keys is None or r.key in keys]

    def best(self, client_id: str, workload_id: str) -> Scored:
        """The trial that a workload's latest sweep would put before traffic: its winner, or without one its first.

        Raises:
            LedgerError: no sweep of that workload has a scored trial.
        """
        workload = {"client_id": client_id, "workload_id": workload_id}
        for fingerprint in reversed(self.fingerprints()):
            if (self.sweep(fingerprint) or {}).get("config", {}).get("workload") == workload:
                board = self.board(fingerprint)
                if board.rows:
                    return self.find(board.winner or board.rows[0].key)
        raise LedgerError(
            f"ledger {self.url} has no scored trial of client {client_id!r}, workload {workload_id!r}; "
            "run `flywheel sweep` for it first"
        )

    def find(self, prefix: str) -> Scored:
        """The one scored trial whose key starts with `prefix`, on any dataset.

        Raises:
            LedgerError: none or several match, or the trial failed.
        """
        hits = [(f, k) for f in self.fingerprints() for k in self._folders(f) if k.startswith(prefix)]
        if len(hits) != 1:
            what = "no trial" if not hits else f"{len(hits)} trials"
            raise LedgerError(
                f"ledger {self.url} has {what} with a key starting {prefix!r}; `flywheel leaderboard` lists them"
            )
        result = self.get(*hits[0])
        if not isinstance(result, Scored):
            raise LedgerError(f"trial {hits[0][1]} in ledger {self.url} failed; it has nothing to serve")
        return result

    def put_sweep(self, fingerprint: str, sweep: dict[str, Any]) -> None:
        """Keep the resolved configuration of the latest sweep on a dataset and the keys of its trials."""
        self._write(f"{fingerprint}/sweep.json", canonical_json(sweep))

    def sweep(self, fingerprint: str) -> dict[str, Any] | None:
        """What `put_sweep` kept last, or None."""
        text = self._read(f"{fingerprint}/sweep.json")
        return None if text is None else json.loads(text)

    def put_calibration(self, found: CalibrationReport) -> None:
        """Keep what labels say of the judges on a dataset, replacing what was known before."""
        self._write(f"{found.fingerprint}/calibration.json", found.model_dump_json(indent=2) + "\n")

    def calibration(self, fingerprint: str) -> CalibrationReport | None:
        """What `put_calibration` kept last, or None.

        Raises:
            LedgerError: it is damaged, or of another version.
        """
        text = self._read(f"{fingerprint}/calibration.json")
        try:
            return None if text is None else CalibrationReport.model_validate_json(text)
        except ValidationError:
            raise LedgerError(
                f"ledger {self.url}: {fingerprint}/calibration.json is damaged; run `flywheel judge calibrate` again"
            ) from None

    def _corrected(self, fingerprint: str) -> dict[str, dict[str, ScoreMean]]:
        """Judged metric → trial key → the quality that people's labels correct the judge's to."""
        known = self.calibration(fingerprint)
        found: dict[str, dict[str, ScoreMean]] = {}
        for estimate in known.estimates if known else ():
            if estimate.source == "human" and estimate.calibrated is not None:
                found.setdefault(estimate.metric, {})[estimate.key] = estimate.calibrated
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _write(self, name: str, text: str) -> None:
        path = self._path(name)
        temporary = f"{path}.partial"
        try:
            self._fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
            with self._fs.open_output_stream(temporary) as out:
                out.write(text.encode("utf-8", "surrogatepass"))
            self._fs.move(temporary, path)
        except OSError as error:
            raise LedgerError(f"ledger {self.url}: cannot write {name}: {error}") from None

    def _read(self, name: str) -> str | None:
        path = self._path(name)
        try:
            if self._fs.get_file_info(path).type != pafs.FileType.File:
                return None
            with self._fs.open_input_stream(path) as source:
                return source.read().decode("utf-8", "surrogatepass")
        except OSError as error:
            raise LedgerError(f"ledger {self.url}: cannot read {name}: {error}") from None

    def _parse(self, text: str, name: str) -> Scored | Failed:
        try:
            return TRIAL_RESULT.validate_json(text)
        except ValidationError as error:
            raise LedgerError(
                f"ledger {self.url}: {name} is damaged ({error.error_count()} errors); delete its folder to rerun it"
            ) from None

    def _folders(self, name: str) -> list[str]:
        selector = pafs.FileSelector(self._path(name), allow_not_found=True)
        return sorted(i.base_name for i in self._fs.get_file_info(selector) if i.type == pafs.FileType.Directory)

    def _modified(self, name: str) -> float:
        info = self._fs.get_file_info(self._path(name))
        return info.mtime_ns / 1e9 if info.type == pafs.FileType.File and info.mtime_ns else 0.0
