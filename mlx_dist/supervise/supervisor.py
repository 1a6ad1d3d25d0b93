"""`mlx-dist serve --supervise`: owns mpirun and the public port; starts the ranks again, and again.

It trusts what the first rank says and no exit code. `lifecycle.py` decides, `world.py` is a run of
the ranks, `relay.py` the listening side; this ties them together on one event loop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from mlx_dist.cluster import jobs
from mlx_dist.cluster.remote import require_reached, run_on_all
from mlx_dist.cluster.supervised import Word
from mlx_dist.cluster.sweeping import Sweep, sweep
from mlx_dist.errors import MlxDistError
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.sockets import allow_files, listen, uvicorn_config
from mlx_dist.supervise.gate import Gate, Upstream
from mlx_dist.supervise.lifecycle import Lifecycle, Limits, Order, Phase
from mlx_dist.supervise.lookout import Lookout
from mlx_dist.supervise.relay import relay_app
from mlx_dist.supervise.roster import Roster, without_limits_of
from mlx_dist.supervise.world import Ears, Recipe, World

# What may be left after mpirun's end goes by itself, or is killed.
_GRACE_S = 0.5
# A host that has not said by then what is left there is away.
_SWEEPS_S = 4.0
# A watchman must come up before he can say so, on a host that is starting ranks.
_LEAST_LOOKOUT_S = 3.0
_PROBE_EVERY_S = 10.0
_PROBE_S = 4.0

# Something that happened, at a time that it is told; what is to be done.
Event = Callable[[float], list[Order]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is supervised: `mlx-dist ARGUMENTS` on the ranks of `roster`, behind `http`.

    `hostfile` is what the roster was read from, if anything. With `can_replan` the layers may be
    cut anew for fewer ranks. Ranks that are silent for `heartbeat_timeout_s` are taken for lost.
    """

    arguments: Sequence[str]
    roster: Roster
    hostfile: Path | None
    can_replan: bool
    http: HttpConfig
    limits: Limits
    resume_s: float
    heartbeat_timeout_s: float


def run_supervisor(plan: Plan) -> int:
    """Serve until asked to end or given up; the exit code.

    Raises ConfigError or LaunchError for what can be known before anything is started.
    """
    asked_s = time.monotonic()
    if len(plan.roster.hosts) > 1:
        require_reached(plan.roster.hosts)
    # Hosts on which even this takes longer cannot be watched while ranks join.
    is_prompt = time.monotonic() - asked_s < plan.heartbeat_timeout_s
    # A connection to the client and one to the shim.
    allow_files(2 * plan.http.max_connections)
    listening = listen(plan.http.host, plan.http.port)
    with tempfile.TemporaryDirectory(prefix="mlx-dist-") as folder:
        return asyncio.run(_Supervisor(plan, Path(folder), is_prompt).run(listening))


class _Server(uvicorn.Server):
    """uvicorn without signals of its own: they are the supervisor's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Supervisor:
    def __init__(self, plan: Plan, folder: Path, looks_out: bool) -> None:
        self._plan = plan
        self._looks_out = looks_out
        self._lookout: Lookout | None = None
        self._folder = folder
        self._roster = plan.roster
        self._url = ""
        self._gate = Gate(on_idle=lambda: self._tell(self._lifecycle.tick))
        self._lifecycle = Lifecycle(plan.limits, lambda: self._gate.num_requests > 0)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job = os.environ.get(jobs.VARIABLES[0]) or secrets.token_hex(8)
        self._world_job = ""
        self._world: World | None = None
        self._upstream: Upstream | None = None
        self._failed_at_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listening: socket.socket) -> int:
        """Everything, until it is over."""
        http = self._plan.http
        app = relay_app(self._gate, http, self._plan.resume_s)
        server = _Server(uvicorn_config(app, http, lifespan="off"))
        answering = asyncio.create_task(server.serve([listening]))
        host, port = listening.getsockname()[:2]
        self._url = f"http://{host}:{port}"
        self._listen_to_signals()
        try:
            await self._supervise()
        finally:
            self._gate.end()
            await self._close_world()
            for task in self._tasks:
                task.cancel()
            server.should_exit = True
            await answering
        return self._lifecycle.code

    async def _supervise(self) -> None:
        lifecycle = self._lifecycle
        self._tell(lifecycle.tick)
        self._in_background(self._look_for_hosts())
        while lifecycle.phase is not Phase.over:
            event: Event = lifecycle.tick
            try:
                async with asyncio.timeout(lifecycle.wait_s(time.monotonic())):
                    event = await self._events.get()
            except TimeoutError:
                pass
            was_serving = lifecycle.phase is Phase.serving
            orders = event(time.monotonic())
            if was_serving and lifecycle.phase is not Phase.serving:
                self._failed_at_s = time.monotonic()
                self._gate.shut()
            if lifecycle.is_draining:
                self._gate.drain()
            for order in orders:
                await self._do(order)

    def _tell(self, event: Event) -> None:
        self._events.put_nowait(event)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            # Under nohup a terminal that closes is nothing to us.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._asked_to_end)

    def _asked_to_end(self) -> None:
        if self._lifecycle.is_draining:
            _say("ending at once")
        else:
            drain_s = self._plan.limits.drain_s
            _say(f"draining, for up to {drain_s:g} s; a second signal ends at once")
        self._tell(self._lifecycle.ask_to_end)

    async def _do(self, order: Order) -> None:
        match order, self._world:
            case Order.start, _:
                await self._start()
            case Order.drain, World() as world:
                world.drain()
            case Order.terminate, World() as world:
                world.terminate()
            case Order.kill, World() as world:
                world.kill()
            case Order.sweep, world:
                await self._look_no_longer()
                if world is not None:
                    world.kill()
                self._in_background(self._sweep())
            case Order.finish, _:
                self._say_how_it_ended()

    async def _start(self) -> None:
        """Start ranks on the hosts that answer."""
        await self._close_world()
        roster, plan = self._roster, self._plan
        self._world_job = f"{self._job}-{secrets.token_hex(4)}"
        hostfile = plan.hostfile
        if roster.away:
            hostfile = self._folder / "hosts.txt"
            hostfile.write_text(roster.hostfile_text())
        arguments = without_limits_of(plan.arguments, roster.away)
        recipe = Recipe(self._world_job, roster.num_present, hostfile, arguments)
        try:
            self._require_enough(roster)
            self._world = await World.start(recipe, self._folder, self._ears(self._world_job))
            self._look_out(roster)
        except MlxDistError as error:
            _say(f"error: {error}")
            self._tell(partial(self._lifecycle.said_failed, str(error)))
            self._tell(partial(self._lifecycle.exited, 1))

    def _require_enough(self, roster: Roster) -> None:
        if roster.num_present < self._plan.roster.num_ranks and not self._plan.can_replan:
            raise MlxDistError(
                f"{', '.join(roster.away)} is away, and --layers are for "
                f"{roster.num_ranks} ranks; waiting for it, for only auto and even are cut anew"
            )

    def _look_out(self, roster: Roster) -> None:
        """Watch over ranks that have not met yet. A rank alone has nobody to meet."""
        job, lifecycle = self._world_job, self._lifecycle

        def lost(reason: str) -> None:
            self._tell(
                lambda now_s: lifecycle.lost_sight(reason, now_s) if job == self._world_job else []
            )

        if self._looks_out and roster.num_present > 1:
            hosts = list(roster.present)
            timeout_s = max(self._plan.heartbeat_timeout_s, _LEAST_LOOKOUT_S)
            self._lookout = Lookout(job, hosts, timeout_s, lost)

    async def _look_no_longer(self) -> None:
        lookout, self._lookout = self._lookout, None
        if lookout is not None:
            await lookout.close()

    def _have_met(self, _now_s: float) -> list[Order]:
        """They watch over each other from now on."""
        self._in_background(self._look_no_longer())
        return []

    async def _close_world(self) -> None:
        await self._look_no_longer()
        world, self._world = self._world, None
        upstream, self._upstream = self._upstream, None
        if world is not None:
            world.kill()
            world.close()
        if upstream is not None:
            await upstream.pool.aclose()

    def _ears(self, job: str) -> Ears:
        """What happens to the ranks of `job`, and to no earlier ones, is told to the lifecycle."""
        lifecycle = self._lifecycle

        def tell(event: Event) -> None:
            self._tell(lambda now_s: event(now_s) if job == self._world_job else [])

        def said(word: str, rest: str) -> None:
            match word:
                case Word.up:
                    tell(lambda _now_s: lifecycle.said_up())
                case Word.met:
                    tell(self._have_met)
                case Word.ready:
                    tell(partial(self._ready, rest))
                case Word.drained:
                    tell(lifecycle.said_drained)
                case Word.failed:
                    tell(partial(lifecycle.said_failed, rest))

        return Ears(
            said=said,
            lost=lambda: tell(partial(lifecycle.failed, "the first rank is gone")),
            exited=lambda code: tell(partial(lifecycle.exited, code)),
        )

    def _ready(self, rest: str, now_s: float) -> list[Order]:
        port, secret, name = rest.split(" ", 2)
        is_first = not self._lifecycle.has_served
        if self._lifecycle.phase is Phase.starting:
            self._upstream = Upstream.at(int(port), secret)
            self._gate.open(self._upstream)
            if is_first:
                _say(f"{name} is served at {self._url}")
            else:
                _say(f"serving again, after {now_s - self._failed_at_s:.1f} s")
        return self._lifecycle.said_ready(now_s)

    async def _sweep(self) -> None:
        hosts, job = self._plan.roster.hosts, self._world_job
        found = await asyncio.to_thread(sweep, job, hosts, _GRACE_S, _SWEEPS_S)
        self._tell(partial(self._swept, found))

    def _swept(self, found: Sweep, now_s: float) -> list[Order]:
        for host, fault in found.faults.items():
            _say(f"warning: {host}: {fault}")
        self._roster = self._plan.roster.without(found.unreached)
        lifecycle = self._lifecycle
        orders = lifecycle.swept(bool(self._roster.away), now_s)
        if lifecycle.phase is not Phase.over:
            wait_s = lifecycle.wait_s(now_s) if lifecycle.phase is Phase.waiting else 0
            when = f" in {wait_s:g} s" if wait_s else ""
            _say(f"the ranks failed: {lifecycle.reason}; starting them again{when}")
            if self._roster.away:
                _say(
                    f"warning: {', '.join(self._roster.away)} does not answer and is left out; "
                    f"the model is placed anew over {', '.join(self._roster.present)}"
                )
        return orders

    async def _look_for_hosts(self) -> None:
        """Take back hosts that were left out: at the next start, or as soon as nobody is served."""
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            away, is_serving = self._roster.away, self._lifecycle.phase is Phase.serving
            if not (away and is_serving):
                continue
            answers = await asyncio.to_thread(run_on_all, away, ["true"], {}, _PROBE_S)
            still = [host for host in away if answers[host].fault()]
            if len(still) < len(away) and self._lifecycle.phase is Phase.serving:
                back = ", ".join(host for host in away if host not in still)
                _say(f"{back} answers again; taking it back once no request is under way")
                self._roster = self._plan.roster.without(still)
                self._tell(self._lifecycle.renew)

    def _say_how_it_ended(self) -> None:
        lifecycle, num_left = self._lifecycle, self._gate.num_requests
        if lifecycle.is_given_up and not lifecycle.has_served:
            _say(f"the server did not come up: {lifecycle.reason}")
        elif lifecycle.is_given_up:
            _say(f"error: giving up: the ranks fail again and again; lastly: {lifecycle.reason}")
        elif num_left:
            _say(f"ended with {num_left} request{'s' if num_left > 1 else ''} not answered")


def _say(line: str) -> None:
    print(f"mlx-dist: {line}", file=sys.stderr, flush=True)
