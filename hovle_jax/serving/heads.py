"""Connections whose requests begin in time: half of a request's head does not hold one."""

import asyncio

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def in_time(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with so many seconds for a head to come whole: from the connection or from its first byte.

    uvicorn itself has a limit for connections on which nothing comes after a response. A body has a limit of its own
    (`Entrance`).
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class InTime(H11Protocol):
        _late = None  # the timer of the head that is expected

        def connection_made(self, transport):
            super().connection_made(transport)
            self._watch()

        def data_received(self, data):
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc):
            self._stop()
            super().connection_lost(exc)

        def _watch(self):
            """What comes in drops does not begin the time again."""
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._end)

        def _stop(self):
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end(self):
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.write(LATE)
                self.transport.close()

    return InTime
