"""Who is silent and who is stuck: the judgement on beats. Pure: knows no threads and no clock.

Every rank measures what its own work takes (`Pace`) and says with each beat what it is doing, for
how long, and how long that may take. The leader judges (`Vigil`); the others only see that the
leader is still there (`Lease`). Times are seconds of any clock that runs evenly.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_dist.messages import Beat, State

# A step may take this many times the longest of its size that was seen.
_MULTIPLE = 20
# Before so much work was seen nothing is expected of it: kernels are compiled, memory is touched.
_NUM_FIRST = 3
_FIRST_S = 600.0
# Between two tensors, which may be a layer's experts from a slow disk.
_LOADING_S = 600.0
# The least that work may take, in heartbeat timeouts: the swapping and compiling of a bad moment.
_FLOOR_TIMEOUTS = 4
_TICKS_FORGIVEN = 2


class Pace:
    """What one rank's work takes by its size in tokens, and so how long such work may take."""

    def __init__(self, timeout_s: float) -> None:
        self._floor_s = _FLOOR_TIMEOUTS * timeout_s
        self._num_seen = 0
        # By the number of binary digits of the size.
        self._longest_s: dict[int, float] = {}

    def took(self, size: int, work_s: float) -> None:
        """Take note of work that is done."""
        self._num_seen += 1
        digits = size.bit_length()
        self._longest_s[digits] = max(work_s, self._longest_s.get(digits, 0.0))

    def patience_s(self, size: int) -> float:
        """How long work of `size` may take before something must be wrong.

        Of a size that was never seen: as long as a larger one, or as a smaller one in proportion.
        """
        if self._num_seen < _NUM_FIRST:
            return max(_FIRST_S, self._floor_s)
        digits = size.bit_length()
        larger = [seen for seen in self._longest_s if seen >= digits]
        if larger:
            expected_s = self._longest_s[min(larger)]
        else:
            nearest = max(self._longest_s)
            expected_s = self._longest_s[nearest] * 2.0 ** (digits - nearest)
        return max(self._floor_s, _MULTIPLE * expected_s)

    def loading_s(self) -> float:
        """How long nothing may be read while a rank loads."""
        return max(_LOADING_S, self._floor_s)


class _Attention:
    """A clock that stands still while nobody looks at it.

    Who was frozen, or got no processor, has not heard what came meanwhile: that time is no silence.
    """

    def __init__(self, tick_s: float, now_s: float) -> None:
        self._most_s = _TICKS_FORGIVEN * tick_s
        self._looked_s = now_s
        self.s = 0.0

    def look(self, now_s: float) -> None:
        self.s += min(now_s - self._looked_s, self._most_s)
        self._looked_s = now_s


class Lease:
    """How long a rank goes on without a word from the leader, which looks every `tick_s`."""

    def __init__(self, timeout_s: float, tick_s: float, now_s: float) -> None:
        self._clock = _Attention(tick_s, now_s)
        # The leader is first to say who is missing.
        self._lease_s = timeout_s + tick_s
        self._renewed_s = 0.0

    def look(self, now_s: float) -> None:
        """It is `now_s`, and what has come is about to be heard."""
        self._clock.look(now_s)

    def renew(self) -> None:
        """The leader was heard."""
        self._renewed_s = self._clock.s

    def silence_s(self) -> float | None:
        """Seconds without a word from the leader if they are too many."""
        silent_s = self._clock.s - self._renewed_s
        return silent_s if silent_s > self._lease_s else None


class Vigil:
    """The leader's judgement on every rank, itself included, by the beats it has heard."""

    def __init__(self, hosts: Sequence[str], timeout_s: float, tick_s: float, now_s: float) -> None:
        self._hosts = hosts
        self._timeout_s = timeout_s
        self._clock = _Attention(tick_s, now_s)
        self._heard_s = [0.0] * len(hosts)
        self._beats = [Beat(State.starting)] * len(hosts)
        self._moved_s = 0.0

    def look(self, now_s: float) -> None:
        """It is `now_s`, and what has come is about to be heard."""
        self._clock.look(now_s)

    def hear(self, rank: int, beat: Beat) -> None:
        """Take note of a beat that has come."""
        if beat.count != self._beats[rank].count:
            self._moved_s = self._clock.s
        self._heard_s[rank] = self._clock.s
        self._beats[rank] = beat

    def verdict(self) -> str | None:
        """Why the job cannot go on: who is silent or stuck, for how long, doing what. Else None."""
        return self._silent() or self._stuck() or self._deadlocked()

    def _silent(self) -> str | None:
        silent = [
            f"{self._name(rank)} is silent for {silent_s:.1f} s; last it was {self._doing(rank)}"
            for rank, heard_s in enumerate(self._heard_s)
            if (silent_s := self._clock.s - heard_s) > self._timeout_s
            and self._beats[rank].state is not State.leaving
        ]
        if not silent:
            return None
        remedy = "see whether its process runs, its host is up and reaches this one"
        return f"{'; '.join(silent)}; {remedy}"

    def _stuck(self) -> str | None:
        stuck = [
            f"{self._name(rank)} is stuck: {self._doing(rank)} for {beat.for_s:.1f} s, and "
            f"{beat.patience_s:.1f} s at most were expected"
            for rank, beat in enumerate(self._beats)
            if beat.state in (State.computing, State.loading) and beat.for_s > beat.patience_s
        ]
        return "; ".join(stuck) or None

    def _deadlocked(self) -> str | None:
        """Where ranks wait for each other, nobody computes and nothing moves."""
        states = {beat.state for beat in self._beats}
        if State.waiting not in states or states & {State.computing, State.loading}:
            return None
        waiting = [beat for beat in self._beats if beat.state is State.waiting]
        still_s = self._clock.s - self._moved_s
        if still_s <= max(beat.patience_s for beat in waiting):
            return None
        ranks = ", ".join(
            f"{self._name(rank)} is {self._doing(rank)}" for rank in range(len(self._hosts))
        )
        return f"no step has gone forward for {still_s:.1f} s and nobody computes: {ranks}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"

    def _doing(self, rank: int) -> str:
        beat = self._beats[rank]
        return f"{beat.state} ({beat.doing})" if beat.doing else str(beat.state)
