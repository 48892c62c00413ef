"""The direct door: the router and uvicorn on one event loop, in a thread of their process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import uvicorn
import uvloop
from fastapi import FastAPI

from gsl_dist.errors import ConfigError
from gsl_dist.service.router import Router
from gsl_dist.service.tls import Tls

T = TypeVar("T")

_KEEP_ALIVE_S, _POLL_S = 75, 0.005


class Beside(Protocol):
    """Another door, which opens and closes with the direct one."""

    async def start(self) -> None: ...  # noqa: D102

    async def stop(self) -> None: ...  # noqa: D102


class DirectDoor:
    """Runs a router and uvicorn on one event loop, in a thread of this process.

    Args:
        router: the router; its connections will belong to that loop.
        app: the app that searches through it.
        host: the address to bind.
        port: the port; 0 for any free one.
        tls: for HTTPS.
        beside: another door on the same loop.
    """

    def __init__(
        self,
        router: Router,
        app: FastAPI,
        *,
        host: str,
        port: int,
        tls: Tls | None = None,
        beside: Beside | None = None,
    ) -> None:
        self.router, self._beside, self._socket = router, beside, bind_port(host, port)
        self.port = int(self._socket.getsockname()[1])
        self.loop = uvloop.new_event_loop()
        shown = {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key} if tls else {}
        # Ray Serve owns the process: signals, logging and the app's life are not uvicorn's here.
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                **shown,
            )
        )
        self._fault: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="direct-door", daemon=True)

    def start(self) -> None:
        """Begin to answer.

        Raises:
            ConfigError: the door beside cannot be opened.
        """
        self._thread.start()
        while not self._server.started:
            if self._fault.done():
                raise self._fault.exception() or ConfigError("port", self.port, "the door closed before it was open")
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop answering and hang up."""
        self._server.should_exit = True
        self._thread.join(timeout_s)

    def hop(self, work: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """Do work on the router's loop, and wait for it on another loop of this process."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._serve())
            self._fault.set_result(None)
        except Exception as fault:  # noqa: BLE001 - raised in the thread that opens the door
            self._fault.set_exception(fault)

    async def _serve(self) -> None:
        self.router.start()
        if self._beside is not None:
            await self._beside.start()
        await self._server.serve(sockets=[self._socket])
        if self._beside is not None:
            await self._beside.stop()
        self.router.close()


def bind_port(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        ConfigError: it is taken, or the host is not this machine's.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise ConfigError("port", f"{host}:{port}", f"it must be free to listen on ({error.strerror})") from None
    return taken
