"""Settings: ranges, near misses, who takes which, what open ones come to, and presets as the original had them."""

import inspect
import json

import pytest

import cofiprune
from cofiprune import PruneConfig, PruningCallback
from cofiprune.errors import CofipruneError, SettingsError
from cofiprune.structure import UNIT_KINDS
from cofiprune.training.config import CALLBACK, FINETUNE, RECOVERY, names_of
from cofiprune.training.resolved import Facts, Schedule, rate, resolve

NAMES = {
    "epochs", "finetune_epochs", "pre_finetune_epochs", "sparsity_warmup_epochs", "batch_size", "eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "finetune_learning_rate", "gate_learning_rate", "weight_decay",
    "max_grad_norm", "lr_scheduler_type", "units", "distill_temperature", "distill_logits_weight",
    "distill_layers_weight", "distill_layer_match", "label_weight", "train_embeddings", "mixed_precision", "seed",
    "logging_steps", "eval_steps", "checkpoint_steps", "metric_for_best_model", "progress",
}  # fmt: skip


def test_the_names_that_are_promised_are_there_and_none_is_an_argument_of_prune():
    assert set(PruneConfig.model_fields) >= NAMES
    assert not set(PruneConfig.model_fields) & (set(inspect.signature(cofiprune.prune).parameters) - {"settings"})


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
        ("metric_for_best", "metric_for_best_model"),
        ("qqq", ""),
    ],
)
@pytest.mark.parametrize("make", [PruneConfig, PruneConfig.create, lambda **s: PruneConfig.preset("squad", **s)])
def test_unknown_names_list_the_near_misses_or_where_there_is_none_all(make, wrong, meant):
    with pytest.raises(SettingsError) as caught:
        make(**{wrong: 1})
    said, _, listed = str(caught.value).partition("Settings: ")
    assert said.startswith(f"unknown setting {wrong!r}.")
    assert f"{meant!r}" in said.partition("Did you mean")[2] if meant else "mean" not in said
    assert not listed if meant else set(listed.split(", ")) >= NAMES


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epochs": -0.5}, "greater than or equal to 0"),
        ({"epochs": float("nan")}, "finite"),
        ({"finetune_epochs": float("inf")}, "finite"),
        ({"epochs": "many"}, "valid number"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"batch_size": 2.5}, "integer"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"max_grad_norm": -1}, "greater"),
        ({"warmup_ratio": 1.5}, "less than or equal to 1"),
        ({"label_weight": 1e9}, "less than"),
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


EXAMPLES = {  # the values of other fields go by their defaults
    "epochs": 3, "finetune_epochs": 1.5, "finetune_batch_size": 8, "learning_rate": 1e-3, "dropout": True,
    "finetune_learning_rate": 2e-3, "lr_scheduler_type": "cosine", "finetune_lr_scheduler_type": "constant",
    "train_embeddings": True, "mixed_precision": "bf16", "pad_to_multiple_of": 4, "torch_compile_backend": "eager",
    "eval_steps": 7, "checkpoint_steps": 9, "metric_for_best_model": "loss", "greater_is_better": True,
    "distill_layer_match": "nearest", "embedding_pooling": "cls", "label_weight": 0.3, "units": ("head", "hidden"),
    "one_shot_units": ("head",),
    "round_to": 4, "sparsity_warmup_epochs": 0.3, "freeze_epochs": 0.7, "gate_learning_rate": 0.03,
    "gate_stretch": (-0.2, 1.3), "method": "gates", "time_budget": 600.0, "repair": False, "latency_cache": "here",
    "engine": "onnx", "target_file_dtype": "float16", "max_steps": 70,
}  # fmt: skip
FACTS = [
    Facts(7, target=0.9, taught=True),
    Facts(250, target=0.6, kept_share=0.41, from_one_shot=False, units=("head", "intermediate")),
    Facts(9, target=0.8, trainer_steps=30, round_to=8, in_16_bit_on_gpu=True),
    Facts(12, kept_share=1.0, taught=True, labelled=False, needs_train_mode=True, dense=True),
]
IN_FINETUNE = {name: recovery for recovery, name in RECOVERY.items()}
OPEN = {"time_budget", "max_steps", "metric_for_best_model"}
"""None is an answer to these, not a question."""


def other_value(name):
    """A valid value of a field that is not its default."""
    default = PruneConfig.model_fields[name].default
    if name in EXAMPLES:
        return EXAMPLES[name]
    return not default if isinstance(default, bool) else default + 1 if default != 0.97 else 0.5


def behaviour(config):
    """Everything that a run can ask of its configuration."""
    properties = {name: getattr(config, name) for name, kind in vars(PruneConfig).items() if isinstance(kind, property)}
    return config, properties, [resolve(config, facts) for facts in FACTS]


@pytest.mark.parametrize("name", PruneConfig.model_fields)
def test_equal_configurations_behave_alike(name):
    for method in ("cofi", "one-shot", "gates", "auto"):
        config = PruneConfig(**{"method": method, name: other_value(name)})
        assert getattr(config, name) != PruneConfig.model_fields[name].default
        expected = behaviour(config)
        for values in (config.model_dump(), json.loads(config.model_dump_json()), dict(config)):
            assert behaviour(PruneConfig(**values)) == expected
            assert behaviour(PruneConfig.create(PruneConfig(**values))) == expected


@pytest.mark.parametrize("name", PruneConfig.model_fields)
def test_open_settings_get_their_value_once(name):
    config = PruneConfig(**{"method": "cofi", name: other_value(name)})
    assert getattr(resolve(config, FACTS[0]), name) == getattr(config, name)
    for facts in FACTS:
        found = resolve(config, facts)
        assert {field for field, value in found if value is None} <= OPEN
        assert resolve(PruneConfig.create(found), facts) == found


@pytest.mark.parametrize("name", PruneConfig.model_fields)
def test_a_setting_is_taken_or_refused(name):
    """What `prune` alone takes is not accepted and forgotten by others."""
    setting = {name: other_value(name)}
    assert getattr(PruneConfig.create(**setting), name) == setting[name]
    for takes, make in ((FINETUNE, PruneConfig.for_finetune), (CALLBACK, lambda **s: PruningCallback(**s).config)):
        if name in names_of(*takes):
            config = make(**setting)
            assert getattr(config, name if takes is CALLBACK else IN_FINETUNE.get(name, name)) == setting[name]
        else:
            with pytest.raises(SettingsError, match=f"(finetune|PruningCallback) does not take '{name}'"):
                make(**setting)


def test_finetune_goes_by_the_plain_names():
    config = PruneConfig.for_finetune(PruneConfig(finetune_epochs=9, epochs=5), epochs=1, batch_size=3)
    assert (config.epochs, config.finetune_epochs, config.finetune_batch_size, config.batch_size) == (5, 1, 3, 3)
    resolved = resolve(config, Facts(10))
    assert (resolved.epochs, resolved.learning_rate) == (1, resolved.finetune_learning_rate)


def test_finetune_goes_by_what_a_configuration_says_of_pruning_where_it_leaves_the_recovery_open():
    config = PruneConfig(epochs=5, learning_rate=2e-4, lr_scheduler_type="cosine", batch_size=4)
    found = PruneConfig.for_finetune(config)
    assert (found.finetune_epochs, found.finetune_learning_rate) == (5, 2e-4)
    assert (found.finetune_lr_scheduler_type, found.finetune_batch_size) == ("cosine", 4)
    config = PruneConfig.create(config, finetune_epochs=9, finetune_learning_rate=1e-3)
    found = PruneConfig.for_finetune(config, epochs=1)
    assert (found.finetune_epochs, found.finetune_learning_rate) == (1, 1e-3)


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
COMMON = {
    "finetune_epochs": 20, "finetune_batch_size": 64, "finetune_lr_scheduler_type": "constant", "distill_layers": 4,
    "lr_scheduler_type": "linear", "distill_temperature": 2, "distill_layer_match": "ordered", "label_weight": 0,
    "train_embeddings": False, "gate_learning_rate": 0.01, "max_grad_norm": 1, "weight_decay": 0, "seed": 57,
    "freeze_epochs": 0, "warm_start": False, "one_shot_share": 0, "gate_stretch": (-0.1, 1.1),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPE)
def test_presets_are_the_recipe_of_the_paper(name):
    config = PruneConfig.preset(name)
    own = ("batch_size", "learning_rate", "epochs", "pre_finetune_epochs", "sparsity_warmup_epochs", "eval_steps")
    assert tuple(getattr(config, setting) for setting in own) == RECIPE[name]
    assert {setting: getattr(config, setting) for setting in COMMON} == COMMON
    assert config.finetune_learning_rate in (1e-5, 2e-5, 3e-5)
    assert (config.distill_layers_weight, config.distill_logits_weight) in [(0.9, 0.1), (0.7, 0.3), (0.5, 0.5)]
    assert config.gate_temperature == pytest.approx(2 / 3)
    assert not config.starts_from_one_shot
    _, _, epochs, before, warmup, _ = RECIPE[name]
    schedule = Schedule.for_pruning(resolve(config, Facts(100, target=0.9)), 100)
    parts = (schedule.before, schedule.gated, schedule.after, schedule.ramp)
    assert parts == (100 * before, 100 * epochs, 0, 100 * warmup)  # the structure learns to the end


def test_settings_go_on_top_of_a_preset():
    config = PruneConfig.preset("squad", epochs=1, distill_layers_weight=0.5)
    assert (config.epochs, config.distill_layers_weight, config.batch_size) == (1, 0.5, 16)
    with pytest.raises(SettingsError, match=r"'glue-smal'\. Did you mean 'glue-small'.* Presets: .*squad"):
        PruneConfig.preset("glue-smal")


def test_settings_are_read_as_they_are_typed():
    typed = "--epochs 4 --units head hidden --no-dropout --warm_start --freeze-epochs none --gate-stretch=-0.2,1.2"
    stated = {"epochs": 4, "units": ("head", "hidden"), "dropout": False, "warm_start": True, "freeze_epochs": None}
    expected = PruneConfig.preset("squad", gate_stretch=(-0.2, 1.2), **stated)
    assert PruneConfig.from_arguments(typed.split(), preset="squad") == expected
    with pytest.raises(SettingsError, match="Did you mean 'epochs'"):
        PruneConfig.from_arguments(["--epoch", "4"])


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
    config = PruneConfig(metric_for_best_model=metric, greater_is_better=stated)
    assert resolve(config, Facts(10)).greater_is_better == greater


def test_a_schedule_adds_up():
    for epochs in (0, 0.1, 1, 3.3, 20):
        for freeze in (None, 0, 0.5, 50):
            for batches in (1, 2, 7, 250):
                settings = resolve(
                    PruneConfig(method="cofi", epochs=epochs, freeze_epochs=freeze), Facts(batches, target=0.9)
                )
                schedule = Schedule.for_pruning(settings, batches)
                assert schedule.gated >= 1
                assert 0 <= schedule.ramp <= schedule.gated
                assert schedule.after >= 0
                assert schedule.gated + schedule.after == max(round(epochs * schedule.steps_per_epoch), 1)


def test_a_trainers_steps_are_shared_out_whole():
    for steps in (1, 2, 9, 30, 1001):
        for per_epoch in (1, 3, 7, 100):
            for started, (rising, frozen) in {True: (0.125, 0.875), False: (0.4, 0.25)}.items():
                facts = Facts(per_epoch, target=0.9, trainer_steps=steps, from_one_shot=started)
                settings = resolve(PruneConfig(method="cofi"), facts)
                after = round(frozen * steps)
                if after < steps:
                    schedule = Schedule.for_pruning(settings, per_epoch, in_trainer=True)
                    gated = steps - after
                    assert (schedule.gated, schedule.after) == (gated, after)
                    assert schedule.ramp == min(round(rising * steps), gated)
                    assert settings.gate_learning_rate == min(0.2, max(0.01, 40 / gated))


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
    def rates(steps_per_epoch=100, **facts):
        found = resolve(PruneConfig(method="cofi"), Facts(steps_per_epoch, **{"target": 0.5, **facts}))
        return found.gate_learning_rate, found.learning_rate, found.finetune_learning_rate

    assert rates(steps_per_epoch=1)[0] == 0.2
    assert rates(steps_per_epoch=10**6)[0] == 0.01
    assert rates(target=0.01)[1] < rates(target=0.9)[1]
    assert rates(kept_share=1.0)[2] < rates(kept_share=0.05)[2] <= rates(kept_share=0.0)[2] < 1
    assert rates(target=0.75)[2] == rates(target=0.3, kept_share=0.25)[2]  # until it is known, the target's share
