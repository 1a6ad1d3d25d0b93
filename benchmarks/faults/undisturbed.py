"""What a server answers, and how long a start takes, while nothing happens to it."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from itertools import islice

from benchmarks.faults.asks import Ask, Outcome, Told, asks
from benchmarks.faults.clients import Clients, Tally
from benchmarks.faults.site import Site
from benchmarks.faults.trial import Load, Log, NotUpError

_ASKS_SEED, _LONG_SEED = 1, 2
_PER_STREAM, _SHUFFLES = 2, 3
_MOST_ROUNDS = 4
_STARTS_S, _ENDS_S = 180.0, 60.0
_REQUEST_S = 300.0
# A host's kernels are compiled for the first of these steps; nothing is to be taken for stuck.
_PATIENT = ("--heartbeat-timeout-s", "100")


def undisturbed(site: Site, flags: Sequence[str], num_streams: int) -> tuple[Load, float]:
    """The load, with the right answers, and the seconds from a server's start to its first answer.

    A request whose answers differ when it is asked alone or among other requests is left out: two
    candidates for a token lie within the rounding that another batch shape brings.
    """
    mixed, long = asks(_PER_STREAM * num_streams, _ASKS_SEED), asks(num_streams, _LONG_SEED, True)
    every, draw = [*mixed, *long], random.Random(_ASKS_SEED)
    address = site.address()
    log = Log(site.folder / "undisturbed.log")
    start_s = time.monotonic()
    server = site.serve(address, [*flags, *_PATIENT], site.folder / "undisturbed.log")
    try:
        while log.first("is served at") is None:
            if server.process.poll() is not None or time.monotonic() > start_s + _STARTS_S:
                raise NotUpError("\n".join(text for _, text in log.lines))
            time.sleep(0.02)
            log.look()
        load_s = time.monotonic() - start_s
        orders = [every, every[::-1], *(draw.sample(every, len(every)) for _ in range(_SHUFFLES))]
        runs = [[order[i::num_streams] for i in range(num_streams)] for order in orders]
        # And each for itself.
        runs.append([every])
        tallies = [Clients(address, streams, {}, _REQUEST_S).once() for streams in runs]
        due = {ask: tallies[0].told[ask] for ask in every if _is_one(ask, tallies)}
        # And together as they will be, until the rest is always the same.
        for _ in range(_MOST_ROUNDS):
            load = _load_of(mixed, long, due, num_streams)
            together = [load.streams, load.long]
            tallies += [Clients(address, streams, {}, _REQUEST_S).once() for streams in together]
            settled = {ask: told for ask, told in due.items() if _is_one(ask, tallies)}
            if settled == due:
                break
            due = settled
        if (supervisor := server.find("supervisor")) is not None:
            supervisor.send(signal.SIGTERM)
        server.process.wait(_ENDS_S)
    finally:
        for one in server.processes():
            one.send(signal.SIGKILL)
    for tally in tallies:
        if set(+tally.counts) != {Outcome.right}:
            raise NotUpError(f"undisturbed: {dict(tally.counts)} {tally.oddities}")
    return _load_of(mixed, long, due, num_streams), load_s


def _is_one(ask: Ask, tallies: Sequence[Tally]) -> bool:
    tolds = [tally.told[ask] for tally in tallies if ask in tally.told]
    return all(told == tolds[0] for told in tolds)


def _load_of(
    mixed: Sequence[Ask], long: Sequence[Ask], due: dict[Ask, Told], num_streams: int
) -> Load:
    kept, kept_long = [a for a in mixed if a in due], [a for a in long if a in due]
    streams = [list(islice(kept, i, None, num_streams)) or kept for i in range(num_streams)]
    bursts = [[kept_long[i % len(kept_long)], *streams[i]] for i in range(num_streams)]
    return Load(streams, bursts, due)
