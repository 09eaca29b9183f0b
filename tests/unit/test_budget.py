"""What a budget buys: times as people write them, and the rung that is picked."""

from __future__ import annotations

import pytest

from cofiprune import PruneConfig
from cofiprune.errors import SettingsError
from cofiprune.training.start import (
    MOST_EPOCHS,
    WORTHWHILE_EPOCHS,
    Pace,
    check_method,
    choose,
    chosen_for_epochs,
    one_shot_steps,
    readable,
)

PACE = Pace(step=0.5, teacher=0.2, steps_per_epoch=250, one_shot=60)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5 h", 5400), (45, 45), ("45", 45), (0.5, 0.5)],
)
def test_times_are_read_as_people_write_them(given, seconds):
    assert PruneConfig(method="auto", time_budget=given).time_budget == seconds


@pytest.mark.parametrize(
    "given", ["", "ten minutes", "10 minutes", "m", "-5m", 0, -1, True, [10], float("inf"), "10m!"]
)
def test_other_times_are_refused(given):
    with pytest.raises(SettingsError, match="time_budget"):
        PruneConfig(method="auto", time_budget=given)


def test_no_time_for_anything_is_an_error_that_says_what_is_needed():
    with pytest.raises(SettingsError, match="too short") as caught:
        choose(PACE, 0.5 * PACE.one_shot, share=0.1)
    assert readable(PACE.one_shot) in str(caught.value)


def test_more_time_never_buys_less():
    budgets = [PACE.one_shot * factor for factor in (1.0, 1.5, 2, 3, 5, 10, 30, 100, 1000)]
    choices = [choose(PACE, budget, share=0.1) for budget in budgets]
    epochs = [choice.finetune_epochs for choice in choices]
    assert epochs[0] == 0
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(MOST_EPOCHS)
    assert all(total == 0 or total >= WORTHWHILE_EPOCHS for total in epochs)


def test_what_was_picked_fits_into_the_budget():
    for budget in (200, 400, 1600):
        for share in (0.1, 0.5):
            choice = choose(PACE, budget, share=share)
            total = choice.finetune_epochs
            needed = PACE.one_shot + total * PACE.epoch(share) + PACE.taught(total)
            assert needed <= budget * 1.01


def test_one_shot_takes_longer_the_further_it_goes():
    assert one_shot_steps([0.6]) < one_shot_steps([0.4, 0.16]) < one_shot_steps([0.45, 0.2, 0.09])


def test_a_larger_model_left_gets_fewer_epochs():
    few, many = (choose(PACE, 900, share=share) for share in (0.5, 0.1))
    assert few.finetune_epochs < many.finetune_epochs


def test_epochs_are_a_budget_too():
    assert chosen_for_epochs(0, 2).finetune_epochs == 0
    assert chosen_for_epochs(0.2, 0.1).finetune_epochs == 0
    assert chosen_for_epochs(3, 1).finetune_epochs == 4


@pytest.mark.parametrize(
    ("settings", "has_data", "words"),
    [
        ({"method": "auto"}, True, ("time_budget", "epochs")),
        ({"method": "auto", "time_budget": "5m", "epochs": 3}, True, ("two budgets",)),
        ({"time_budget": "5m"}, True, ("'auto'", "'cofi'")),
        ({"method": "gates"}, False, ("train_dataset",)),
        ({"method": "auto", "epochs": 1}, False, ("train_dataset",)),
    ],
)
def test_methods_lack_what_they_need(settings, has_data, words):
    with pytest.raises(SettingsError) as caught:
        check_method(PruneConfig(**settings), has_data=has_data)
    assert all(word in str(caught.value) for word in words)


def test_gates_alone_and_one_shot_are_followed_by_recovery_only_where_it_was_asked_for():
    assert PruneConfig(method="gates").recovery_epochs == 0
    assert PruneConfig(method="gates", finetune_epochs=1).recovery_epochs == 1
    assert PruneConfig(method="one-shot").recovery_epochs == 0
    assert not PruneConfig(method="one-shot").trains
    assert PruneConfig(method="one-shot", finetune_epochs=1).trains
    assert PruneConfig().recovery_epochs == 2


def test_what_is_repaired():
    assert PruneConfig(method="gates").repairs
    assert PruneConfig(method="one-shot").repairs
    assert not PruneConfig().repairs
    assert PruneConfig(repair=True).repairs
    assert not PruneConfig(method="gates", repair=False).repairs
