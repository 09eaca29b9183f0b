"""Settings: ranges, near misses, and presets that are the original's recipe."""

import inspect

import pytest

import cofiprune
from cofiprune import PruneConfig
from cofiprune.errors import CofipruneError, SettingsError
from cofiprune.structure import UNIT_KINDS
from cofiprune.training.schedule import Schedule, gate_rate, pruning_rate, rate, recovery_rate

NAMES = [
    "epochs",
    "finetune_epochs",
    "batch_size",
    "eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "finetune_learning_rate",
    "gate_learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "units",
    "pre_finetune_epochs",
    "sparsity_warmup_epochs",
    "distill_temperature",
    "distill_logits_weight",
    "distill_layers_weight",
    "distill_layer_match",
    "label_weight",
    "train_embeddings",
    "mixed_precision",
    "seed",
    "logging_steps",
    "eval_steps",
    "checkpoint_steps",
    "metric_for_best_model",
    "progress",
]


def test_the_names_that_are_promised_are_there():
    assert set(NAMES) <= set(PruneConfig.model_fields)


def test_arguments_of_prune_are_no_settings():
    arguments = set(inspect.signature(cofiprune.prune).parameters) - {"settings"}
    assert not arguments & set(PruneConfig.model_fields)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("epoch", "epochs"),
        ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "batch_size"),
        ("bf16", "mixed_precision"),
        ("learningrate", "learning_rate"),
        ("unit", "units"),
        ("distil_temperature", "distill_temperature"),
        ("mixed_precison", "mixed_precision"),
        ("metric_for_best", "metric_for_best_model"),
    ],
)
@pytest.mark.parametrize("make", [PruneConfig, PruneConfig.create, lambda **s: PruneConfig.preset("squad", **s)])
def test_unknown_names_list_the_near_misses(make, wrong, meant):
    with pytest.raises(SettingsError) as caught:
        make(**{wrong: 1})
    message = str(caught.value)
    assert f"unknown setting {wrong!r}" in message
    assert f"{meant!r}" in message.partition("Settings:")[0]
    assert all(name in message for name in NAMES)


def test_a_name_like_no_other_suggests_nothing():
    with pytest.raises(SettingsError, match=r"unknown setting 'qqq'\. Settings: "):
        PruneConfig(qqq=1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epochs": -0.5}, "greater than or equal to 0"),
        ({"epochs": float("nan")}, "finite"),
        ({"finetune_epochs": float("inf")}, "finite"),
        ({"epochs": "many"}, "valid number"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"batch_size": 2.5}, "integer"),
        ({"eval_batch_size": -1}, "greater"),
        ({"gradient_accumulation_steps": 0}, "greater"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": -1e-4}, "greater than 0"),
        ({"gate_learning_rate": 0}, "greater than 0"),
        ({"weight_decay": -1}, "greater"),
        ({"max_grad_norm": -1}, "greater"),
        ({"warmup_ratio": 1.5}, "less than or equal to 1"),
        ({"distill_temperature": 0}, "greater than 0"),
        ({"distill_logits_weight": -1}, "greater"),
        ({"label_weight": 1e9}, "less than"),
        ({"distill_layers": 0}, "greater"),
        ({"logging_steps": 0}, "greater"),
        ({"eval_steps": 0}, "greater"),
        ({"lr_scheduler_type": "step"}, "'linear'"),
        ({"mixed_precision": True}, "'bf16'"),
        ({"distill_layer_match": "v4"}, "'ordered'"),
        ({"units": []}, "choose among layer, head, intermediate, hidden"),
        ({"units": "heads"}, "Did you mean 'head'?"),
        ({"units": ("head", "neuron")}, "'neuron'"),
        ({"units": 7}, "layer, head, intermediate, hidden"),
        ({"units": {"head": 1, "mlp": 2}}, "'mlp'"),
        ({"gate_stretch": (0, 1)}, "either side"),
        ({"gate_stretch": (0.1,)}, "gate_stretch"),
        ({"metric_for_best_model": 3}, "string"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [PruneConfig, PruneConfig.create])
def test_values_out_of_range_name_the_setting_and_the_range(make, settings, word):
    with pytest.raises(SettingsError) as caught:
        make(**settings)
    (name,) = settings
    assert str(caught.value).startswith(name)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CofipruneError)


def test_several_mistakes_are_told_together():
    with pytest.raises(SettingsError, match=r"epochs=-1: .*; batch_size=0: "):
        PruneConfig(epochs=-1, batch_size=0)


@pytest.mark.parametrize("units", ["head", ["head"], ("head",), {"head"}])
def test_units_are_a_tuple_whatever_they_were(units):
    assert PruneConfig(units=units).units == ("head",)


def test_all_unit_kinds_are_known():
    assert PruneConfig(units=UNIT_KINDS).units == UNIT_KINDS
    assert PruneConfig().units is None


def test_settings_go_on_top_of_a_configuration():
    base = PruneConfig(epochs=7, units="head")
    assert PruneConfig.create(base) == base
    changed = PruneConfig.create(base, batch_size=3, units=("hidden", "layer"))
    assert (changed.epochs, changed.batch_size, changed.units) == (7, 3, ("hidden", "layer"))
    assert base.batch_size == PruneConfig().batch_size
    with pytest.raises(SettingsError, match="PruneConfig, not dict"):
        PruneConfig.create({"epochs": 7})


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        PruneConfig().epochs = 3


RECIPE = {  # name: batch size, learning rate, epochs, plain epochs before, warm-up epochs, steps between evaluations
    "glue-small": (32, 2e-5, 100, 4, 20, 50),
    "glue-large": (32, 2e-5, 20, 1, 2, 500),
    "squad": (16, 3e-5, 20, 1, 2, 500),
}


@pytest.mark.parametrize("name", RECIPE)
def test_presets_are_the_recipe_of_the_paper(name):
    config = PruneConfig.preset(name)
    found = (
        config.batch_size,
        config.learning_rate,
        config.epochs,
        config.pre_finetune_epochs,
        config.sparsity_warmup_epochs,
        config.eval_steps,
    )
    assert found == RECIPE[name]
    assert config.finetune_learning_rate in (1e-5, 2e-5, 3e-5)
    assert config.finetune_epochs == 20
    assert config.finetune_batch_size == 64
    assert config.finetune_lr_scheduler_type == "constant"
    assert config.lr_scheduler_type == "linear"
    assert config.distill_layers_weight in (0.9, 0.7, 0.5)
    assert config.distill_logits_weight in (0.1, 0.3, 0.5)
    assert config.distill_layers_weight + config.distill_logits_weight == pytest.approx(1)
    assert config.distill_temperature == 2
    assert config.distill_layers == 4
    assert config.distill_layer_match == "ordered"
    assert config.label_weight == 0
    assert config.train_embeddings is False
    assert config.gate_learning_rate == 0.01
    assert config.max_grad_norm == 1
    assert config.weight_decay == 0
    assert config.seed == 57
    assert config.freeze_epochs == 0
    assert config.warm_start is False
    assert config.gate_stretch == (-0.1, 1.1)
    assert config.gate_temperature == pytest.approx(2 / 3)


def test_settings_go_on_top_of_a_preset():
    config = PruneConfig.preset("squad", epochs=1, distill_layers_weight=0.5)
    assert (config.epochs, config.distill_layers_weight, config.batch_size) == (1, 0.5, 16)


def test_settings_are_read_as_they_are_typed():
    typed = "--epochs 4 --units head hidden --no-dropout --warm_start --freeze-epochs none --gate-stretch=-0.2,1.2"
    given = PruneConfig.from_arguments(typed.split(), preset="squad")
    stretch = (-0.2, 1.2)
    assert given == PruneConfig.preset(
        "squad",
        epochs=4,
        units=("head", "hidden"),
        dropout=False,
        warm_start=True,
        freeze_epochs=None,
        gate_stretch=stretch,
    )
    with pytest.raises(SettingsError, match="Did you mean 'epochs'"):
        PruneConfig.from_arguments(["--epoch", "4"])


def test_unknown_presets():
    with pytest.raises(SettingsError, match=r"'glue-smal'\. Did you mean 'glue-small'.* Presets: .*squad"):
        PruneConfig.preset("glue-smal")


@pytest.mark.parametrize(
    ("metric", "stated", "greater"),
    [
        ("accuracy", None, True),
        ("eval_f1", None, True),
        ("loss", None, False),
        ("eval_loss", None, False),
        ("mse", None, False),
        ("perplexity", None, False),
        ("answer_accuracy", None, True),
        ("lossless", None, True),
        ("loss", True, True),
        ("accuracy", False, False),
    ],
)
def test_which_way_a_metric_gets_better(metric, stated, greater):
    assert PruneConfig(metric_for_best_model=metric, greater_is_better=stated).prefers_greater() == greater


def test_a_schedule_adds_up():
    for epochs in (0, 0.1, 1, 3.3, 20):
        for freeze in (None, 0, 0.5, 50):
            for batches in (1, 2, 7, 250):
                config = PruneConfig(epochs=epochs, freeze_epochs=freeze, gradient_accumulation_steps=3)
                schedule = Schedule.for_pruning(config, batches)
                assert schedule.steps_per_epoch == -(-batches // 3)
                assert schedule.gated >= 1
                assert 0 <= schedule.ramp <= schedule.gated
                assert schedule.after >= 0
                assert schedule.gated + schedule.after == max(round(epochs * schedule.steps_per_epoch), 1)


def test_presets_leave_the_structure_to_learn_to_the_end():
    for name, (_, _, epochs, before, warmup, _) in RECIPE.items():
        schedule = Schedule.for_pruning(PruneConfig.preset(name), 100)
        assert (schedule.before, schedule.gated, schedule.after, schedule.ramp) == (
            100 * before,
            100 * epochs,
            0,
            100 * warmup,
        )


def test_learning_rates():
    assert [rate("linear", step, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [rate("constant", step, 4) for step in range(5)] == [1] * 5
    cosine = [rate("cosine", step, 4) for step in range(5)]
    assert cosine[0] == 1
    assert cosine[2] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    warmed = [rate("linear", step, 10, 5) for step in range(10)]
    assert warmed[:6] == sorted(warmed[:6])
    assert warmed[5] == 1
    assert 0 < warmed[0] < warmed[-1] + 0.2


def test_rates_that_are_left_open_follow_the_run():
    config = PruneConfig()
    assert gate_rate(config, 1) == 0.2
    assert gate_rate(config, 10**6) == 0.01
    assert pruning_rate(config, 0.01) < pruning_rate(config, 0.9)
    assert recovery_rate(config, 1.0) < recovery_rate(config, 0.05) <= recovery_rate(config, 0.0) < 1
    stated = PruneConfig(gate_learning_rate=0.3, learning_rate=0.4, finetune_learning_rate=0.5)
    assert (gate_rate(stated, 9), pruning_rate(stated, 0.5), recovery_rate(stated, 0.5)) == (0.3, 0.4, 0.5)
