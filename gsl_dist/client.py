"""The way to a running service from Python: numpy in, `Hits` out.

`Client.search` gives the answer that the local searcher and the router give; `AsyncClient` has the same methods to be
awaited. Queries travel as raw float32 over persistent connections. Distances are squared L2, smaller is nearer; or
inner products or cosines, larger is nearer, where that is the metric of the version. Where a query has fewer than k
hits, the id is -1. A connection that cannot be made is tried again, since nothing was asked yet; so is a question or a
write that the service put off (429), since all of them may be repeated; nothing else is.
Importing this module loads neither torch, Ray nor faiss.

`Client` asks through urllib3, which takes half as long over a request as httpx; `AsyncClient` through httpx.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
import urllib3
from numpy.typing import ArrayLike

from gsl_dist.calls import Answer, Call, Calls, RawItem, put_off, read_answer
from gsl_dist.errors import ConfigError, GslError
from gsl_dist.hits import NO_ID, Hits

_TRIES, _KEPT_OPEN = 3, 32


class Client:
    """A connection to a service, for use in a `with` block or until `close`.

    Args:
        url: where the service answers, such as `http://127.0.0.1:8080`.
        timeout_s: how long an answer may take.
        token: what the service asks for, if it does.
        verify: False, or a context that holds the certificates to trust, for a service that vouches for itself.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 10.0, token: str | None = None, verify: bool | ssl.SSLContext = True
    ) -> None:
        self.url, self._timeout_s, self._headers = _check_url(url), timeout_s, _show_token(token)
        self._prefix = urlsplit(self.url).path
        # Only a connection that could not be made is tried again; `read` False hands all else on as it is.
        again = urllib3.Retry(total=None, connect=_TRIES - 1, read=False, redirect=False, status=False, other=False)
        secure = {"ssl_context": _trust(verify)} if self.url.startswith("https") else {}
        timeout = urllib3.Timeout(total=timeout_s)
        self._pool = urllib3.connection_from_url(self.url, maxsize=_KEPT_OPEN, retries=again, timeout=timeout, **secure)

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
        """Close the connections."""
        self._pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            answer = self._ask(call)
            wait_s = put_off(answer, deadline)
            if wait_s is None:
                return read_answer(self.url, call, answer)
            time.sleep(wait_s)

    def _ask(self, call: Call) -> Answer:
        headers = self._headers | {"content-type": call.kind}
        try:
            heard = self._pool.urlopen(call.method, self._prefix + call.path, call.body or None, headers)
        except urllib3.exceptions.MaxRetryError as error:
            raise _explain(self.url, error.reason or error) from error
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise _explain(self.url, error) from error
        return Answer(heard.status, heard.headers, heard.data)


class AsyncClient:
    """A `Client` whose methods are awaited, for use in an `async with` block or until `close`.

    Every method takes and gives what that of `Client` does.

    Args:
        url, timeout_s, token, verify: as of `Client`.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 10.0, token: str | None = None, verify: bool | ssl.SSLContext = True
    ) -> None:
        self.url, self._timeout_s = _check_url(url), timeout_s
        transport = httpx.AsyncHTTPTransport(retries=_TRIES - 1, verify=_trust(verify))
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
            answer = await self._ask(call)
            wait_s = put_off(answer, deadline)
            if wait_s is None:
                return read_answer(self.url, call, answer)
            await asyncio.sleep(wait_s)

    async def _ask(self, call: Call) -> Answer:
        headers = {"content-type": call.kind}
        try:
            heard = await self._http.request(call.method, self.url + call.path, content=call.body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _explain(self.url, error) from error
        return Answer(heard.status_code, heard.headers, heard.content)


def _check_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError("url", url, "it must begin with http:// or https://")
    return url.rstrip("/")


def _show_token(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _trust(verify: bool | ssl.SSLContext) -> ssl.SSLContext:
    return verify if isinstance(verify, ssl.SSLContext) else httpx.create_ssl_context(verify)


def _explain(url: str, error: Exception) -> GslError:
    # A refused connection is a timeout, too, to urllib3: NewConnectionError is what it says then.
    late = httpx.TimeoutException | urllib3.exceptions.TimeoutError
    if isinstance(error, late) and not isinstance(error, urllib3.exceptions.NewConnectionError):
        return GslError(f"{url} did not answer in time ({type(error).__name__})")
    return GslError(f"{url} cannot be reached: {error}")
