"""What a server answers, and how long a start takes, while nothing happens to it."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from benchmarks.faults.asks import Outcome, asks
from benchmarks.faults.clients import Clients
from benchmarks.faults.site import Site
from benchmarks.faults.trial import Load, Log, NotUpError
from benchmarks.reference import Reference
from mlx_dist.demo import MODEL_DIR

_ASKS_SEED, _LONG_SEED = 1, 2
_PER_STREAM = 2
_STARTS_S, _ENDS_S = 180.0, 60.0
_REQUEST_S = 300.0
# A host's kernels are compiled for the first of these steps; nothing is to be taken for stuck.
_PATIENT = ("--heartbeat-timeout-s", "100")


def undisturbed(site: Site, flags: Sequence[str], num_streams: int) -> tuple[Load, float]:
    """The load, with its right answers, and the seconds that a start takes to the first answer."""
    mixed, long = asks(_PER_STREAM * num_streams, _ASKS_SEED), asks(num_streams, _LONG_SEED, True)
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
        together = [[*long[i::num_streams], *mixed[i::num_streams]] for i in range(num_streams)]
        tally = Clients(address, together, {}, _REQUEST_S).once()
        if (supervisor := server.find("supervisor")) is not None:
            supervisor.send(signal.SIGTERM)
        server.process.wait(_ENDS_S)
    finally:
        for one in server.processes():
            one.send(signal.SIGKILL)
    if set(+tally.counts) != {Outcome.right}:
        raise NotUpError(f"undisturbed: {dict(tally.counts)} {tally.oddities}")
    streams = [mixed[i::num_streams] for i in range(num_streams)]
    bursts = [[long[i], *streams[i]] for i in range(num_streams)]
    load = Load(streams, bursts, tally.told, Reference(MODEL_DIR))
    if odd := [one for one in load.due.items() if not load.is_tie(*one)]:
        raise NotUpError(f"undisturbed, and not what one process says: {odd}")
    return load, load_s
