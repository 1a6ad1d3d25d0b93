"""Runs a campaign of faults against a supervised server, and says what became of everything.

    python -m benchmarks.faults [--num 100] [--seed S] [--here] [--faults kill,segv,stop,...]
        [--minutes M] [--streams 16] [--heartbeat-timeout-s 5] [--json FILE] [--write-docs]
    python -m benchmarks.faults --from FILE [--write-docs]

Each trial starts a server of three ranks on three hosts of the tests' lab (--here: on this
machine), keeps its streams busy, does one fault at a random moment of a random phase to a
random target, and looks until the server is ready again, its clients have their answers, and all of
it is ended. Every answer is compared with that of an undisturbed run; one that differs must be what
one process could have said but for rounding. Needs root for the lab.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.faults.deck import Fault, draw
from benchmarks.faults.results import Result, line, not_reached, summary, table
from benchmarks.faults.site import Site, site_in
from benchmarks.faults.trial import NotUpError, Terms, Trial
from benchmarks.faults.undisturbed import undisturbed
from benchmarks.pages import put

_BATCHING = "fixed:3,8,64"
_MOST_PRINTED = 500
_COMMAND = "python -m benchmarks.faults --write-docs"


def campaign(options: argparse.Namespace, site: Site) -> list[Result]:
    """All trials; each is printed, and added to the file, as it ends."""
    timeout_s = options.heartbeat_timeout_s
    flags = ("--heartbeat-timeout-s", f"{timeout_s:g}", "--batching", _BATCHING)
    load, load_s = undisturbed(site, flags, options.streams)
    terms = Terms(flags, timeout_s, load_s)
    print(f"a start takes {load_s:.1f} s; there are {len(load.due)} requests", flush=True)
    cases = draw(options.num, options.seed, options.faults, site.has_lab)
    end_s = time.monotonic() + 60 * options.minutes
    results: list[Result] = []
    for number, case in enumerate(cases, 1):
        if time.monotonic() > end_s:
            print(f"the time is up after {len(results)} trials")
            break
        log = options.logs / f"{number:03}-{str(case).replace(' ', '-')}.log"
        try:
            result = Trial(site, case, load, terms, log).run()
        except NotUpError as error:
            result = Result(case, timeout_s, load_s, hung=f"it was not up: {error}"[:500])
        results.append(result)
        print(f"{number} {line(result)}", flush=True)
        for oddity in result.oddities + result.left:
            print(f"    {oddity[:_MOST_PRINTED]}", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(result.to_json() + "\n")
    return results


def report(results: list[Result]) -> str:
    """Markdown of all that the trials showed."""
    return f"{summary(results)}\n\n{table(results)}\n\nNot as promised:\n\n{not_reached(results)}"


def _faults(text: str) -> list[Fault]:
    try:
        return [Fault(name) for name in text.split(",")]
    except ValueError as error:
        known = ",".join(fault.value for fault in Fault)
        raise argparse.ArgumentTypeError(f"{error}; use some of {known}") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=100, help="trials")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no trial after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=_faults, default=list(Fault))
    parser.add_argument("--here", action="store_true", help="without hosts")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--heartbeat-timeout-s", type=float, default=5.0)
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    parser.add_argument("--json", type=Path, help="add each result to this file")
    parser.add_argument("--from", type=Path, dest="read", help="only tell of results in this file")
    parser.add_argument("--write-docs", action="store_true", help="into docs/reliability.md")
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.read:
        lines = options.read.read_text().splitlines()
        results = [Result.from_json(text) for text in lines]
    else:
        with tempfile.TemporaryDirectory(prefix="f") as name:
            folder = Path(name)
            options.logs = options.logs or folder
            options.logs.mkdir(parents=True, exist_ok=True)
            with site_in(folder, not options.here) as site:
                results = campaign(options, site)
    text = report(results)
    print(text)
    if options.write_docs:
        put("reliability.md", "faults", _COMMAND, text)


if __name__ == "__main__":
    main()
