"""Clients that keep asking: plain sockets on a thread, in a host's network if need be."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.asks import (
    Ask,
    Outcome,
    Told,
    compare,
    is_refusal,
    read_answer,
    read_stream,
)

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_AGAIN_S = 0.25
_MOST_SHOWN = 8
_NOT_ANSWERED = (Outcome.refused, Outcome.unreached)


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens; `network` is the file of the network namespace that it is in."""

    host: str
    port: int
    network: Path | None = None


@dataclass(slots=True)
class Tally:
    """What became of all requests; what is not right, with its request, in words.

    `told` are the answers where none is known to be right, `wrong` those that are not.
    """

    counts: Counter[Outcome] = field(default_factory=Counter)
    oddities: list[str] = field(default_factory=list)
    told: dict[Ask, Told] = field(default_factory=dict)
    wrong: list[tuple[Ask, Told]] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, ask: Ask, outcome: Outcome, said: str) -> None:
        self.counts[outcome] += 1
        if outcome not in (Outcome.right, *_NOT_ANSWERED) and len(self.oddities) < _MOST_SHOWN:
            self.oddities.append(f"{outcome.value}: {said} <- {ask.path} {ask.body}")

    def excuse(self, is_tie: Callable[[Ask, Told], bool]) -> None:
        """Count the wrong answers that are ties as such."""
        for ask, told in self.wrong:
            if is_tie(ask, told):
                self.counts[Outcome.wrong] -= 1
                self.counts[Outcome.tie] += 1


class Clients:
    """`streams` of requests, each asked again and again from its list, from `start` to `stop`.

    `due` are the right answers. Attributes are read by other threads while it runs.
    """

    def __init__(
        self,
        address: Address,
        streams: Sequence[Sequence[Ask]],
        due: Mapping[Ask, Told],
        timeout_s: float,
    ) -> None:
        self.tally = Tally()
        self.num_speaking = 0
        self._address, self._streams, self._due = address, streams, due
        self._timeout_s = timeout_s
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="clients", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """No new requests; returns when the last one is answered, or has taken too long."""
        self._is_stopping = True
        self._thread.join()

    def once(self) -> Tally:
        """Ask all of the streams' requests once."""
        self.start()
        self.stop()
        return self.tally

    @property
    def num_answers(self) -> int:
        """Complete answers so far."""
        return self.tally.counts[Outcome.right]

    def _run(self) -> None:
        if self._address.network is not None:
            _enter(self._address.network)
        asyncio.run(self._ask_all())

    async def _ask_all(self) -> None:
        await asyncio.gather(*map(self._stream, self._streams))

    async def _stream(self, asks: Sequence[Ask]) -> None:
        """All of `asks`, and from the first again until it is stopped."""
        number = 0
        while number < len(asks) if self._is_once else not self._is_stopping:
            ask = asks[number % len(asks)]
            start_s = time.monotonic()
            outcome, said = await self._outcome(ask)
            self.tally.add(ask, outcome, said)
            if outcome in _NOT_ANSWERED:
                await asyncio.sleep(_AGAIN_S)
                continue
            self.tally.longest_s = max(self.tally.longest_s, time.monotonic() - start_s)
            number += 1

    @property
    def _is_once(self) -> bool:
        return not self._due

    async def _outcome(self, ask: Ask) -> tuple[Outcome, str]:
        try:
            async with asyncio.timeout(self._timeout_s):
                status, body = await self._exchange(ask)
        except TimeoutError:
            return Outcome.hung, f"no end in {self._timeout_s:g} s"
        except ConnectionRefusedError as error:
            return Outcome.unreached, str(error)
        except (OSError, asyncio.IncompleteReadError) as error:
            return Outcome.lost, repr(error)
        if status != 200:
            said = body.decode(errors="replace")
            refused = is_refusal(status, body)
            return (Outcome.refused if refused else Outcome.error), f"{status} {said}"
        try:
            told = read_stream(body) if ask.is_streamed else read_answer(body)
        except (ValueError, LookupError) as error:
            return Outcome.lost, f"{error}: ...{body[-100:]!r}"
        if isinstance(told, str):
            return Outcome.error, told
        if self._is_once:
            self.tally.told[ask] = told
            return Outcome.right, ""
        outcome = compare(told, self._due[ask])
        if outcome is Outcome.wrong:
            self.tally.wrong.append((ask, told))
        return outcome, f"{told} instead of {self._due[ask]}"

    async def _exchange(self, ask: Ask) -> tuple[int, bytes]:
        """The status and the whole body, on a connection of its own. Raises OSError."""
        data = ask.body.encode()
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        is_speaking = False
        try:
            head = (
                f"POST {ask.path} HTTP/1.1\r\nHost: {self._address.host}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            writer.write(head.encode() + data)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(headers.split(b" ", 2)[1])
            if b"transfer-encoding: chunked" not in headers:
                length = int(headers.partition(b"content-length:")[2].split()[0])
                return status, await reader.readexactly(length)
            parts = []
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                parts.append((await reader.readexactly(size + 2))[:-2])
                if not is_speaking:
                    is_speaking, self.num_speaking = True, self.num_speaking + 1
            return status, b"".join(parts)
        finally:
            self.num_speaking -= is_speaking
            writer.close()


def _enter(network: Path) -> None:
    """Put this thread into a network namespace: setns(2)."""
    file = os.open(network, os.O_RDONLY)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(file, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    finally:
        os.close(file)
