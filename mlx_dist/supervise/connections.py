"""Connections to the ranks' shim for httpcore's pool, on asyncio's own streams.

Every event of every answer comes through one. httpcore's stock connections support any event loop
and time out each read, which costs several times what the reading does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpcore2


class Connections(httpcore2.AsyncNetworkBackend):
    """Opens plain TCP connections; timeouts are those of whoever waits."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Raises ConnectError if nobody listens there."""
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        return _Connection(reader, writer)


class _Connection(httpcore2.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return await self._reader.read(max_bytes)
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._writer.write(buffer)
            await self._writer.drain()
        except OSError as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self._writer.close()

    def get_extra_info(self, info: str) -> Any:
        # Of a connection that is not in use, whatever comes is its end.
        if info == "is_readable":
            return self._reader.at_eof() or self._reader.exception() is not None
        return None
