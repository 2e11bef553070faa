"""The alarm for an outer loop that overfits: when it sounds, where it is told, and that a resumed run has forgotten nothing."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.cli.main import main
from bilevel.errors import UsageError
from bilevel.tracking import HoldoutAlarm
from bilevel.tracking.troubles import Troubles


def records(outer, holdout):
    pairs = zip(outer, holdout, strict=True)
    return [{"step": k, "outer_loss": one, "metrics.holdout_loss": other} for k, (one, other) in enumerate(pairs)]


def alarms(alarm, seen):
    for record in seen:
        alarm.on_step(record, {})
    return [record["step"] for record in seen if "overfitting" in record]


FALLING = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("outer", "holdout", "expected"),
    [
        (FALLING, [1.0, 0.9, 0.8, 0.85, 0.9, 0.95], [4, 5]),  # the least value is two steps old
        (FALLING, [1.0, 0.9, 0.8, 0.805, 0.804, 0.807], []),  # it rises by less than a hundredth
        ([1.0, 0.8, 0.6, 0.7, 0.8, 0.9], [1.0, 0.9, 0.8, 0.85, 0.9, 0.95], []),  # the outer loss rises, too
        (FALLING, [1.0, 0.9, 0.8, 0.85, 0.7, 0.6], []),  # it comes down again
        (FALLING, [-1.0, -2.0, -1.9, -1.9, -1.9, -2.1], [3, 4]),  # a loss below zero
        (FALLING, [1.0, 0.9, float("nan"), 0.95, 0.96, float("inf")], [3, 4]),
    ],
)
def test_it_sounds_when_the_outer_loss_falls_alone(outer, holdout, expected):
    assert alarms(HoldoutAlarm(patience=2), records(outer, holdout)) == expected


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(0, 12))
def test_a_resumed_run_has_seen_all_steps(tmp_path_factory, pairs, cut):
    seen = records(*zip(*pairs, strict=True))
    whole = alarms(HoldoutAlarm(patience=1), [dict(record) for record in seen])
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in seen))
    cut = min(cut, len(seen))
    later = HoldoutAlarm(patience=1)
    later.on_start(SimpleNamespace(directory=folder, step=cut))
    assert alarms(later, [dict(record) for record in seen[cut:]]) == [step for step in whole if step >= cut]


def test_skipped_steps_are_passed_over():
    seen = records([1.0, 0.9], [0.5, 0.6])
    del seen[1]["metrics.holdout_loss"]
    assert alarms(HoldoutAlarm(), [seen[0], {**seen[1], "skipped": True}]) == []


def test_what_is_wrong_is_told():
    with pytest.raises(
        UsageError, match=r"watches the metric 'holdout_loss' .* but it has \['test_loss'\]: leave some"
    ):
        HoldoutAlarm().on_step({"step": 0, "outer_loss": 1.0, "metrics.test_loss": 1.0}, {})
    for words in ({"rise": -1.0}, {"patience": 0}, {"rise": float("nan")}):
        with pytest.raises(UsageError, match="HoldoutAlarm needs rise >= 0 and patience >= 1"):
            HoldoutAlarm(**words)


def test_the_console_says_it_once_and_counts():
    seen, troubles = records(FALLING, [1.0, 0.9, 0.8, 0.85, 0.9, 0.95]), Troubles()
    alarms(HoldoutAlarm(patience=2), seen)
    said = [sentence for record in seen for sentence in troubles.news(record)]
    assert said == [
        "step 4: the outer loss still falls, but only on its own examples: the loss on what it leaves out was 0.8000 at "
        "step 2, and is 0.9000"
    ]
    assert troubles.totals() == ["2 of 6 steps: the outer loss still falls, but only on its own examples"]


@pytest.mark.usefixtures("fashion_mnist")
def test_a_run_that_learns_a_few_validation_examples_by_heart_is_told(tmp_path, capsys):
    """A hundred weights for twelve validation examples."""
    words = ["problem.num_train=100", "problem.num_validation=24", "problem.holdout=0.5", "problem.penalty=1e-3"]
    words += [
        "trainer.num_steps=15",
        "outer_optimizer.lr=300",
        "solver.atol=1e-4",
        "callbacks.comparison=null",
        "tracking=none",
    ]
    assert main(["train", "experiment=hyper_cleaning", f"output_dir={tmp_path}", *words]) == 0
    (path,) = tmp_path.glob("*/*/summary.json")
    found = json.loads(path.read_text())["holdout"]
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "overfitting" in line]
    assert told and told[-1]["overfitting"]["best_step"] == found["best_step"] < told[0]["step"]
    assert "but only on its own examples" in (path.parent / "report.html").read_text()


def test_steps_in_which_nothing_is_measured_are_passed_over():
    alarm = HoldoutAlarm(rise=0.1, patience=1)
    records = [{"step": k, "outer_loss": 1 / (k + 1)} for k in range(9)]
    for record in records[::2]:
        record["metrics.holdout_loss"] = (record["step"] - 4) ** 2 + 1.0
    for record in records:
        alarm.on_step(record, {})
    assert [record["step"] for record in records if "overfitting" in record] == [6, 8]
