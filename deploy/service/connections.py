"""uvicorn, for clients that take their time: nobody who only holds a connection open keeps others out."""

import asyncio
import functools
import os
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from the connection, or the last answer, until the headers of a request are there
ACCEPTED_AT_ONCE = 8  # connections; only then does the first of them count
QUEUE = 1024  # connections that the system holds meanwhile
RESERVED_FILES = 80  # for what is accepted and does not count yet, for decoders and for files that are sent
MOST_WAITING = 1000  # connections


class Connection(H11Protocol):
    """A connection that has a deadline for headers, and makes room for others while it waits for its client.

    The deadline for bodies is the application's; uvicorn by itself waits for either without end. New connections and
    those that were answered before make room for their like only: so those that never ask drive out no client that
    asks again and again, and those that have asked once keep no new client out.
    """

    def __init__(self, *args: Any, most: int, **options: Any) -> None:
        """
        Args:
            args, options: uvicorn's.
            most: connections of either kind that may wait for their clients.
        """
        super().__init__(*args, **options)
        self._most = most
        self._answered = False
        self._since = 0.0  # the loop's time when it began to wait for the headers, or for the body that is coming
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def waits_for_client(self) -> bool:
        """Whether it is the client's turn: to ask, to send the rest of a body or to read the answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Count it."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline too."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Where the headers of a request have come, their deadline is over."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._deadline.cancel()
            self._since = self.loop.time()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._answered = True
        self._await_headers()
        super().on_response_complete()

    def _await_headers(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        like = [c for c in self.connections if c._answered == self._answered and c.waits_for_client]
        if len(like) > self._most:
            longest = min(like, key=lambda connection: connection._since)
            self.connections.discard(longest)
            longest.transport.abort()


class Server(uvicorn.Server):
    """uvicorn with such connections, on a socket that listens already.

    Args:
        app: the ASGI application.
        seconds: that the end may take after SIGTERM; what is not answered by then is dropped.
        verbose: log every request.
    """

    def __init__(self, app: Any, seconds: float, verbose: bool) -> None:
        self._seconds = seconds
        http = functools.partial(Connection, most=most_waiting())
        log_level = "info" if verbose else "warning"
        super().__init__(uvicorn.Config(app, http=http, ws="none", log_level=log_level, backlog=ACCEPTED_AT_ONCE))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """asyncio takes the length of the system's queue for how many to accept at once, so that is set afterwards."""
        await super().startup(sockets)
        for listener in sockets:
            listener.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was taken on, but end in time whatever client, decoder or model there is."""
        end = threading.Timer(self._seconds, os._exit, [0])
        end.daemon = True
        end.start()
        await super().shutdown(sockets)


def most_waiting() -> int:
    """How many connections of either kind may wait for their clients, by how many files the process may open."""
    try:
        import resource

        free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not Unix
        return MOST_WAITING
    return min(max((free - RESERVED_FILES) // 2, ACCEPTED_AT_ONCE), MOST_WAITING)
