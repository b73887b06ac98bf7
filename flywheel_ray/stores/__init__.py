"""Log stores: where records are kept. SQLite is embedded and the default; Elasticsearch is for many machines.

with closing(open_store("logs.db")) as store:                     # or "http://elastic:9200/flywheel-logs"
    store.append([record])
    for record in store.scan(LogQuery(workload_id="support")): ...
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from flywheel_ray.errors import ConfigError, StoreError
from flywheel_ray.services import LogStore
from flywheel_ray.stores.sqlite import SqliteStore


def open_store(url: str, create: bool = True, patience_s: float | None = None) -> LogStore:
    """Open the log store that a URL names.

    Args:
        url: a path or `sqlite:///path` (four slashes for an absolute one) for SQLite;
            `http(s)://host:port/index` for Elasticsearch.
        create: make the store where there is none yet; False is for readers.
        patience_s: how long a call goes on trying where the store is busy or does not answer; None is 30 s for SQLite
            and 120 s for Elasticsearch.

    Raises:
        ConfigError: the URL is of no known kind, or an environment variable of Elasticsearch's is wrong.
        StoreError: there is no store and `create` is False, or it cannot be opened.
    """
    if not url:
        raise ConfigError("the log store is empty text. Set --store or FLYWHEEL_STORE to a path or an http(s) URL.")
    scheme, found, rest = url.partition("://")
    patience = {} if patience_s is None else {"patience_s": patience_s}
    if found and scheme in ("http", "https"):
        if not urlsplit(url).path.strip("/"):
            raise ConfigError(f"log store {_shown(url)} names no index. Write http(s)://host:port/index.")
        from flywheel_ray.stores.elasticsearch import ElasticsearchStore

        return ElasticsearchStore(url, create=create, **patience)
    if found:
        if scheme != "sqlite" or not rest.startswith("/") or rest == "/":
            raise ConfigError(
                f"log store {_shown(url)} is of no known kind. Write a path, sqlite:///path or http(s)://host:port/index."
            )
        url = rest[1:]
    path = Path(url).expanduser()
    if not create and not path.exists():
        raise StoreError(f"no log store at {path}; run `flywheel ingest` first or set --store / FLYWHEEL_STORE")
    return SqliteStore(path, **patience)


def _shown(url: str) -> str:
    """The URL as it may be shown: without a user and password."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return repr(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")
