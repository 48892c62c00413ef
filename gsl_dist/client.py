"""The way to a running service from Python: numpy in, `Hits` out.

`Client.search` gives the answer that the local searcher and the router give. Queries travel as raw float32 over one
persistent connection. Distances are squared L2, smaller is nearer; or inner products or cosines, larger is nearer,
where that is the metric of the version. Where a query has fewer than k hits, the id is -1.
Importing this module loads neither torch, Ray nor faiss.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsl_dist.errors import ConfigError, GslError, QueryError, ShardUnavailable
from gsl_dist.hits import Effort, Hits
from gsl_dist.wire import HITS_TYPE, QUERY_TYPE, pack_query, unpack_hits


class Client:
    """A connection to a service, for use in a `with` block or until `close`.

    Args:
        url: where the service answers, such as `http://127.0.0.1:8080`.
        timeout_s: how long an answer may take.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("url", url, "it must begin with http:// or https://")
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=timeout_s)

    def search(  # noqa: PLR0913 - what a query may ask for
        self,
        queries: ArrayLike,
        k: int = 10,
        probes: int | None = None,
        *,
        refine: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        require_all: bool = False,
    ) -> Hits:
        """Give the k nearest items of each query.

        Args:
            queries: vectors of the index's dimension.
            k: neighbours wanted for each.
            probes: lists to look into, cells or regions; by default 16 cells, or all if there are fewer.
            refine: candidates for each hit, ranked again by the vectors kept; by default 4 where they are.
            recall: the share of true neighbours to find, instead of probes and refine, as `gsl tune` measured it.
            where: which items may be hits, by payload columns and `id` (`gsl_dist.filters`).
            require_all: take no answer rather than a partial one.

        Shapes: queries (Q, D) or (D,) -> ids (Q, k) int64, distances (Q, k) float32.
        Raises:
            QueryError: the request is refused; the error names the field.
            ShardUnavailable: no shard answered, or one did not and all are required.
            GslError: there is no service at the url, or it failed.
        """
        body = pack_query(_as_matrix(queries), Effort(k, probes, refine, recall, where))
        path = "/v1/search?require_all=true" if require_all else "/v1/search"
        answer = self._send("POST", path, content=body, headers={"content-type": QUERY_TYPE})
        if answer.headers.get("content-type") != HITS_TYPE:
            raise GslError(f"{self.url} answered with something that is not hits: is it a gsl service?")
        return unpack_hits(answer.content)

    def versions(self) -> dict[str, Any]:
        """Give the versions of the index, the one promoted, and what is served now."""
        return self._read("/v1/versions")

    def health(self) -> dict[str, Any]:
        """Give how many shards answer.

        Raises:
            ShardUnavailable: none does.
        """
        return self._read("/healthz")

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, path: str) -> dict[str, Any]:
        content = _read_object(self._send("GET", path))
        if content is None:
            raise GslError(f"{self.url}{path} answered with something that is not JSON: is it a gsl service?")
        return content

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, self.url + path, **request)
        except httpx.TimeoutException as error:
            raise GslError(f"{self.url} did not answer in time ({type(error).__name__})") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise GslError(f"{self.url} cannot be reached: {error}") from error
        if answer.is_success:
            return answer
        raise _read_error(self.url, answer)


class _Shown(str):
    """A value that the server has already made fit to show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _as_matrix(queries: ArrayLike) -> NDArray[np.float32]:
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


def _read_object(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        content = answer.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read_error(url: str, answer: httpx.Response) -> GslError:
    content = _read_object(answer) or {}
    if "missing" in content:
        return ShardUnavailable(content["missing"], content["total"])
    message = content.get("message", answer.reason_phrase)
    if 400 <= answer.status_code < 500 and content.get("field"):
        allowed = content.get("allowed", message)
        return QueryError(content["field"], _Shown(content.get("value")), allowed, answer.status_code)
    return GslError(f"{url} answered {answer.status_code}: {message}")
