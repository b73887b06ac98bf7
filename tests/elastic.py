"""A server that speaks Elasticsearch's API: noida-db, in a folder of its own, which can be stopped and started again.

with NoidaDb(folder) as server:
    open_store(f"{server.url}/logs")
    server.stop(); server.start()          # the same data
"""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self


class NoidaDb:
    """noida-db from PyPI. Ended by SIGTERM while nothing is written, it keeps everything; by SIGKILL, it does not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    @staticmethod
    def program() -> Path | None:
        """The program itself, where it is installed: the `noida-db` command is a wrapper, and would outlive it."""
        package = importlib.util.find_spec("noida_db")
        return Path(package.origin).with_name("noida-db") if package is not None and package.origin else None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        program = self.program()
        assert program is not None, "needs noida-db: pip install -e '.[dev]'"
        program.chmod(0o755)
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [program, "start", "--only", "elasticsearch", "--elasticsearch-port", self._port]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(c) for c in [*command, "--data-dir", self._folder]], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                info(self.url)
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                assert time.monotonic() < deadline, "noida-db did not come up"
                time.sleep(0.05)

    def stop(self) -> None:
        """End the server in order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop it in its tracks: connections stay open, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def info(url: str) -> dict[str, Any]:
    """What a server says of itself. Raises OSError where nothing answers."""
    with urllib.request.urlopen(url, timeout=2) as reply:
        return json.load(reply)
