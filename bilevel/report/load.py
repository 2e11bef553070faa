"""Read run directories, whatever state they are in; no torch, no plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from bilevel.errors import UsageError
from bilevel.tracking.format import number
from bilevel.tracking.jsonl import read_metrics

__all__ = ["Run", "Standing", "find_runs", "is_run", "load_run", "load_sweep"]

_RECORDS, _SUMMARY, _CONFIG, _HPARAMS = "metrics.jsonl", "summary.json", "config.yaml", "hparams.safetensors"
_EPISODES, _EXAMPLES = "episodes.safetensors", "examples.safetensors"
_MAX_DEPTH = 4  # of a run below its sweep's folder; a sweep over paths or nested overrides makes such trees

_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"},
}


class Standing(NamedTuple):
    """What a run is judged and ranked by: its score on test tasks where it has one, else its outer loss.

    Attributes:
        name: what the figure is.
        figure: ready to print.
        where: at which step, or on what.
        rank: a number that is smaller for a better run.
    """

    name: str
    figure: str
    where: str
    rank: float


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        directory: The directory.
        records: One dict a step, as in `metrics.jsonl`.
        summary: `summary.json`, or empty when the run has not ended.
        config_text: `config.yaml` as it stands, or empty.
        config: The same, parsed.
        hparams: Final hyperparameters in natural units, or empty.
        episodes: Test tasks of a few-shot run: their sets, and outputs before and after adaptation; or empty.
        examples: Weighted training examples: weights, labels, and images of the least trusted; or empty.
    """

    directory: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    hparams: dict[str, NDArray[Any]] = field(default_factory=dict)
    episodes: dict[str, NDArray[Any]] = field(default_factory=dict)
    examples: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name, or its directory's."""
        return str(self.summary.get("name") or self.config.get("name") or self.directory.resolve().name)

    @property
    def final(self) -> dict[str, Any]:
        """The last step's record."""
        return self.records[-1] if self.records else dict(self.summary.get("final") or {})

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and outer loss of the best step: the summary's, else the smallest finite one recorded, or the latest one."""
        best = self.summary.get("best") or {}
        if is_finite(best.get("outer_loss")) and isinstance(best.get("step"), int):
            return best["step"], float(best["outer_loss"])
        losses = [(float(r["outer_loss"]), int(r["step"])) for r in self.records if is_finite(r.get("outer_loss"))]
        if not losses:
            return None
        return (min(losses) if self.is_comparable else losses[-1])[::-1]

    @property
    def is_comparable(self) -> bool:
        """Whether outer losses of different steps are those of one problem, so that one step is the best."""
        return bool(self.summary.get("comparable", self.final.get("comparable", True)))

    @property
    def standing(self) -> Standing:
        """What to look at first."""
        score = self.summary.get("evaluation")
        if score:
            own = score["inner_steps"].index(score["num_steps"])
            mean, half = score["mean"][own], score["half_width"][own]
            text = f"{number(mean)} ± {number(half, 2)}" if is_finite(half) else number(mean)
            rank = math.inf if not is_finite(mean) else -mean if score.get("higher_is_better", True) else mean
            return Standing(score["score"], text, f"on {score['num_tasks']:,} test tasks", rank)
        name = "best outer loss" if self.is_comparable else "latest outer loss"
        if self.best is None:
            return Standing(name, number(None), "no finite loss yet", math.inf)
        step, loss = self.best
        monitor = self.summary.get("monitor")
        if monitor:
            name, loss = f"best {monitor}", float(self.summary["best"][f"metrics.{monitor}"])
        return Standing(name, number(loss, 5), f"at step {step}", loss)

    @property
    def wall_seconds(self) -> float | None:
        """The summary's wall time, else the sum over the steps."""
        if is_finite(self.summary.get("wall_seconds")):
            return float(self.summary["wall_seconds"])
        seconds = [float(r["seconds"]) for r in self.records if is_finite(r.get("seconds"))]
        return sum(seconds) if seconds else None

    @property
    def num_steps_taken(self) -> int:
        """Steps on record."""
        return int(self.final.get("step", -1)) + 1

    @property
    def verdict(self) -> str:
        """Why it stopped, in words."""
        if not self.summary:
            return "killed or still running (there is no summary.json)"
        return f"stopped: {str(self.summary.get('stopped_because') or 'no reason recorded').rstrip('. ')}"

    def series(self, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Steps and values of `key` where it is a number; NaN and infinities are kept."""
        pairs = [(r["step"], float(r[key])) for r in self.records if isinstance(r.get(key), int | float)]
        values = numpy.array(pairs, dtype=float).reshape(-1, 2)
        return values[:, 0], values[:, 1]

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the records that begin with `prefix`, in order of appearance."""
        return [key for key in dict.fromkeys(key for r in self.records for key in r) if key.startswith(prefix)]


def is_finite(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_run(directory: Path) -> bool:
    """Whether `directory` is that of a run."""
    return (directory / _RECORDS).is_file() or (directory / _SUMMARY).is_file()


def find_runs(directory: Path) -> list[Path]:
    """Run directories below `directory`, in natural order (2 before 10)."""
    return sorted(_runs_below(directory, _MAX_DEPTH), key=_natural) if directory.is_dir() else []


def load_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        UsageError: It is not one, or one of its files is damaged.
    """
    if not is_run(directory):
        raise UsageError(
            f"Expected a run directory (with {_RECORDS} or {_SUMMARY}) or a folder of them, but {directory} is "
            "neither; give the folder of the `summary:` line that a run prints last."
        )
    records = [record for record in read_metrics(directory / _RECORDS) if isinstance(record.get("step"), int)]
    config_text = _text(directory / _CONFIG)
    return Run(
        directory=directory,
        records=sorted(records, key=lambda record: record["step"]),
        summary=_parse_json(directory / _SUMMARY),
        config_text=config_text,
        config=_parse_yaml(config_text),
        hparams=_read_tensors(directory / _HPARAMS),
        episodes=_read_tensors(directory / _EPISODES),
        examples=_read_tensors(directory / _EXAMPLES),
    )


def load_sweep(directory: Path) -> tuple[Path, list[Run]]:
    """Read every run below `directory`.

    Raises:
        UsageError: There is none, or one is damaged.
    """
    runs = [load_run(path) for path in find_runs(directory)]
    if not runs:
        raise UsageError(
            f"Expected a sweep, a folder of run directories (each with {_RECORDS} or {_SUMMARY}), but {directory} has "
            "none; give the folder that `experiments.train -m` made."
        )
    return directory, runs


def _runs_below(directory: Path, depth: int) -> Iterator[Path]:
    for child in directory.iterdir():
        if not child.is_dir() or child.is_symlink():
            continue
        if is_run(child):
            yield child
        elif depth > 1:
            yield from _runs_below(child, depth - 1)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse_json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise UsageError(f"Expected JSON in {path}, got {error}; remove the file to report without it.") from error
    return value if isinstance(value, dict) else {}


def _parse_yaml(text: str) -> dict[str, Any]:
    """The config as a dict; empty when it cannot be read, for the page shows the text anyway."""
    import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        return {}
    import safetensors

    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"Expected tensors in {path}, but the file is damaged ({error}); remove it to report without."
        ) from error
    arrays = ((name, _array(entry)) for name, entry in entries)
    return {name: array for name, array in sorted(arrays, key=lambda item: item[0]) if array is not None}


def _array(entry: Mapping[str, Any]) -> NDArray[Any] | None:
    """Doubles of one entry, or None for a dtype without real numbers."""
    if entry["dtype"] == "BF16":  # the upper half of a float32
        words = numpy.frombuffer(entry["data"], dtype="<u2").astype(numpy.uint32) << 16
        return words.view(numpy.float32).astype(float).reshape(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        return None
    return numpy.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]]).astype(float).reshape(entry["shape"])
