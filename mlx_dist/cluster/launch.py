"""Starting ranks: from `-n 3` on the command line to a process under mpirun.

Knows command lines and environments; knows no MPI.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mlx_dist.cluster import jobs, mpi
from mlx_dist.cluster.hostfile import read_hosts
from mlx_dist.cluster.remote import require_reached
from mlx_dist.errors import ConfigError, LaunchError

MAX_RANKS = 64
# mpirun gives ranks on other hosts only the variables it is told to.
_FORWARDED = ("MLX_", "HF_", "OPENBLAS_", "OMP_", "BLIS_", "MKL_")
# What these name is true on this host only.
LOCAL_VARIABLES = {
    "MLX_DIST_ADDRESS",
    "MLX_DIST_SUPERVISOR",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_MPI_LIBNAME",
    "MLX_RANK",
}


def under_a_launcher() -> bool:
    """Whether this process is already a rank that mpirun or mlx.launch started."""
    return mpi.launched_by_mpirun() or "MLX_RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process is the rank that speaks for all, before it has met the others."""
    return os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("MLX_RANK", "0")) == "0"


def launched_size() -> int:
    """The number of ranks that the launcher of this process started."""
    return mpi.world_size() or len(_ring_ips()) or 1


def ranks_on_this_host() -> int:
    """How many ranks share this host's cores, as far as the launcher tells."""
    if mpi.launched_by_mpirun():
        return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    ips = _ring_ips()
    return ips.count(ips[int(os.environ["MLX_RANK"])]) if ips else 1


def _ring_ips() -> list[str]:
    """Every rank's address in the host list that mlx.launch gives to ranks of a ring."""
    hostfile = os.environ.get("MLX_HOSTFILE")
    if "MLX_RANK" not in os.environ or not hostfile:
        return []
    try:
        hosts = json.loads(Path(hostfile).read_bytes())
        return [addresses[0].rsplit(":", 1)[0] for addresses in hosts]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"MLX_HOSTFILE={hostfile} is no list of hosts ({error}); unset MLX_RANK to start "
            "without mlx.launch"
        ) from None


def threads_per_rank() -> int:
    """This host's cores divided by its ranks: more BLAS threads than that slow each other."""
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return max(1, num_cores // ranks_on_this_host())


def mpirun_command(
    num_ranks: int,
    hostfile: Path | None,
    python: list[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """The command that runs this Python with the arguments `python` on `num_ranks` ranks.

    `environ` is what it will be started with. Raises ConfigError for a count or a hostfile that
    cannot be, WorldError without an mpirun.
    """
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ConfigError(f"-n {num_ranks} is not between 1 and {MAX_RANKS}")
    mpirun, _ = mpi.installation()
    command = [str(mpirun), "-np", str(num_ranks), "--bind-to", "none"]
    # Else mpirun holds streamed text back until its line is full.
    command += ["--output", ":raw"]
    if hostfile is None:
        command += ["--map-by", ":OVERSUBSCRIBE"]
    elif hostfile.is_file():
        command += ["--hostfile", str(hostfile.absolute())]
    else:
        raise ConfigError(f"--hostfile {hostfile} is no file; see hostfile.txt for an example")
    # A waiting rank must leave its core to one that computes.
    command += ["--mca", "mpi_yield_when_idle", "1"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    for name in sorted(environ):
        if name.startswith(_FORWARDED) and name not in LOCAL_VARIABLES:
            command += ["-x", name]
    # By absolute path: a bare name is looked up on the other host with another PATH.
    interpreter = str(Path(sys.executable).absolute())
    return [*command, interpreter, *job_option(environ), *_without_colons(python)]


def job_option(environ: Mapping[str, str]) -> list[str]:
    """Puts the id of a job that has one into its ranks' command lines, where `ps` shows it."""
    job = environ.get(jobs.VARIABLES[0])
    return ["-X", f"{jobs.OPTION}={job}"] if job else []


def _without_colons(arguments: list[str]) -> list[str]:
    """`arguments` in which a value ":" is tied to its option: mpirun takes it for a border."""
    tied: list[str] = []
    for argument in arguments:
        if argument == ":" and tied and tied[-1].startswith("--"):
            tied[-1] += "=:"
        else:
            tied.append(argument)
    return tied


def note_terminal() -> None:
    """Let ranks know that a person watches: under mpirun their stderr is a pipe."""
    if sys.stderr.isatty():
        os.environ["MLX_DIST_TERMINAL_WIDTH"] = str(shutil.get_terminal_size().columns)


def relaunch(num_ranks: int, hostfile: Path | None, arguments: list[str]) -> NoReturn:
    """Become mpirun with `num_ranks` ranks of this program. Does not return.

    Raises ConfigError or LaunchError for what cannot be started, naming a host out of reach.
    """
    note_terminal()
    command = mpirun_command(num_ranks, hostfile, ["-m", "mlx_dist", *arguments])
    if hostfile is not None:
        # mpirun waits for minutes for a host that is not there.
        require_reached(read_hosts(hostfile))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise LaunchError(f"{command[0]} does not start: {error}") from None
