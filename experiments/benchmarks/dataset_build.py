"""Dataset builds: records per CPU-second and peak memory, beside what people write with pandas and scikit-learn.

    python -m experiments.benchmarks.dataset_build --records 25000 1000000 --ray --profile

The records are the sample support traffic, tool-calling with ten tools, about 4 kB a line. Every job runs in a process
of its own, so its memory is its own; its time begins after its imports. Builds run --repeat times and the fastest
counts, as a shared machine's speed varies; the cost of `json.loads` alone on the same lines says how fast it was. The
baseline keys on the last user text and splits at random. Exits with 1 where a build is slower or larger than asked, or
Ray's files are not the same.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import pstats
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from experiments.sample_traffic import CLIENT_ID, SUPPORT, generate

_SHOP_RECORDS = 100_000
_USER = b'"role": "user", "content": "'
_BATCH = 10_000
_PROFILED_RECORDS = 25_000
_PROFILED_ROWS = 15


# ── the traffic ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write_traffic(path: Path, records: int, seed: int = 0) -> None:
    """Write log lines: 100,000 of the sample traffic, and the same customers again in as many other shops as needed.

    A shop's name begins the first message of each conversation, so that no two shops share a request. About one record
    in ten repeats a request, three in ten are later steps of a conversation, half of them of an agent loop.
    """
    with path.open("wb") as file:
        for hit in generate(min(records, _SHOP_RECORDS), seed, "support"):
            file.write(json.dumps(hit, ensure_ascii=False).encode() + b"\n")
    with path.open("ab") as file:
        for begin in range(_SHOP_RECORDS, records, _SHOP_RECORDS):
            named = _USER + b"[shop %d] " % (begin // _SHOP_RECORDS)
            with path.open("rb") as first:
                lines = islice(first, min(_SHOP_RECORDS, records - begin))
                file.writelines(line.replace(_USER, named, 1) for line in lines)


# ── jobs: each runs in its own process ──────────────────────────────────────────────────────────────────────────────


class Work(NamedTuple):
    """Files of one size: the log lines, as many of them as count, the same in a store, and where results go."""

    lines: Path
    records: int
    store: Path
    out: Path

    def read(self) -> Iterator[bytes]:
        """The log lines that count."""
        with self.lines.open("rb", buffering=1 << 20) as file:
            yield from islice(file, self.records)


def _builder(work: Work, near: bool) -> Callable[[], Path]:
    import numpy.ma  # noqa: F401 - as numpy.unique does, the first time

    from flywheel_ray.builds import build
    from flywheel_ray.datasets import DatasetPolicy
    from flywheel_ray.spill import DiskRows, scratch

    policy = DatasetPolicy() if near else DatasetPolicy(near_duplicates=None)

    def run() -> Path:
        with scratch(work.out) as folder:
            rows = DiskRows(folder / "part-0")
            dataset = build(work.read(), policy, client_id=CLIENT_ID, workload_id=SUPPORT, rows=rows)
            return dataset.save(work.out)

    return run


def build_job(work: Work, near: bool) -> dict[str, Any]:
    """Ours: validate, deduplicate, split and write; rows wait on disk, as in `flywheel dataset build`."""
    folder, used = _measured(_builder(work, near))
    files = [folder / f"{split}.jsonl" for split in ("train", "validation", "eval")]
    return used | _mistakes(work, files, answered=False)


def json_job(work: Work) -> dict[str, Any]:
    """A yardstick: what it costs to parse the lines, with the standard library and for nothing."""

    def run() -> None:
        for line in work.read():
            json.loads(line)

    return _measured(run)[1]


def baseline_job(work: Work) -> dict[str, Any]:
    """As people do it: parse, drop duplicates of the last user text, split at random, write OpenAI's training rows."""
    import pandas as pd
    from sklearn.model_selection import train_test_split

    def run() -> list[Path]:
        rows = []
        for line in work.read():
            hit = json.loads(line)
            request, answer = hit["request"], hit["response"]["choices"][0]["message"]
            text = next(m["content"] for m in reversed(request["messages"]) if m["role"] == "user")
            rows.append({"text": text, "messages": [*request["messages"], answer], "tools": request["tools"]})
        frame = pd.DataFrame(rows).drop_duplicates("text")
        files = []
        for name, part in zip(("train", "eval"), train_test_split(frame, test_size=0.2, random_state=0), strict=True):
            files.append(work.out / f"{name}.jsonl")
            with files[-1].open("w", encoding="utf-8") as file:
                for row in part.itertuples():
                    file.write(json.dumps({"messages": row.messages, "tools": row.tools}, ensure_ascii=False) + "\n")
        return files

    files, used = _measured(run)
    return used | _mistakes(work, files, answered=True)


def profile_job(work: Work) -> dict[str, Any]:
    """Where the time of an exact build goes, by functions' own time."""
    profile = cProfile.Profile()
    profile.runcall(_builder(work, near=False))
    stats = pstats.Stats(profile).get_stats_profile()
    functions = sorted(stats.func_profiles.items(), key=lambda item: item[1].tottime, reverse=True)
    return {"total_s": stats.total_tt, "functions": [(n, p.file_name, p.ncalls, p.tottime) for n, p in functions]}


def store_job(work: Work) -> dict[str, Any]:
    """Put the records into a log store; not part of any figure."""
    from flywheel_ray.records import Record, parse_line
    from flywheel_ray.stores.sqlite import SqliteStore

    lines, store = work.read(), SqliteStore(work.store)
    while batch := list(islice(lines, _BATCH)):
        store.append(record for record in map(parse_line, batch) if isinstance(record, Record))
    store.close()
    return {}


def prepare_job(work: Work, ray_cpus: int) -> dict[str, Any]:
    """From the store to files, in this process (0) or on Ray with so many CPUs; the start of Ray does not count."""
    from flywheel_ray.config import Places
    from flywheel_ray.datasets import DatasetPolicy
    from flywheel_ray.preparation import prepare
    from flywheel_ray.services import LogQuery

    if ray_cpus:
        import ray
        import ray.data

        ray.init(address="local", num_cpus=ray_cpus, include_dashboard=False, log_to_driver=False)
    places = Places(runs=work.out, store=str(work.store))
    query = LogQuery(client_id=CLIENT_ID, workload_id=SUPPORT)
    taken_at = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal taken_at
        taken_at = time.monotonic()

    policy = DatasetPolicy(near_duplicates=None)
    begin = time.monotonic()
    folder = prepare(
        places, query, policy, engine="ray" if ray_cpus else "process", on_progress=on_progress, out=work.out
    )
    wall = time.monotonic() - begin
    return {"wall_s": wall, "taking_in_s": taken_at - begin, "folder": folder.name, "files": _digests(folder)}


def _measured(run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    cpu, wall = _cpu_s(), time.monotonic()
    result = run()
    used = {"wall_s": time.monotonic() - wall, "cpu_s": _cpu_s() - cpu}
    return result, used | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _cpu_s() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _mistakes(work: Work, files: Sequence[Path], answered: bool) -> dict[str, Any]:
    """What is wrong with written rows, found without any code of the package.

    Returns:
        rows; steps: distinct requests of the log that end with a tool's result; lost_steps: those that no row has;
        conversations: distinct first user messages among the rows; torn: those in more than one file.
    """
    kept: set[bytes] = set()
    rows, sides = 0, []
    for path in files:
        side = set()
        with path.open("rb") as file:
            for line in file:
                messages = json.loads(line)["messages"]
                asked = messages[:-1] if answered else messages
                kept.add(_name(asked))
                side.add(_digest(next(m["content"] for m in asked if m["role"] == "user")))
                rows += 1
        sides.append(side)
    logged = (json.loads(line)["request"]["messages"] for line in work.read())
    steps = {_name(messages) for messages in logged if messages[-1]["role"] == "tool"}
    conversations = set().union(*sides)
    return {
        "rows": rows,
        "steps": len(steps),
        "lost_steps": len(steps - kept),
        "conversations": len(conversations),
        "torn": sum(sum(name in side for side in sides) > 1 for name in conversations),
    }


def _name(messages: Iterable[dict[str, Any]]) -> bytes:
    """A request without what servers draw at random: the ids of tool calls."""
    said = [[m["role"], m.get("content"), [c["function"] for c in m.get("tool_calls") or ()]] for m in messages]
    return _digest(json.dumps(said, sort_keys=True))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "exact": partial(build_job, near=False),
    "near": partial(build_job, near=True),
    "json": json_job,
    "baseline": baseline_job,
    "profile": profile_job,
    "store": store_job,
    "process": partial(prepare_job, ray_cpus=0),
    "ray-1": partial(prepare_job, ray_cpus=1),
    "ray-2": partial(prepare_job, ray_cpus=2),
}


def run_job(name: str, work: Work) -> dict[str, Any]:
    """Run a job in a fresh process, and remove what it wrote."""
    work.out.mkdir()
    try:
        arguments = ["--job", name, "--records", str(work.records), "--work", str(work.out.parent)]
        done = subprocess.run([sys.executable, "-m", _MODULE, *arguments], stdout=subprocess.PIPE, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"the job {name!r} of {work.records:,} records ended with {error.returncode}")
    finally:
        shutil.rmtree(work.out)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _work(folder: Path, records: int) -> Work:
    return Work(folder / "lines.jsonl", records, folder / f"logs-{records}.sqlite", folder / "out")


_MODULE = "experiments.benchmarks.dataset_build"


# ── the tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table; all columns but the first are to the right."""
    for row in (columns, ["---", *["---:"] * (len(columns) - 1)], *rows):
        print(f"| {' | '.join(row)} |", flush=True)
    print(flush=True)


def _build_row(name: str, records: int, found: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{records:,}",
        f"{found['wall_s']:.2f}",
        f"{found['cpu_s']:.2f}",
        f"{records / found['cpu_s']:,.0f}",
        f"{found['peak_mib']:,.0f}",
        f"{found['rows']:,}",
        f"{found['lost_steps']:,} of {found['steps']:,}",
        f"{found['torn']:,} of {found['conversations']:,}",
    ]


def builds(folder: Path, sizes: Sequence[int], options: argparse.Namespace) -> list[str]:
    """Run and print the builds of every size; returns what is not as asked."""
    wrong, rows, notes = [], [], []
    for records in sizes:
        work = _work(folder, records)
        pairs = [(run_job("exact", work), run_job("json", work)) for _ in range(options.repeat)]
        exact = min((run for run, _ in pairs), key=itemgetter("cpu_s"))
        rows.append(_build_row("exact", records, exact))
        rates = sorted((records / run["cpu_s"] for run, _ in pairs), reverse=True)
        ratio = statistics.median(run["cpu_s"] / parsing["cpu_s"] for run, parsing in pairs)
        notes.append(
            f"{records:,} records, all runs: {', '.join(f'{rate:,.0f}' for rate in rates)} records / CPU-s; "
            f"a build takes {ratio:.2f} times as long as `json.loads` alone"
        )
        rate = rates[0]
        if rate < options.at_least:
            wrong.append(f"{records:,} records: {rate:,.0f} per CPU-second, fewer than {options.at_least:,}")
        if exact["peak_mib"] > options.at_most:
            wrong.append(f"{records:,} records: {exact['peak_mib']:,.0f} MiB at the peak, over {options.at_most:,}")
        if exact["torn"] or exact["lost_steps"]:
            wrong.append(f"{records:,} records: a conversation on two sides, or a step lost")
    for records in sorted({min(size, options.near) for size in sizes if options.near}):
        rows.append(_build_row("default policy", records, run_job("near", _work(folder, records))))
    for records in sorted({min(size, options.baseline) for size in sizes if options.baseline}):
        capped = " (as many as fit)" if records not in sizes else ""
        rows.append(_build_row(f"pandas, scikit-learn{capped}", records, run_job("baseline", _work(folder, records))))
    columns = ["build", "records", "wall s", "CPU s", "records / CPU-s", "peak MiB", "rows kept"]
    print_table([*columns, "agent steps lost", "conversations on two sides"], rows)
    print("\n".join(notes), end="\n\n", flush=True)
    return wrong


def profiled(folder: Path) -> None:
    """Run and print the profile."""
    found = run_job("profile", _work(folder, _PROFILED_RECORDS))
    listed = [
        [
            f"`{name}`",
            f"{Path(file).name}" if file != "~" else "C",
            calls,
            f"{own:.3f}",
            f"{own / found['total_s']:.1%}",
        ]
        for name, file, calls, own in found["functions"][:_PROFILED_ROWS]
    ]
    print(f"Profile of an exact build of {_PROFILED_RECORDS:,} records, {found['total_s']:.2f} s under the profiler:\n")
    print_table(["function", "file", "calls", "own s", "share"], listed)


def engines(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Run and print the store's builds in one process and on Ray; returns what is not as asked."""
    wrong, rows = [], []
    for records in sizes:
        work = _work(folder, records)
        run_job("store", work)
        found = {name: run_job(name, work) for name in ("process", "ray-1", "ray-2")}
        for path in folder.glob(f"{work.store.name}*"):
            path.unlink()
        same = {
            name: all(result[k] == found["process"][k] for k in ("folder", "files")) for name, result in found.items()
        }
        wrong += [f"{records:,} records: {name} made other files than process" for name in same if not same[name]]
        for name, result in found.items():
            walls = [result["taking_in_s"], result["wall_s"] - result["taking_in_s"], result["wall_s"]]
            speedup = f"{found['ray-1']['wall_s'] / result['wall_s']:.2f}"
            taking = f"{found['ray-1']['taking_in_s'] / result['taking_in_s']:.2f}"
            figures = [*(f"{wall:.1f}" for wall in walls), taking, speedup]
            rows.append([name, f"{records:,}", *figures, result["folder"], "yes" if same[name] else "NO"])
    columns = ["engine", "records", "taking in s", "rest s", "wall s", "taking in / ray-1", "wall / ray-1"]
    print_table([*columns, "fingerprint", "files equal"], rows)
    return wrong


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[25_000], help="sizes (default: 25000)")
    parser.add_argument("--work", type=Path, help="folder for files, 4 to 12 kB a record (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the log lines in --work")
    parser.add_argument("--repeat", type=int, default=3, help="runs of an exact build (default: %(default)s)")
    parser.add_argument(
        "--near", type=int, nargs="?", const=100_000, default=0, help="also the default policy, to so many records"
    )
    parser.add_argument("--baseline", type=int, default=250_000, help="its largest size (default: %(default)s)")
    parser.add_argument("--ray", action="store_true", help="also from a log store, in one process and on Ray")
    parser.add_argument("--profile", action="store_true", help="also where the time of an exact build goes")
    parser.add_argument("--at-least", type=int, default=30_000, help="records a CPU-second (default: %(default)s)")
    parser.add_argument("--at-most", type=int, default=1024, help="peak MiB (default: %(default)s)")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job](_work(options.work, options.records[0]))))
        return
    sizes = sorted(set(options.records))
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="dataset_build.", dir=options.work))
    try:
        begin = time.monotonic()
        lines = folder / "lines.jsonl"
        write_traffic(lines, max(*sizes, _PROFILED_RECORDS if options.profile else 0))
        size = lines.stat().st_size / 1e6
        print(f"{lines}: {size:,.0f} MB of log lines in {time.monotonic() - begin:.0f} s\n", flush=True)
        wrong = builds(folder, sizes, options)
        if options.profile:
            profiled(folder)
        if options.ray:
            wrong += engines(folder, sizes)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
