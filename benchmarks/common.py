"""What every benchmark shares: fair timing, one table, claims that are judged, the machine, and the JSON file.

A benchmark ends with its claims, one a line, and exits with status 1 when one is missed. `--quick` runs a smaller
version that shows that everything works; its figures are printed and its claims are not judged.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.cli.composer import composer, resolve
from bilevel.cli.job import Parts, assemble
from bilevel.jsonable import encode

Row = dict[str, Any]
PAUSE = 0.1  # seconds between two timings: lets the idle threads of one library stop spinning before the next one runs
AWAKE = (
    0.2  # seconds of untimed calls after it: a processor of a virtual machine that has slept takes some 10 ms to wake
)


@dataclass(frozen=True)
class Claim:
    """A figure that must not exceed its target, or not fall below it.

    Attributes:
        name: what is claimed, in a few words.
        figure: as measured in this run; None when it could not be (a peer is not installed).
        target: the largest figure that meets it, or the smallest.
        at_least: the target is the smallest figure that meets it.

    Example:
        >>> print(Claim("product of the MLP, in gradients", 1.62, 2.0))
        claim product of the MLP, in gradients: 1.62 (target at most 2): met
    """

    name: str
    figure: float | None
    target: float
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the figure keeps to the target (NaN never does); None when there is no figure."""
        if self.figure is None:
            return None
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        figure = "" if self.figure is None else f"{self.figure:.3g} "
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"claim {self.name}: {figure}(target {bound} {self.target:.3g}): {verdict}"


def parse(
    description: str,
    argv: Sequence[str] | None = None,
    *,
    device: bool = True,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.Namespace:
    """The options that all benchmarks have.

    Args:
        description: the first line of the help.
        argv: arguments instead of the command line's.
        device: whether the benchmark can run elsewhere than on the CPU.
        parents: parsers of options that a benchmark has besides.
    """
    parser = argparse.ArgumentParser(description=description, parents=list(parents))
    parser.add_argument("--quick", action="store_true", help="a smaller version for CI; claims are not judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write claims, rows and machine to FILE")
    if device:
        parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    options = parser.parse_args(argv)
    options.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if options.load > 0.5 and not options.quick:
        print(f"note: other jobs use this machine (load {options.load:.1f}); timings need an idle one", file=sys.stderr)
    if options.quick:
        torch.set_num_threads(
            1
        )  # small work is slower on several threads, and far slower where other jobs want them too
    return options


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    device: str = "cpu",
    pause: float = PAUSE,
    awake: float = AWAKE,
) -> dict[str, float]:
    """Median seconds of each function; every round runs all of them, so that drift of the machine hits all alike.

    In a round each function is called until `awake` seconds have passed, and its last call counts: the only one, where it
    takes longer.

    Args:
        functions: what to time, by name; each is called once beforehand (compilation, caches).
        rounds: timed calls of each.
        device: synchronised before each reading of the clock when it is a CUDA device.
        pause: seconds of rest before each function's turn.
        awake: seconds that each turn takes at least.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(pause)
            wait()
            begin = end = time.perf_counter()
            while end == begin or end < begin + awake:
                start = end
                function()
                wait()
                end = time.perf_counter()
            seconds[name].append(end - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_fresh_processes(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of a module's function in so many processes, one after the other, each new and alone.

    Where a process happens to have its tensors in memory stays for its life, and moves its times by several per cent.

    Args:
        number: of processes.
        function: called once in each.
        args: of the function; they and the result can be pickled.
    """
    results = []
    for _ in range(number):
        with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as process:
            results.append(process.apply(function, args))
    return results


class Timed(NamedTuple):
    """What `in_turns` measured of one function, in seconds.

    Attributes:
        first: the first call of each process.
        turns: a later call in each turn; those of the same number were made one after the other.
    """

    first: list[float]
    turns: list[float]


def in_turns(
    names: Sequence[str],
    make: Callable[..., Callable[[], Any]],
    *args: Any,
    rounds: int,
    turns: int,
    device: str = "cpu",
    pause: float = PAUSE,
) -> dict[str, Timed]:
    """Times of several functions, each in processes of its own, which are all there at once and called in turns.

    A virtual machine's processors have states that last for seconds or minutes and make everything a quarter slower: compare
    times of the same turn. Where a process has its tensors in memory lasts for its life: there are several rounds of processes.

    Args:
        names: of the functions.
        make: a module's function, `(name, *args) -> function`, called in the process.
        args: of `make`; they can be pickled.
        rounds: processes of each function, one after the other.
        turns: timed calls in each, after the first call and one that wakes the processors each time.
        device: synchronised before each reading of the clock when it is a CUDA device.
        pause: seconds of rest before each function's turn.
    """
    found = {name: Timed([], []) for name in names}
    for _ in range(rounds):
        with ExitStack() as stack:
            processes = {}
            for name in names:
                spawn = multiprocessing.get_context("spawn")
                processes[name] = stack.enter_context(spawn.Pool(1, torch.set_num_threads, [torch.get_num_threads()]))
                found[name].first.append(processes[name].apply(_begin, (make, name, args, device)))
            for _ in range(turns):
                for name, process in processes.items():
                    time.sleep(pause)
                    found[name].turns.append(process.apply(_call, (device,)))
    return found


_functions: list[Callable[[], Any]] = []  # the one of a process of `in_turns`


def _begin(make: Callable[..., Callable[[], Any]], name: str, args: tuple[Any, ...], device: str) -> float:
    """Make the function of this process, and time its first call."""
    _functions.append(make(name, *args))
    return _seconds(_functions[0], device)


def _call(device: str) -> float:
    """Seconds of a call after another one."""
    _functions[0]()
    return _seconds(_functions[0], device)


def _seconds(function: Callable[[], Any], device: str) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for a single operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def experiment_parts(name: str, *keys: str) -> Parts:
    """The objects of a shipped experiment, untracked, with changes as on its command line."""
    with composer() as compose:
        config = resolve(compose.compose([f"experiment={name}", "tracking=none", *keys]))
    return assemble(config, torch.device("cpu"), getattr(torch, config["dtype"]))


def machine(device: str = "cpu") -> Row:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = (line.partition(":") for line in lines)
    values = {key.strip(): value.strip() for key, _, value in reversed(list(fields))}
    return (
        f"{values.get('model name', platform.machine())} (family {values.get('cpu family', '?')}, "
        f"model {values.get('model', '?')})"
    )


def relative_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of the other one."""
    first, second = (torch.cat([value[name].flatten() for name in one]) for value in (one, other))
    return float((first - second).norm() / second.norm())


def table(rows: Sequence[Row]) -> str:
    """Rows as text, columns in order of appearance, numbers with three figures.

    Example:
        >>> print(table([{"what": "ours", "ms": 41.96}, {"what": "theirs", "ms": 72.5, "note": "1.7 x"}]))
        what    ms    note
        ours    42
        theirs  72.5  1.7 x
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def finish(
    options: argparse.Namespace, rows: Sequence[Row], claims: Sequence[Claim], facts: Mapping[str, Any] | None = None
) -> int:
    """Print the claims, write the JSON file if one was asked for, and return the exit status.

    Args:
        options: from `parse`.
        rows: the table, already printed.
        claims: judged unless `--quick` was given.
        facts: further entries for the JSON file, for instance the versions of other libraries.
    """
    print()
    if options.quick:
        print("claims are not judged with --quick")
        claims = []
    for claim in claims:
        print(claim)
    if options.json is not None:
        judged = [{**asdict(claim), "met": claim.met} for claim in claims]
        content = {
            "claims": judged,
            "rows": list(rows),
            "machine": {**machine(getattr(options, "device", "cpu")), "load at the start": options.load},
            **(facts or {}),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(encode(content), indent=2, allow_nan=False) + "\n")
    return 1 if any(claim.met is False for claim in claims) else 0
