"""A run directory in any state becomes one self-contained page; anything else is refused in a sentence."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from bilevel.errors import UsageError
from bilevel.report import report, write_report, write_sweep_report
from bilevel.report.figures import plates
from bilevel.report.load import find_runs, load_run
from bilevel.report.style import LIGHT, is_log_worthy
from bilevel.report.sweep import differences


def make_record(step: int, num_steps: int, scale: float = 1.0) -> dict[str, Any]:
    return {
        "step": step,
        "num_steps": num_steps,
        "outer_loss": scale / (1 + step),
        "inner_loss": 0.5 + step,
        "hypergradient_norm": 0.1,
        "seconds": 0.25,
        "skipped": step == 1,
        "shrunk": step >= 2,
        "receipt.linear_residual": 1e-8,
        "receipt.stationarity": 1e-9,
        "receipt.products": 10,
        "receipt.biased": step == 0,
        "receipt.linear_result": "converged <ok>",
        "metrics.test_loss": 0.3,
        "hparams.temperature": 1.5,
        "hparams.penalty.weight.min": 1e-4,
        "hparams.penalty.weight.median": 1e-2,
        "hparams.penalty.weight.max": 1.0,
        "hparams.min": 0.5,  # a hyperparameter that is called min
    }


def make_run(folder: Path, num_steps: int = 4, scale: float = 1.0, ended: bool = True, lr: float = 0.1) -> Path:
    folder.mkdir(parents=True)
    records = [make_record(step, num_steps, scale) for step in range(num_steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = f"name: <digits>\nouter_optimizer:\n  _target_: torch.optim.Adam\n  lr: {lr}\nseed: 0\n"
    (folder / "config.yaml").write_text(config)
    if ended:
        summary = {
            "name": "digits & co",
            "stopped_because": "every step was taken",
            "best": {"step": num_steps - 1, "outer_loss": scale / num_steps},
            "final": records[-1],
            "wall_seconds": 75.0,
            "peak_memory_mib": 300.5,
            "versions": {"torch": "2.13.0"},
            "num_threads": 2,
            "baseline": {"name": "a grid", "columns": ["outer loss"], "rows": [["best <of> 100", 0.75]]},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        save_file(
            {"penalty.weight": torch.rand(3, 64) + 0.1, "b": torch.ones(4).bfloat16()}, folder / "hparams.safetensors"
        )
    return folder


class Page(HTMLParser):
    """What a browser would load, show and leave open."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def test_a_run_becomes_one_self_contained_page(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    assert "prefers-color-scheme: dark" in path.read_text()
    for words in (
        *("digits & co", "stopped: every step was taken", "best outer loss 0.25000 at step 3", "outer steps 4"),
        *("wall time 1:15", "peak memory 300 MiB", "products 40", "Beside a grid", "best <of> 100 0.7500"),
        *("digits & co (this run) 0.2500", "1 of 4 steps was biased", "At step 1, crossed out", "converged <ok>"),
        "At 2 steps, marked by a triangle, the hypergradient was all error by its estimate and was shrunk",
        *("_target_: torch.optim.Adam", "torch 2.13.0", "2 threads"),
    ):
        assert words in page.text, words
    names = sorted(figure.name for figure in (tmp_path / "run" / "figures").iterdir())
    assert names == [
        *("histograms.png", "hparams.png", "image_penalty.weight.png", "losses.png", "metrics.png", "receipts.png")
    ]
    assert page.tags.count("figure") == len(names) and page.tags.count("img") == len(names)


def test_a_killed_run_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ended=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "outer_l')
    text = Page(write_report(run)).text
    assert "killed or still running" in text and "best outer loss 0.25000 at step 3" in text
    assert "wall time 1.0 s" in text and "outer steps 4 of 4 planned" in text


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0}],
        [{"step": 0, "outer_loss": "NaN", "inner_loss": None, "receipt.products": None}],
        [{"step": s, "outer_loss": "Infinity" if s else 1.0, "hparams.p.min": None, "hparams.p.median": "NaN",
          "hparams.p.max": 2.0, "receipt.linear_residual": 0.0, "receipt.biased": None} for s in range(3)],
        [{"step": s, "outer_loss": -1.0, "hparams.x": 0.0, "receipt.products": 0} for s in (0, 5)],
        [make_record(0, 1)],
    ],
    ids=["none", "bare", "nan", "holes", "gaps", "one step"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_whatever_was_recorded_has_a_report(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Page(report(tmp_path))


@pytest.mark.filterwarnings("error")
def test_odd_hyperparameters_have_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    tensors = {
        "nan": torch.full((16,), math.nan),
        "some nan": torch.tensor([math.nan] + [1.0] * 24),
        "constant": torch.zeros(2, 16),
        "empty": torch.ones(0, 16),
        "scalar": torch.ones(()),
        "whole": torch.arange(36),
        "slash/../name": torch.rand(16),
        "complex": torch.ones(16, dtype=torch.complex64),
        "tiny spread": 1.0 + 1e-16 * torch.rand(50, dtype=torch.float64),
        "huge": torch.tensor([1e200, 1e-200, 1.0, 5.0], dtype=torch.float64),
    }
    save_file(tensors, run / "hparams.safetensors")
    Page(write_report(run))
    images = [plate.name for plate in plates(load_run(run)) if plate.name.startswith("image_")]
    assert images == ["image_constant", "image_slash_.._name", "image_some_nan", "image_whole"]


def test_bfloat16_hyperparameters_are_read_without_torch(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.5, 1e30]).bfloat16()
    save_file({"x": values}, make_run(tmp_path / "run") / "hparams.safetensors")
    assert numpy.array_equal(load_run(tmp_path / "run").hparams["x"], values.double().numpy())


def test_torch_and_pyplot_are_not_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=1)
    code = (
        f"import sys; from bilevel.report import report; report({str(run)!r}); "
        "sys.exit(', '.join({'torch', 'matplotlib.pyplot', 'wandb'} & set(sys.modules)) or None)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def make_sweep(root: Path) -> Path:
    make_run(root / "10", scale=3.0, lr=0.3)
    make_run(root / "2", scale=2.0, lr=0.2, ended=False)
    make_run(root / "1" / "nested", scale=4.0, lr=0.4)
    (root / "2" / "checkpoints").mkdir()
    return root


def test_a_sweep_is_ranked_with_what_differs(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep")
    write_report(sweep / "10")
    page = Page(report(sweep))
    assert "best outer loss 0.50000 run 2" in page.text and "runs 3 2 of them ended" in page.text
    board = page.text[page.text.index("Leaderboard") : page.text.index("Figure 1.")]
    assert "outer_optimizer.lr" in board and "seed" not in board
    places = [board.index(words) for words in ("2 0.2 0.50000", "10 0.3 0.75000", "1/nested 0.4 1.0000 ")]
    assert places == sorted(places) and "killed or running" in board
    links = [source for source in page.sources if not source.startswith("data:")]
    assert links == ["10/report.html"]
    assert (sweep / "figures" / "curves.png").is_file()


def scored(folder: Path, accuracy: float, higher: bool = True) -> Path:
    """A few-shot run: the outer losses of its steps are those of different tasks, and test tasks have a score."""
    run = make_run(folder)
    summary = json.loads((run / "summary.json").read_text())
    mean, half = [0.2, accuracy, 0.1], [0.0, 0.003, 0.01]
    evaluation = {**EVALUATION, "higher_is_better": higher, "num_tasks": 1000, "mean": mean, "half_width": half}
    (run / "summary.json").write_text(json.dumps({**summary, "comparable": False, "evaluation": evaluation}))
    return run


def test_a_few_shot_run_is_judged_by_its_test_tasks(tmp_path: Path) -> None:
    page = Page(report(scored(tmp_path / "sweep" / "1", 0.9)))
    assert "accuracy 0.9000 ± 0.0030 on 1,000 test tasks" in page.text
    assert (
        "best outer loss" not in page.text
        and "the best step" not in page.text
        and "each step's on tasks or a minibatch of its own" in page.text
    )
    scored(tmp_path / "sweep" / "2", 0.95)
    board = Page(write_sweep_report(tmp_path / "sweep")).text
    assert "ranked by the accuracy of each run" in board and board.index("2 0.9500") < board.index("1 0.9000")
    for name, mse in (("1", 0.4), ("2", 0.3)):
        scored(tmp_path / "errors" / name, mse, higher=False)
    errors = Page(write_sweep_report(tmp_path / "errors")).text
    assert errors.index("2 0.3000") < errors.index("1 0.4000")


def test_a_running_few_shot_run_has_a_latest_step_and_no_best_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "1", ended=False)
    assert load_run(run).best == (3, 0.25) and load_run(run).standing.name == "best outer loss"
    records = [
        {**make_record(step, 4), "outer_loss": loss, "comparable": False} for step, loss in enumerate((0.1, 0.3))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = load_run(run)
    assert found.best == (1, 0.3) and found.standing.name == "latest outer loss"


def test_a_sweep_without_a_finite_loss_has_a_page(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "outer_loss": "NaN"}\n')
    assert "no finite loss yet" in Page(write_sweep_report(tmp_path)).text


def test_runs_are_found_in_natural_order(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep")
    assert [str(path.relative_to(sweep)) for path in find_runs(sweep)] == ["1/nested", "2", "10"]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_swapped_group_stands_for_its_options() -> None:
    configs = [
        {"method": {"_target_": "bilevel.A", "x": 1}, "seed": 0, "run_dir": "/a", "lr": 1},
        {"method": {"_target_": "bilevel.B", "y": 2}, "seed": 0, "run_dir": "/b", "lr": 2},
    ]
    assert differences(configs) == {"method._target_": ["bilevel.A", "bilevel.B"], "lr": [1, 2]}


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        for write in (report, write_report):
            with pytest.raises(UsageError, match=f"{path} is neither; give the folder"):
                write(path)
    with pytest.raises(UsageError, match="Expected a sweep"):
        write_sweep_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "content"), [("summary.json", "{"), ("hparams.safetensors", "xx")])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(UsageError, match=re.escape(str(run / file))):
        report(run)


EVALUATION = {
    "score": "accuracy",
    "num_tasks": 40,
    "inner_steps": [0, 1, 4],
    "num_steps": 1,
    "mean": [0.2, 0.7, 0.9],
    "half_width": [0.03, 0.02, 0.01],
    "floor": 0.47,
}


def make_few_shot(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A run that has scored test tasks, and kept some of them."""
    run = make_run(folder)
    summary = json.loads((run / "summary.json").read_text()) | {"evaluation": EVALUATION}
    (run / "summary.json").write_text(json.dumps(summary))
    save_file(tensors, run / "episodes.safetensors")
    return run


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_few_shot_run_shows_images_with_their_predictions(tmp_path: Path, num_channels: int) -> None:
    targets = torch.arange(3).repeat_interleave(4).expand(2, 12)
    after = torch.nn.functional.one_hot(targets, 3).double()
    after[1, 5] = torch.tensor([1.0, 0.0, 0.0])  # one of the second task is taken for A
    tensors = {
        "support.inputs": torch.rand(2, 3, 8, 8, num_channels),
        "support.targets": torch.arange(3).expand(2, 3),
        "query.inputs": torch.rand(2, 12, 8, 8, num_channels),
        "query.targets": targets,
        "outputs.before": torch.zeros(2, 12, 3),
        "outputs.after": after,
    }
    run = make_few_shot(tmp_path / "run", {name: value.contiguous() for name, value in tensors.items()})
    found = {plate.name: plate for plate in plates(load_run(run))}
    assert list(found)[:4] == ["losses", "adaptation", "task_0", "task_1"] and "image_penalty.weight" not in found
    assert "Right are 12 of 12; before adaptation 4" in found["task_0"].caption
    assert "Right are 11 of 12" in found["task_1"].caption and "40 test tasks" in found["adaptation"].caption
    figure = found["task_1"].paint(LIGHT)
    assert [panel.get_title() for panel in figure.axes if panel.spines["top"].get_visible()] == ["A"]
    Page(write_report(run))
    assert all((run / "figures" / f"{name}.png").is_file() for name in ("adaptation", "task_0", "task_1"))


def test_a_few_shot_run_of_curves_shows_them(tmp_path: Path) -> None:
    tensors = {name: torch.rand(3, 6, 1) for name in ("query.inputs", "query.targets")}
    tensors |= {name: torch.rand(3, 2, 1) for name in ("support.inputs", "support.targets")}
    tensors |= {name: torch.rand(3, 6, 1) for name in ("outputs.before", "outputs.after")}
    run = make_few_shot(tmp_path / "run", tensors)
    assert [plate.name for plate in plates(load_run(run))][:3] == ["losses", "adaptation", "tasks"]
    Page(write_report(run))
    assert (run / "figures" / "tasks.png").is_file()


def test_a_run_with_weighted_examples_shows_whom_it_trusts_least(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text()) | {"cleaning": {"classes": ["shirt", "bag"]}}
    (run / "summary.json").write_text(json.dumps(summary))
    tensors = {
        "weight": torch.linspace(0, 1, 12),
        "label": torch.tensor([0, 1] * 6),
        "true_label": torch.tensor([0, 1, 1] * 4) % 2,
        "shown": torch.arange(9),
        "images": torch.rand(9, 5, 5, 1),
    }
    save_file(tensors, run / "examples.safetensors")
    found = {plate.name: plate for plate in plates(load_run(run))}
    assert list(found)[:3] == ["losses", "weights", "least_trusted"]
    assert not any(name.startswith("image_") for name in found)
    wrong = int((tensors["label"] != tensors["true_label"]).sum())
    assert (
        f"12 training examples have which weight: those that are labelled rightly, and the {wrong} that"
        in found["weights"].caption
    )
    figure = found["least_trusted"].paint(LIGHT)
    framed = [panel.get_title(loc="center") for panel in figure.axes if panel.spines["top"].get_visible()]
    right = [i for i in range(9) if tensors["label"][i] == tensors["true_label"][i]]
    names = ["shirt", "bag"]
    assert (
        framed == [f"{names[tensors['label'][i]]}\n({names[tensors['label'][i]]})" for i in right]
        and len(figure.axes) == 9
    )
    Page(write_report(run))


def test_an_interval_is_a_band_of_its_metric_and_no_metric(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record | {"metrics.test_loss_half_width": 0.1} for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (metrics,) = (plate for plate in plates(load_run(run)) if plate.name == "metrics")
    (panel,) = metrics.paint(LIGHT).axes
    assert panel.collections and "95 % interval" in metrics.caption


@pytest.mark.parametrize(
    ("values", "worthy"),
    [([1, 10], True), ([1, 2], False), ([0, 10], False), ([-1, 10], False), ([math.nan, 1, 9], True), ([], False)],
)
def test_log_scales_are_for_positive_values_that_differ(values: list[float], worthy: bool) -> None:
    assert is_log_worthy(values) is worthy


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_panel_of_lines_of_which_one_wants_a_log_scale_is_drawn(order: tuple[int, int], tmp_path: Path) -> None:
    """The least curvature over six decades, the largest hardly changed; the other way round, too."""
    run = make_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sides = ([10.0**-number for number in range(2, 8)], [20.0 + number for number in range(6)])
    for number, record in enumerate(records):
        for place, name in zip(order, ("min", "max"), strict=True):
            record[f"receipt.curvature_{name}"] = sides[place][number]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (receipts,) = (plate for plate in plates(load_run(run)) if plate.name == "receipts")
    (panel,) = (axes for axes in receipts.paint(LIGHT).axes if axes.get_title().startswith("curvature"))
    assert panel.get_yscale() == "log"
    Page(write_report(run))


def test_both_themes_have_their_axes_in_the_same_places() -> None:
    """The layout engine is asked once: what it answers is where the other theme's axes are put."""
    from bilevel.report.style import DARK, LIGHT, Plate, blank, draw_in

    drawn = []

    def paint(theme):
        figure, axes = blank(1, 2, 2.0)
        for panel, top in zip(axes, (1.0, 123456.0), strict=True):  # the second one's labels are wider
            panel.plot([0, 1], [0, top], color=theme.series[0])
        drawn.append(figure)
        return figure

    plate = Plate("both", "", "", paint)
    light, dark = draw_in(plate, [LIGHT, DARK])
    (alone,) = draw_in(plate, [DARK])
    first, second, by_itself = ([panel.get_position().bounds for panel in figure.axes] for figure in drawn)
    assert first == second and light != dark and alone == dark
    assert second == by_itself != [panel.get_position().bounds for panel in blank(1, 2, 2.0)[0].axes]


def test_a_run_with_penalties_of_words_shows_what_speaks_for_each_class(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    listed = {
        name: [{"word": f"{name}{place}", "weight": 2.0 - place, "penalty": 0.1 * (place + 1)} for place in range(3)]
        for name in ("animal", "food", "time", "act", "body", "shape")
    }
    groups = [{"texts": 2.0**power, "words": 3, "low": 0.1, "median": 0.2, "high": 0.2 + power} for power in range(4)]
    summary = json.loads((run / "summary.json").read_text()) | {"words": {"classes": listed, "by_frequency": groups}}
    (run / "summary.json").write_text(json.dumps(summary))
    found = {plate.name: plate for plate in plates(load_run(run))}
    assert list(found)[:3] == ["losses", "words", "frequency"]
    assert not any(name.startswith("image_") for name in found)
    figure = found["words"].paint(LIGHT)
    bold = {text.get_text() for panel in figure.axes for text in panel.texts if text.get_fontweight() == "bold"}
    assert len(figure.axes) == 6 and bold == {f"{name}0" for name in listed}
    Page(write_report(run))
    for group in groups:  # one penalty for all words
        group["high"] = group["low"] = group["median"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "frequency" not in {plate.name for plate in plates(load_run(run))}


def test_a_run_stands_by_the_metric_that_it_monitored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["best"]["metrics.holdout_loss"], summary["monitor"] = 0.375, "holdout_loss"
    (run / "summary.json").write_text(json.dumps(summary))
    standing = load_run(run).standing
    assert (standing.name, standing.figure, standing.rank) == ("best holdout_loss", "0.37500", 0.375)
