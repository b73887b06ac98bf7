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


def open_store(url: str, create: bool = True) -> LogStore:
    """Open the log store that a URL names.

    Args:
        url: a path or `sqlite:///path` (four slashes for an absolute one) for SQLite;
            `http(s)://host:port/index` for Elasticsearch.
        create: make the store where there is none yet; False is for readers.

    Raises:
        ConfigError: the URL is of no known kind.
        StoreError: there is no store and `create` is False, or it cannot be opened.
    """
    if not url:
        raise ConfigError("the log store is empty text. Set --store or FLYWHEEL_STORE to a path or an http(s) URL.")
    scheme, found, rest = url.partition("://")
    if found and scheme in ("http", "https"):
        if not urlsplit(url).path.strip("/"):
            raise ConfigError(f"log store {url!r} names no index. Write http(s)://host:port/index.")
        from flywheel_ray.stores.elasticsearch import ElasticsearchStore

        return ElasticsearchStore(url, create=create)
    if found:
        if scheme != "sqlite" or not rest.startswith("/") or rest == "/":
            raise ConfigError(
                f"log store {url!r} is of no known kind. Write a path, sqlite:///path or http(s)://host:port/index."
            )
        url = rest[1:]
    path = Path(url).expanduser()
    if not create and not path.exists():
        raise StoreError(f"no log store at {path}; run `flywheel ingest` first or set --store / FLYWHEEL_STORE")
    return SqliteStore(path)
