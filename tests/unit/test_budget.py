"""What a budget buys: times as people write them, and the rung that is picked."""

from __future__ import annotations

import pytest

from cofiprune import PruneConfig
from cofiprune.errors import SettingsError
from cofiprune.training.budget import (
    MOST_EPOCHS,
    WORTHWHILE_EPOCHS,
    Pace,
    check_method,
    choose,
    chosen_for_epochs,
    one_shot_steps,
    readable,
)
from cofiprune.training.config import PRESETS
from cofiprune.training.resolved import Facts, resolve

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
    assert chosen_for_epochs(PruneConfig()).finetune_epochs == 6
    assert chosen_for_epochs(PruneConfig(epochs=0)).finetune_epochs == 0
    assert chosen_for_epochs(PruneConfig(epochs=0, finetune_epochs=2)).finetune_epochs == 2
    assert chosen_for_epochs(PruneConfig(epochs=0.2, finetune_epochs=0)).finetune_epochs == 0.2
    assert chosen_for_epochs(PruneConfig(epochs=3, finetune_epochs=1)).finetune_epochs == 4


def test_what_is_said_of_the_training_is_for_the_recovery():
    config = PruneConfig(learning_rate=1e-4, lr_scheduler_type="cosine", batch_size=16, finetune_learning_rate=3e-4)
    found = resolve(config.model_copy(update=chosen_for_epochs(config).settings(config)), Facts(10, target=0.5))
    assert (found.method, found.finetune_epochs, found.finetune_batch_size) == ("one-shot", 6, 16)
    assert (found.finetune_learning_rate, found.finetune_lr_scheduler_type) == (3e-4, "cosine")


def test_settings_of_gates_ask_for_gates():
    assert not PruneConfig(units=("head",), round_to=8, label_weight=0, epochs=3, repair=True).gate_settings
    assert PruneConfig(freeze_epochs=0, warm_start=True).gate_settings == ["freeze_epochs"]
    assert PruneConfig(compact_in_training=False).gate_settings == ["compact_in_training"]
    assert {PruneConfig.preset(name).method for name in PRESETS} == {"cofi"}


@pytest.mark.parametrize(
    ("settings", "has_data", "words"),
    [
        ({"method": "auto", "time_budget": "5m", "epochs": 3}, True, ("two budgets",)),
        ({"method": "cofi", "time_budget": "5m"}, True, ("'auto'", "'cofi'")),
        ({"time_budget": "5m", "pre_finetune_epochs": 1}, True, ("time_budget", "pre_finetune_epochs")),
        ({"method": "gates"}, False, ("train_dataset",)),
        ({"time_budget": "5m"}, False, ("train_dataset",)),
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
    assert PruneConfig(method="cofi").recovery_epochs == 2


def test_what_is_repaired():
    assert PruneConfig(method="gates").repairs
    assert PruneConfig(method="one-shot").repairs
    assert not PruneConfig().repairs
    assert PruneConfig(repair=True).repairs
    assert not PruneConfig(method="gates", repair=False).repairs
