"""Commands on other hosts, by the same ssh that mpirun uses: all at once, each with a deadline.

Knows hosts and answers; knows nothing of what is run. This machine is a host too, without ssh.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_dist.cluster.hostfile import is_this_machine
from mlx_dist.errors import LaunchError

# What mpirun reads, too.
_AGENT_VARIABLE = "PRTE_MCA_plm_ssh_agent"
CONNECTS_S = 5.0
# A shell's exit codes for what it cannot run, and ssh's own.
_NOT_THERE, _UNREACHED = (126, 127), 255
# Of what the text defines, nothing is looked for in the folder that it happens to run in.
_READ_STDIN = "import sys; sys.path[:] = [p for p in sys.path if p]; exec(sys.stdin.read({}))"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command on `host` printed and how it ended; `code` is None if it took too long.

    `ended_at` is this machine's clock when it had ended, in seconds since 1970.
    """

    host: str
    code: int | None
    out: str
    err: str
    deadline_s: float
    ended_at: float

    @property
    def is_reached(self) -> bool:
        """Whether the command was begun at all, as far as one can tell."""
        return self.code is not None and not (self.code == _UNREACHED and not self.out)

    def fault(self) -> str | None:
        """What kept the command from succeeding, or None."""
        last = ([line.strip() for line in self.err.splitlines() if line.strip()] or [""])[-1]
        if self.code == 0:
            return None
        if self.code is None:
            return f"it did not answer within {self.deadline_s:g} s"
        if self.code == _UNREACHED:
            return f"ssh does not reach it: {last or 'it does not say why'}"
        if self.code in _NOT_THERE:
            return f"it has no {python()} that runs"
        return f"a command ended with code {self.code}: {last or 'it does not say why'}"

    def json(self) -> Any:
        """The JSON in the last line; None if there is none. A shell's greeting may come before."""
        try:
            return json.loads(self.out.strip().rpartition("\n")[2])
        except ValueError:
            return None


def python() -> str:
    """This interpreter's path, at which every host must have one, for mpirun starts ranks by it."""
    return str(Path(sys.executable).absolute())


def agent() -> list[str]:
    """The command that runs things on other hosts, as in `ssh -o BatchMode=yes`."""
    # mpirun takes alternatives, the first that exists, with colons between them.
    words = shlex.split(os.environ.get(_AGENT_VARIABLE, "ssh").split(":")[0]) or ["ssh"]
    if Path(words[0]).name.startswith("ssh"):
        # It neither asks for a password nor waits for minutes.
        words += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECTS_S:g}"]
    return words


def words_for(host: str, command: Sequence[str]) -> list[str]:
    """What runs `command` on `host`."""
    if is_this_machine(host):
        return list(command)
    # As one word: ssh joins its words with spaces, and a shell takes them apart again.
    return [*agent(), host, shlex.join(command)]


def require_reached(hosts: Sequence[str]) -> None:
    """Raises LaunchError, which names them, if ssh does not reach some of `hosts`.

    mpirun would wait for minutes for one that does not answer.
    """
    answers = run_on_all(hosts, ["true"], {}, 2 * CONNECTS_S)
    faults = {host: answer.fault() for host, answer in answers.items()}
    if any(faults.values()):
        named = "; ".join(f"{host}: {fault}" for host, fault in faults.items() if fault)
        raise LaunchError(f"{named}; see that it is up and that `ssh HOST true` asks for nothing")


def run_on_all(
    hosts: Sequence[str], command: Sequence[str], stdin: Mapping[str, str], deadline_s: float
) -> dict[str, Answer]:
    """Run `command` on all `hosts` at once, each with its own text on stdin; answers by host."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = pool.map(
            lambda host: _run_on(host, command, stdin.get(host, ""), deadline_s), hosts
        )
        return dict(zip(hosts, answers, strict=True))


def call_on_all(
    module: ModuleType, function: str, arguments: Mapping[str, dict[str, Any]], deadline_s: float
) -> dict[str, Answer]:
    """Call a function of `module` on each host of `arguments`; what it returns is JSON.

    The module goes there as text, so that mlx_dist need not be there: it may import nothing else.
    """
    source = source_of(module)
    texts = {
        host: f"{source}\nimport json\nprint(json.dumps({function}(**{values!r})), flush=True)\n"
        for host, values in arguments.items()
    }
    return run_on_all(list(texts), reading_stdin(), texts, deadline_s)


def reading_stdin(num_characters: int | None = None) -> list[str]:
    """Python that runs what comes from stdin, or so much of it: no shell can get that wrong."""
    return [python(), "-c", _READ_STDIN.format(num_characters or "")]


def source_of(module: ModuleType) -> str:
    """The text of `module`, to be run on a host that may not have it."""
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _run_on(host: str, command: Sequence[str], stdin: str, deadline_s: float) -> Answer:
    words = words_for(host, command)

    def answer(code: int | None, out: str, err: str) -> Answer:
        return Answer(host, code, out, err, deadline_s, time.time())

    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            # So that a terminal's Ctrl-C does not reach it, and its children end with it.
            start_new_session=True,
        )
    except OSError as error:
        return answer(_UNREACHED, "", f"{words[0]} does not start: {error.strerror}")
    with process:
        try:
            out, err = process.communicate(stdin, timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return answer(None, "", "")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return answer(process.returncode, out, err)
