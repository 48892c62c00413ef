"""The way to a running service from Python: numpy in, `Hits` out.

`Client.search` gives the answer that the local searcher and the router give; `AsyncClient` has the same methods to be
awaited. Queries travel as raw float32 over persistent connections. Distances are squared L2, smaller is nearer; or
inner products or cosines, larger is nearer, where that is the metric of the version. Where a query has fewer than k
hits, the id is -1. A connection that cannot be made is tried again, since nothing was asked yet; so is a question or a
write that the service put off (429), since all of them may be repeated; nothing else is.
Importing this module loads neither torch, Ray nor faiss.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsl_dist.errors import ConfigError, Denied, GslError, Overloaded, QueryError, ShardUnavailable
from gsl_dist.hits import NO_ID, Effort, Hits
from gsl_dist.wire import HITS_TYPE, QUERY_TYPE, pack_query, unpack_hits

RawItem = bytes | ArrayLike | Mapping[str, bytes | ArrayLike]
"""A file, an array of numbers, or of each modality, by its name, one of both."""

T = TypeVar("T")

_TRIES = 3
_LONGEST_WAIT_S = 5.0


@dataclass(frozen=True)
class Call:
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[str, httpx.Response], Any]
    content: dict[str, Any] = field(default_factory=dict)


class Calls:
    """What can be asked of a service, as requests."""

    @staticmethod
    def search(  # noqa: PLR0913 - what a query may ask for
        queries: ArrayLike | None,
        k: int = 10,
        probes: int | None = None,
        *,
        ids: Sequence[int] | None = None,
        items: Sequence[RawItem] | None = None,
        refine: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        within: float | None = None,
        offset: int = 0,
        group_by: str | None = None,
        group_size: int = 1,
        payload: Sequence[str] = (),
        require_all: bool = False,
        timeout_s: float | None = None,
    ) -> Call:
        """Ask for the nearest items of vectors, of items, or of raw items."""
        options: dict[str, Any] = {"require_all": require_all, "offset": offset, "timeout_s": timeout_s}
        options |= {"group_by": group_by, "group_size": group_size if group_by is not None else None}
        if ids is not None or items is not None:
            effort = {"k": k, "probes": probes, "refine": refine, "recall": recall, "where": where, "within": within}
            source = (
                {"ids": [int(item) for item in ids]}
                if ids is not None
                else {"items": _show_items(() if items is None else items)}
            )
            return _post("/v1/search", _keep({**source, "payload": list(payload), **effort, **options}), _read_shown)
        words = {"require_all": "true" if require_all else None, "offset": offset or None}
        params = [*_keep(options | words).items(), *(("payload", name) for name in payload)]
        body_bytes = pack_query(_as_matrix(queries), Effort(k, probes, refine, recall, where, within))
        sent = {"content": body_bytes, "headers": {"content-type": QUERY_TYPE}}
        return Call("POST", "/v1/search" + (f"?{urlencode(params)}" if params else ""), _read_hits, sent)

    @staticmethod
    def fetch(ids: Sequence[int], payload: Sequence[str] = ()) -> Call:
        """Ask for the payload of items."""
        body = {"ids": [int(item) for item in ids], "payload": list(payload)}
        return _post("/v1/items/fetch", body, lambda url, answer: _read_object(url, answer)["items"])

    @staticmethod
    def upsert(
        ids: Sequence[int], vectors: ArrayLike, payload: Sequence[Mapping[str, Any]] | Mapping[str, Any] = ()
    ) -> Call:
        """Write items."""
        rows = _as_rows(payload, len(ids))
        matrix = _as_matrix(vectors)
        if len(matrix) != len(ids):
            raise QueryError("vectors", _Shown(f"{len(matrix)} rows"), f"there must be one for each of {len(ids)} ids")
        items = [
            {"id": int(item), "vector": vector.tolist(), "payload": row}
            for item, vector, row in zip(ids, matrix, rows, strict=True)
        ]
        return _post("/v1/items", {"items": items}, _read_seq)

    @staticmethod
    def update(ids: Sequence[int], payload: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Call:
        """Change columns of items."""
        rows = _as_rows(payload, len(ids))
        items = [{"id": int(item), "payload": row} for item, row in zip(ids, rows, strict=True)]
        return _post("/v1/items/payload", {"items": items}, _read_seq)

    @staticmethod
    def delete(ids: Sequence[int]) -> Call:
        """End items."""
        return _post("/v1/items/delete", {"ids": [int(item) for item in ids]}, _read_seq)

    @staticmethod
    def promote(version: str) -> Call:
        """Serve another version."""
        return _post("/v1/promote", {"version": version}, _read_object)

    @staticmethod
    def versions() -> Call:
        """Ask what there is and what is served."""
        return Call("GET", "/v1/versions", _read_object)

    @staticmethod
    def health() -> Call:
        """Ask how many shards answer."""
        return Call("GET", "/healthz", _read_object)


class Client:
    """A connection to a service, for use in a `with` block or until `close`.

    Args:
        url: where the service answers, such as `http://127.0.0.1:8080`.
        timeout_s: how long an answer may take.
        token: what the service asks for, if it does.
        verify: as httpx takes it: False, or the certificates to trust, for a service that vouches for itself.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0, token: str | None = None, verify: Any = True) -> None:
        self.url, self._timeout_s = _check_url(url), timeout_s
        transport = httpx.HTTPTransport(retries=_TRIES - 1, verify=verify)
        self._http = httpx.Client(timeout=timeout_s, headers=_show_token(token), transport=transport)

    def search(  # noqa: PLR0913 - what a query may ask for
        self,
        queries: ArrayLike | None = None,
        k: int = 10,
        probes: int | None = None,
        *,
        ids: Sequence[int] | None = None,
        items: Sequence[RawItem] | None = None,
        refine: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        within: float | None = None,
        offset: int = 0,
        group_by: str | None = None,
        group_size: int = 1,
        payload: Sequence[str] = (),
        require_all: bool = False,
        timeout_s: float | None = None,
    ) -> Hits:
        """Give the k nearest items of each query.

        Args:
            queries: vectors of the index's dimension.
            k: neighbours wanted for each.
            probes: lists to look into, cells or regions; by default 16 cells, or all if there are fewer.
            ids: items like which others are wanted, instead of queries.
            items: raw items for the encoder of the service, instead of queries: files as bytes, arrays of numbers, or
                a mapping to either by the names of modalities.
            refine: candidates for each hit, ranked again by the vectors kept; by default 4 where they are.
            recall: the share of true neighbours to find, instead of probes and refine, as `gsl tune` measured it.
            where: which items may be hits, by payload columns and `id` (`gsl_dist.filters`).
            within: how far off a hit may be: at most, or at least where larger is nearer.
            offset: hits to leave out, for the next page.
            group_by: a payload column of which no value may fill the answer,
            group_size: with so many hits at most.
            payload: columns to give with the hits (`Hits.payload`, `Hits.rows`).
            require_all: take no answer rather than a partial one.
            timeout_s: how long shards may take; those that take longer are left out.

        Shapes: queries (Q, D) or (D,) -> ids (Q, k) int64, distances (Q, k) float32.
        Raises:
            QueryError: the request is refused; the error names the field.
            ShardUnavailable: no shard answered, or one did not and all are required.
            Overloaded, Denied: the service is busy, or wants another token.
            GslError: there is no service at the url, or it failed.
        """
        asked = {name: value for name, value in locals().items() if name != "self"}
        hits: Hits = self._do(Calls.search(**asked))
        return hits

    def fetch(self, ids: Sequence[int], payload: Sequence[str] = ()) -> list[dict[str, Any] | None]:
        """Give `id` and `payload` of items, all columns unless some are named; None for one that is not there."""
        return list(self._do(Calls.fetch(ids, payload)))

    def upsert(
        self, ids: Sequence[int], vectors: ArrayLike, payload: Sequence[Mapping[str, Any]] | Mapping[str, Any] = ()
    ) -> int:
        """Write items, new or in place of others, and give the number of the commit: queries find them from then on.

        Args:
            ids: theirs.
            vectors: where they lie.
            payload: values by column, for each item or for all.

        Shapes: ids (N,), vectors (N, D).
        Raises:
            QueryError: an id, a vector or a value is refused; nothing was written.
            Overloaded: too much was written since the version was made; compact it.
        """
        return int(self._do(Calls.upsert(ids, vectors, payload)))

    def update(self, ids: Sequence[int], payload: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> int:
        """Change columns of items, the same for all or for each, and give the number of the commit."""
        return int(self._do(Calls.update(ids, payload)))

    def delete(self, ids: Sequence[int]) -> int:
        """End items, and give the number of the commit: no query finds them from then on."""
        return int(self._do(Calls.delete(ids)))

    def promote(self, version: str) -> dict[str, Any]:
        """Let the service answer from another version; the one before is promoted again to roll back."""
        return dict(self._do(Calls.promote(version)))

    def pages(self, queries: ArrayLike, k: int = 10, **asked: Any) -> Iterator[Hits]:
        """Give page after page of k hits, until no query has any more."""
        offset = int(asked.pop("offset", 0))
        while True:
            hits = self.search(queries, k, offset=offset, **asked)
            if (hits.ids == NO_ID).all():
                return
            yield hits
            offset += k

    def versions(self) -> dict[str, Any]:
        """Give the versions of the index, the one promoted, and what is served now."""
        return dict(self._do(Calls.versions()))

    def health(self) -> dict[str, Any]:
        """Give how many shards answer.

        Raises:
            ShardUnavailable: none does.
        """
        return dict(self._do(Calls.health()))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = self._http.request(call.method, self.url + call.path, **call.content)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _explain(self.url, error) from error
            wait_s = _put_off(answer, deadline)
            if wait_s is None:
                return _read(self.url, answer, call)
            time.sleep(wait_s)


class AsyncClient:
    """A `Client` whose methods are awaited, for use in an `async with` block or until `close`.

    Every method takes and gives what that of `Client` does.

    Args:
        url, timeout_s, token, verify: as of `Client`.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0, token: str | None = None, verify: Any = True) -> None:
        self.url, self._timeout_s = _check_url(url), timeout_s
        transport = httpx.AsyncHTTPTransport(retries=_TRIES - 1, verify=verify)
        self._http = httpx.AsyncClient(timeout=timeout_s, headers=_show_token(token), transport=transport)

    async def search(
        self, queries: ArrayLike | None = None, k: int = 10, probes: int | None = None, **asked: Any
    ) -> Hits:
        """Give the k nearest items of each query."""
        hits: Hits = await self._do(Calls.search(queries, k, probes, **asked))
        return hits

    async def fetch(self, ids: Sequence[int], payload: Sequence[str] = ()) -> list[dict[str, Any] | None]:
        """Give `id` and `payload` of items by their ids; None for an item that is not there."""
        return list(await self._do(Calls.fetch(ids, payload)))

    async def upsert(
        self, ids: Sequence[int], vectors: ArrayLike, payload: Sequence[Mapping[str, Any]] | Mapping[str, Any] = ()
    ) -> int:
        """Write items, new or in place of others, and give the number of the commit."""
        return int(await self._do(Calls.upsert(ids, vectors, payload)))

    async def update(self, ids: Sequence[int], payload: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> int:
        """Change columns of items, and give the number of the commit."""
        return int(await self._do(Calls.update(ids, payload)))

    async def delete(self, ids: Sequence[int]) -> int:
        """End items, and give the number of the commit."""
        return int(await self._do(Calls.delete(ids)))

    async def promote(self, version: str) -> dict[str, Any]:
        """Let the service answer from another version."""
        return dict(await self._do(Calls.promote(version)))

    async def versions(self) -> dict[str, Any]:
        """Give the versions of the index, the one promoted, and what is served now."""
        return dict(await self._do(Calls.versions()))

    async def health(self) -> dict[str, Any]:
        """Give how many shards answer."""
        return dict(await self._do(Calls.health()))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = await self._http.request(call.method, self.url + call.path, **call.content)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _explain(self.url, error) from error
            wait_s = _put_off(answer, deadline)
            if wait_s is None:
                return _read(self.url, answer, call)
            await asyncio.sleep(wait_s)


class _Shown(str):
    """A value that the server has already made fit to show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _check_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError("url", url, "it must begin with http:// or https://")
    return url.rstrip("/")


def _show_token(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _post(path: str, body: dict[str, Any], read: Callable[[str, httpx.Response], Any]) -> Call:
    return Call("POST", path, read, {"json": body})


def _keep(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what nothing was said of."""
    return {name: value for name, value in fields.items() if value is not None}


def _as_matrix(queries: ArrayLike | None) -> NDArray[np.float32]:
    try:
        matrix = np.asarray(queries)
    except ValueError:
        matrix = np.empty(0, object)  # rows of different lengths
    if matrix.dtype.kind not in "fiu" or matrix.ndim not in (1, 2):
        shown = f"{matrix.dtype} of shape {matrix.shape}"
        raise QueryError("vectors", _Shown(shown), "it must be one vector of numbers, or rows of equal length")
    with np.errstate(over="ignore"):  # what becomes infinite, the server refuses
        matrix = matrix.astype(np.float32, copy=False)
    return matrix[None] if matrix.ndim == 1 else matrix


def _as_rows(payload: Sequence[Mapping[str, Any]] | Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    rows = [payload] * count if isinstance(payload, Mapping) else list(payload) or [{}] * count
    if len(rows) != count:
        raise QueryError(
            "payload", _Shown(f"{len(rows)} rows"), f"there must be one for each of {count} ids, or one for all"
        )
    return [dict(row) for row in rows]


def _show_items(items: Sequence[RawItem]) -> list[Any]:
    return [
        {name: _show_part(part) for name, part in item.items()} if isinstance(item, Mapping) else _show_part(item)
        for item in items
    ]


def _show_part(item: bytes | ArrayLike) -> Any:
    return base64.b64encode(item).decode() if isinstance(item, bytes) else np.asarray(item).tolist()


def _put_off(answer: httpx.Response, deadline: float) -> float | None:
    """Give how long to wait before asking again; None if the answer is one."""
    if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return None
    wait_s = min(float(answer.headers.get("retry-after", "1")), _LONGEST_WAIT_S)
    return wait_s if time.monotonic() + wait_s < deadline else None


def _read(url: str, answer: httpx.Response, call: Call) -> Any:
    if answer.is_success:
        return call.read(url + call.path, answer)
    raise _read_error(url, answer)


def _read_hits(url: str, answer: httpx.Response) -> Hits:
    if answer.headers.get("content-type") != HITS_TYPE:
        raise GslError(f"{url} answered with something that is not hits: is it a gsl service?")
    return unpack_hits(answer.content)


def _read_shown(url: str, answer: httpx.Response) -> Hits:
    """Read hits from JSON, as binary ones would be."""
    import pyarrow as pa

    from gsl_dist.hits import FAR

    content = _read_object(url, answer)
    ids = np.array(content["ids"], np.int64)
    distances = np.array([[FAR if far is None else far for far in row] for row in content["distances"]], np.float32)
    shares = content["shards_answered"], content["shards_total"], content["version"], tuple(content.get("missing", ()))
    rows = [row for page in content.get("payload", []) for row in page]
    return Hits(ids, distances, *shares, pa.Table.from_pylist(rows) if rows else None)


def _read_seq(url: str, answer: httpx.Response) -> int:
    return int(_read_object(url, answer)["seq"])


def _read_object(url: str, answer: httpx.Response) -> dict[str, Any]:
    content = _find_object(answer)
    if content is None:
        raise GslError(f"{url} answered with something that is not JSON: is it a gsl service?")
    return content


def _find_object(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        content = answer.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _explain(url: str, error: httpx.HTTPError | httpx.InvalidURL) -> GslError:
    if isinstance(error, httpx.TimeoutException):
        return GslError(f"{url} did not answer in time ({type(error).__name__})")
    return GslError(f"{url} cannot be reached: {error}")


def _read_error(url: str, answer: httpx.Response) -> GslError:
    content = _find_object(answer) or {}
    message, status = content.get("message", answer.reason_phrase), answer.status_code
    if "missing" in content:
        return ShardUnavailable(content["missing"], content["total"])
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return Overloaded(0, float(answer.headers.get("retry-after", "1")))
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Denied(message, status)
    if 400 <= status < 500 and content.get("field"):
        return QueryError(content["field"], _Shown(content.get("value")), content.get("allowed", message), status)
    return GslError(f"{url} answered {status}: {message}")
