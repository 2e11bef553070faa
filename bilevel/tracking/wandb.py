"""Weights & Biases: offline by default, never in the way of the run.

The client talks to a service process of its own. When that dies, every later call raises, its exit hook prints a
traceback and a stopped service blocks for ever; so each call is guarded, and those that wait have a time limit.
Steps are logged as our own `step`, because wandb's counter starts again from zero when an offline run is resumed.
"""

from __future__ import annotations

import difflib
import math
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import UsageError
from bilevel.tracking.format import baseline_table
from bilevel.tracking.guard import GuardedTracker

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["WandbTracker"]

MODES = ("offline", "online", "disabled")
INIT_SECONDS, FINISH_SECONDS, TEARDOWN_SECONDS = 20, 60, 5
NUM_BINS = 64


class WandbTracker(GuardedTracker):
    """Log a run to Weights & Biases, in the run directory's `wandb` folder.

    Offline mode leaves a folder `wandb/offline-run-*` for `wandb sync`. A resumed run keeps its id, so that syncing
    both folders appends to one run there. The keys are those of `metrics.jsonl` with slashes for dots; tensors of
    hyperparameters are histograms, in natural units and, where all values are positive, of log10 as well.

    Args:
        project: Project in wandb.
        mode: "offline", "online" (needs an API key and a network), or "disabled" (does nothing, imports nothing).
        entity: Team or user; None for the key's default.
        group: Group that the run belongs to, for instance a sweep; None for none.
        name: Name shown in wandb; None takes the config's `name`, if any.
        tags: Tags of the run.
        histograms_every: Steps between histograms of hyperparameters; 0 for none.

    Raises:
        UsageError: `mode` is none of the three or `histograms_every` is negative.

    Reference:
        https://docs.wandb.ai/models/ref/python
    """

    name = "wandb"

    def __init__(
        self,
        project: str = "bilevel",
        mode: str = "offline",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: tuple[str, ...] | list[str] = (),
        histograms_every: int = 10,
    ) -> None:
        """Check the options; wandb itself is met at `start`."""
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "'offline' needs no network."
            raise UsageError(f"Expected the wandb mode to be one of {', '.join(MODES)}, got {mode!r}; {hint}")
        if histograms_every < 0:
            raise UsageError(f"Expected histograms_every >= 0 (0 for none), got {histograms_every}; try 10.")
        self.project, self.entity, self.group = project, entity, group
        self.mode: Any = mode  # one of MODES, which wandb types as a Literal
        self.run_name, self.tags, self.histograms_every = name, tuple(tags), histograms_every
        self._wandb: Any = None
        self._run: Any = None

    def start(self, run: RunStart) -> None:
        """Open the run in wandb."""
        if self.mode == "disabled":
            return
        import wandb  # here and nowhere else: it is optional, and importing it takes half a second

        self._wandb = wandb
        if self.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key: use `wandb login` once, or tracking.mode=offline and `wandb sync` later")
        run_id = _run_id(run.directory, run.step)
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.run_name or run.config.get("name"),
            tags=self.tags or None,
            config=dict(run.config),
            dir=None if run.directory is None else str(run.directory),
            id=run_id,
            # Offline there is nothing to resume from: wandb would only warn. The id alone joins the parts at sync.
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Log one step."""
        if self._run is None:
            return
        row = {key.replace(".", "/"): value for key, value in record.items() if value is not None}
        step, last = record.get("step", 0), record.get("num_steps", 0) - 1
        if self.histograms_every and (step % self.histograms_every == 0 or step == last):
            row |= self._histograms(hparams)
        self._run.log(row)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the run, waiting a minute at most."""
        if self._run is None:
            return
        table = baseline_table(summary)
        if table is not None:
            rows = [list(row) for row in table.rows]
            self._run.log({"baseline": self._wandb.Table(columns=list(table.columns), data=rows)})
        self._run.summary.update({key: value for key, value in summary.items() if key not in ("final", "baseline")})
        _within(FINISH_SECONDS, self._run.finish)
        self._run = None

    def abandon(self) -> None:
        """Forget the service process, and with it the exit hook that would print a traceback or wait for it."""
        self._run = None
        if self._wandb is not None:
            _within(TEARDOWN_SECONDS, self._wandb.teardown)

    def _histograms(self, hparams: Mapping[str, Tensor]) -> dict[str, Any]:
        import numpy

        rows = {}
        for name, tensor in hparams.items():
            values = tensor.detach().double().cpu().numpy().ravel()
            if values.size < 2 or not numpy.isfinite(values).all():
                continue
            scales = {"hparams": values} | ({"hparams_log10": numpy.log10(values)} if (values > 0).all() else {})
            for prefix, shown in scales.items():
                histogram = numpy.histogram(shown, bins=NUM_BINS)
                rows[f"{prefix}/{name.replace('.', '/')}"] = self._wandb.Histogram(np_histogram=histogram)
        return rows


def _run_id(directory: Path | None, step: int) -> str:
    """A new id, or when the run is resumed the one that it had."""
    if directory is None:
        return secrets.token_hex(4)
    file = Path(directory) / "wandb" / "run_id.txt"
    if step > 0 and file.exists() and file.read_text().strip():
        return file.read_text().strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Call, and wait `seconds` at most; what the call raises is raised here."""
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"wandb did not answer within {math.ceil(seconds)} seconds")
    if errors:
        raise errors[0]
