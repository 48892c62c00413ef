"""The gRPC door: the search of the HTTP door for clients of any language, by `search.proto` beside this file.

It runs on the router's loop and goes through the same desk: the same tokens, limits, checks and figures.
`search_pb2.py` is made of the proto by protoc; `tests/service/test_rpc.py` says how, and that the two agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
from google.protobuf.message import DecodeError

from gsl_dist.errors import BadInput, ConfigError, Denied, GslError, Overloaded, QueryError
from gsl_dist.hits import Hits
from gsl_dist.service.app import Desk
from gsl_dist.service.asking import answer_question
from gsl_dist.service.reading import settle_question
from gsl_dist.service.search_pb2 import SearchReply, SearchRequest
from gsl_dist.service.tls import Tls
from gsl_dist.wire import pack_table

SERVICE = "gsl.v1.Search"
_ASIDE = ("probes", "refine", "recall", "within", "group_by", "group_size", "version")
_CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 404: grpc.StatusCode.NOT_FOUND, 413: grpc.StatusCode.INVALID_ARGUMENT}
_SPARE_S = 0.02


class RpcDoor:
    """Answers gRPC beside the HTTP door.

    Args:
        desk: what every request goes through.
        host: the address to bind.
        port: the port; 0 for any free one.
        tls: for encryption.
    """

    def __init__(self, desk: Desk, *, host: str, port: int, tls: Tls | None = None) -> None:
        self._desk, self._place, self._tls = desk, f"{host}:{port}", tls
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Begin to answer; to be called on the loop of the router.

        Raises:
            ConfigError: the port is taken.
        """
        limit = self._desk.limits.body_bytes
        sizes = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.so_reuseport", 0),
        ]
        server = grpc.aio.server(options=sizes)
        # Bytes come in as they are: what is no message is refused here, and is not logged by gRPC as a fault.
        method = grpc.unary_unary_rpc_method_handler(self.search, None, SearchReply.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Search": method}),))
        try:
            self.port = self._bind(server)
        except RuntimeError as error:
            raise ConfigError("grpc_port", self._place, f"it must be free to listen on ({error})") from None
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Stop answering."""
        if self._server is not None:
            await self._server.stop(None)

    async def search(self, body: bytes, context: grpc.aio.ServicerContext) -> Any:
        """Answer one request, which is a `SearchRequest` on the wire."""
        shown = dict(context.invocation_metadata() or ()).get("authorization")
        left_s = context.time_remaining()
        try:
            with self._desk.admit("grpc", shown, "read"), self._desk.router.hold() as served:
                # An answer takes a moment to travel: one that says what is missing is better than none in time.
                fields = _read_fields(_read_message(body), None if left_s is None else max(left_s - _SPARE_S, 1e-3))
                question = settle_question(fields, served.manifest, self._desk.limits)
                return _reply(await answer_question(served, question, self._desk.encode))
        except GslError as error:
            await context.abort(_find_code(error), str(error))

    def _bind(self, server: grpc.aio.Server) -> int:
        if self._tls is None:
            return int(server.add_insecure_port(self._place))
        pair = (Path(self._tls.key).read_bytes(), Path(self._tls.cert).read_bytes())
        return int(server.add_secure_port(self._place, grpc.ssl_server_credentials([pair])))


def _read_message(body: bytes) -> Any:
    try:
        return SearchRequest.FromString(body)
    except DecodeError as error:
        raise QueryError("message", f"{len(body)} bytes", f"it must be a SearchRequest ({error})") from None


def _read_fields(request: Any, left_s: float | None) -> dict[str, Any]:
    """Give a request as the JSON of the HTTP door would say it."""
    numbers = np.frombuffer(request.vectors, "<f4") if len(request.vectors) % 4 == 0 else np.empty(0, np.float32)
    if request.dim == 0 or len(numbers) == 0 or len(numbers) % request.dim:
        raise QueryError("vectors", f"{len(request.vectors)} bytes", f"they must be rows of {request.dim} float32 each")
    fields = {name: getattr(request, name) for name in _ASIDE if request.HasField(name)}
    if request.HasField("where"):
        try:
            fields["where"] = orjson.loads(request.where)
        except orjson.JSONDecodeError as error:
            raise QueryError("where", request.where, f"it must be JSON ({error})") from None
    fields |= {"k": request.k} if request.k else {}
    fields |= {"offset": request.offset, "payload": list(request.payload), "require_all": request.require_all}
    return fields | {"vectors": numbers.reshape(-1, request.dim)} | ({} if left_s is None else {"timeout_s": left_s})


def _reply(hits: Hits) -> Any:
    return SearchReply(
        ids=np.ascontiguousarray(hits.ids, "<i8").tobytes(),
        distances=np.ascontiguousarray(hits.distances, "<f4").tobytes(),
        k=hits.ids.shape[1],
        shards_answered=hits.shards_answered,
        shards_total=hits.shards_total,
        missing=hits.missing,
        version=hits.version,
        payload=b"" if hits.payload is None else pack_table(hits.payload),
    )


def _find_code(error: GslError) -> grpc.StatusCode:
    if isinstance(error, BadInput):
        return _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
    if isinstance(error, Denied):
        return grpc.StatusCode.UNAUTHENTICATED if error.status == 401 else grpc.StatusCode.PERMISSION_DENIED
    return grpc.StatusCode.RESOURCE_EXHAUSTED if isinstance(error, Overloaded) else grpc.StatusCode.UNAVAILABLE
