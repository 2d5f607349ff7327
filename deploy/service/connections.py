"""uvicorn, for clients that take their time: nobody who only holds a connection open keeps others out."""

import asyncio
import os
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from the connection, or the last answer, until the headers of a request are there
ACCEPTED_AT_ONCE = 16  # connections; only then does the first of them count
QUEUE = 1024  # connections that the system holds meanwhile
RESERVED_FILES = 128  # for what is accepted and does not count yet, for decoders and for the page
MOST_CONNECTIONS = 1000


class Connection(H11Protocol):
    """A connection that has a deadline for headers, and makes room for others while it waits for its client.

    The deadline for bodies is the application's. uvicorn by itself waits for either without end.
    """

    most = MOST_CONNECTIONS
    since = 0.0  # the loop's time when it began to wait for the headers, or for the body that is coming
    deadline: asyncio.TimerHandle | None = None

    @property
    def waits_for_client(self) -> bool:
        """Whether it is the client's turn: to ask, to send the rest of a body or to read the answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Count it, and close the one that has waited longest if there are too many."""
        super().connection_made(transport)
        self._await_headers()
        if len(self.connections) > self.most:
            waiting = [connection for connection in self.connections if connection.waits_for_client]
            longest = min(waiting, key=lambda connection: connection.since)  # at least this one waits
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline too."""
        self.deadline.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Where the headers of a request have come, their deadline is over."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self.deadline.cancel()
            self.since = self.loop.time()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._await_headers()
        super().on_response_complete()

    def _await_headers(self) -> None:
        if self.deadline:
            self.deadline.cancel()
        self.since = self.loop.time()
        self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn with such connections, on a socket that listens already.

    Args:
        app: the ASGI application.
        seconds: that the end may take after SIGTERM; what is not answered by then is dropped.
        verbose: log every request.
    """

    def __init__(self, app: Any, seconds: float, verbose: bool) -> None:
        self._seconds = seconds
        log_level = "info" if verbose else "warning"
        super().__init__(uvicorn.Config(app, http=Connection, ws="none", log_level=log_level, backlog=ACCEPTED_AT_ONCE))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """asyncio takes the length of the system's queue for how many to accept at once, so that is set afterwards."""
        Connection.most = most_connections()
        await super().startup(sockets)
        for listener in sockets:
            listener.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was taken on, but end in time whatever client, decoder or model there is."""
        end = threading.Timer(self._seconds, os._exit, [0])
        end.daemon = True
        end.start()
        await super().shutdown(sockets)


def most_connections() -> int:
    """How many connections the process may hold, by how many files it may open."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not Unix
        return MOST_CONNECTIONS
    return min(max(allowed - RESERVED_FILES, ACCEPTED_AT_ONCE), MOST_CONNECTIONS)
