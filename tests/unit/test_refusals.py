"""What cannot be pruned is named, with what to do, before anything of it is touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel

import cofiprune
from cofiprune.adapter import Adapter
from cofiprune.errors import AdapterError
from cofiprune.refusals import refuse_undeclared

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 34}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32}
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
GPT2 = {**IDS, "n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 40}
T5 = {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 34, "d_kv": 6, "vocab_size": 40}


def bert(name: str = "BertModel") -> PreTrainedModel:
    return getattr(transformers, name)(BertConfig(**TEXT))


def refusal(model: Any) -> str:
    """The message with which a model is refused, the same by every door, and in one line."""
    before = {} if not isinstance(model, nn.Module) else {name: id(each) for name, each in model.named_modules()}
    messages = set()
    doors: tuple[Callable[[Any], Any], ...] = (
        cofiprune.structure,
        cofiprune.attach,
        lambda model: cofiprune.prune(model, target_sparsity=0.5),
        lambda model: cofiprune.finetune(model, [{"input_ids": [1, 2], "labels": 0}]),
    )
    for door in doors:
        with pytest.raises(AdapterError) as error:
            door(model)
        messages.add(str(error.value))
    if before:
        assert {name: id(each) for name, each in model.named_modules()} == before
    (message,) = messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}),
        ("ConvNext", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}),
    ],
)
@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
def test_convolutional_networks(name: str, settings: dict[str, Any], head: str) -> None:
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings))
    assert "a convolutional network without attention" in refusal(model)


def test_networks_without_attention() -> None:
    assert "a network without attention" in refusal(transformers.FNetModel(transformers.FNetConfig(**TEXT)))


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "LMHeadModel"])
def test_gpt2_is_decoder_only(head: str) -> None:
    message = refusal(getattr(transformers, f"GPT2{head}")(transformers.GPT2Config(**GPT2)))
    assert "(gpt2) is a decoder-only model" in message


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_llama_is_decoder_only(head: str) -> None:
    message = refusal(getattr(transformers, f"Llama{head}")(transformers.LlamaConfig(**TEXT)))
    assert "(llama) is a decoder-only model" in message


def test_decoder_only_models_whose_modules_do_not_say_so() -> None:
    config = transformers.BloomConfig(hidden_size=24, n_layer=1, n_head=4, vocab_size=40)
    assert "(bloom) is a decoder-only model" in refusal(transformers.BloomModel(config))


@pytest.mark.parametrize("model_type", ["bert-generation", "xlnet", "big_bird"])
def test_encoders_that_can_generate_are_not_taken_for_decoders(model_type: str) -> None:
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1)
        refuse_undeclared(transformers.AutoModel.from_config(config))


def test_a_model_that_swaps_its_modules_names_the_setting_that_stops_it() -> None:
    model = transformers.BigBirdModel(transformers.BigBirdConfig(**TEXT))
    with pytest.raises(AdapterError, match=r"encoder.layer.0.attention.self', unless .*'original_full'"):
        cofiprune.structure(model)


def test_an_encoder_configured_as_a_decoder() -> None:
    assert "Load it with is_decoder=False" in refusal(BertModel(BertConfig(**TEXT, is_decoder=True)))


@pytest.mark.parametrize("cls", ["T5Model", "T5ForConditionalGeneration"])
def test_encoder_decoders_name_the_class_of_the_encoder(cls: str) -> None:
    assert "Load the encoder alone, by T5EncoderModel" in refusal(
        getattr(transformers, cls)(transformers.T5Config(**T5))
    )


def test_encoder_decoders_without_such_a_class() -> None:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.BartConfig(d_model=24, vocab_size=40, encoder_ffn_dim=34, decoder_ffn_dim=34, **layers)
    assert "model.get_encoder() returns it" in refusal(transformers.BartModel(config))


def test_a_block_sparse_encoder_of_a_pair_is_not_taken_for_a_decoder() -> None:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 24, "vocab_size": 40, "encoder_ffn_dim": 34, "decoder_ffn_dim": 34, "block_size": 2}
    model = transformers.BigBirdPegasusModel(transformers.BigBirdPegasusConfig(**sizes, **layers))
    refuse_undeclared(model.get_encoder())


def test_a_mixture_of_experts() -> None:
    config = transformers.SwitchTransformersConfig(**T5, num_experts=2, num_sparse_encoder_layers=1)
    message = refusal(transformers.SwitchTransformersEncoderModel(config))
    assert "a mixture of experts ('encoder.block" in message


def made(family: str, **settings: Any) -> PreTrainedModel:
    return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings))


PAIR = {"vision_config": {**SIZES, "image_size": 8, "patch_size": 4}, "text_config": TEXT}
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "lilt": lambda: made("Lilt", **TEXT),
    "canine": lambda: made("Canine", **TEXT),
    "ibert": lambda: made("IBert", **TEXT),
    "mobilebert": lambda: made("MobileBert", **TEXT, embedding_size=8, intra_bottleneck_size=24),
    "xlm": lambda: made("XLM", emb_dim=24, n_layers=1, n_heads=4, n_words=40),
    "clip": lambda: made("CLIP", **PAIR),
    "metaclip": lambda: made("MetaClip2", **PAIR),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages_can_be_read(name: str) -> None:
    """Whole sentences, each said once, no longer than a few lines, and no advice about arguments that are not there."""
    with pytest.raises(AdapterError) as error:
        cofiprune.structure(REFUSED[name]())
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    assert "batch=" not in message
    assert ".." not in message.replace("...", "")
    assert not re.search(r"[a-z'] (Families|To|Pass|Load|Leave) ", message)
    parts = re.split(r"[.;(:] ?", message)
    assert all(parts.count(part) == 1 for part in parts if len(part) > 30)


@pytest.mark.parametrize("name", ["clip", "metaclip"])
def test_the_advice_for_models_of_several_works(name: str) -> None:
    model = REFUSED[name]()
    with pytest.raises(AdapterError, match=r"Leave hidden dimensions whole, units=.*'\w+projection.weight'") as error:
        cofiprune.structure(model)
    for path in re.findall(r"model\.([\w.]+) \(", str(error.value)):
        part = model.get_submodule(path)
        with cofiprune.attach(part, ("layer", "head", "intermediate")) as masks:
            masks["layers.0.heads"] = [1, 0, 1, 1]
            model.set_submodule(path, cofiprune.compact(part))
    cofiprune.record_parts(model)


class Held(nn.Module):
    """A module of one's own around a transformers model, with its configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([model])
        self.config = model.config


class Own(nn.Module):
    """A module of one's own with a transformers configuration and nothing else of it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BertConfig(**TEXT)
        self.linear = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Held(bert()), "found Held. It holds one: pass model.encoders[0] (BertModel)"),
        (lambda: nn.DataParallel(bert()), "found DataParallel. It holds one: pass model.module (BertModel)"),
        (Own, "found Own. A module of one's own becomes one by subclassing transformers.PreTrainedModel"),
        (lambda: nn.Linear(2, 2), "found Linear. A module of one's own"),
        (lambda: BertModel, "found BertModel (pass an instance"),
        (lambda: "bert-base-uncased", "found str"),
        (lambda: None, "found NoneType"),
    ],
)
def test_what_is_no_transformers_model(make: Callable[[], Any], found: str) -> None:
    message = refusal(make())
    assert message.startswith("expected a transformers model (a PreTrainedModel), ")
    assert found in message


@pytest.mark.slow  # to import sentence-transformers takes as long as all other tests here together
def test_a_sentence_transformer_says_where_its_encoder_is(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    bert().save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    place = "model" if isinstance(model[0]._modules.get("model"), BertModel) else "auto_model"
    assert f"found SentenceTransformer. It holds one: pass model[0].{place} (BertModel)" in refusal(model)
    with cofiprune.attach(model[0].get_submodule(place)) as masks:
        masks["layers.0.attention"] = [0]
        masked = model.encode("a b")
        setattr(model[0], place, cofiprune.compact(model[0].get_submodule(place)))
    assert abs(model.encode("a b") - masked).max() <= 1e-5
    model.save(str(tmp_path / "out"))
    assert abs(library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode("a b") - masked).max() <= 1e-5


class Adapted(nn.Module):
    """As PEFT puts a low-rank adapter around a projection."""

    def __init__(self, base: nn.Linear, *, merged: bool = False) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.merged = merged


class Wrapped(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config = {"default": object()}
        self.config = model.config


def adapted(*merged: bool) -> PreTrainedModel:
    model = bert("BertForSequenceClassification")
    attention = model.bert.encoder.layer[0].attention.self
    for name, state in zip(("query", "value"), merged, strict=False):
        setattr(attention, name, Adapted(getattr(attention, name), merged=state))
    return model


def test_adapters_of_peft() -> None:
    message = refusal(adapted(False, False))
    assert "BertForSequenceClassification has PEFT adapters in 2 modules" in message
    assert "'bert.encoder.layer.0.attention.self.query' the first. Put them into the weights" in message
    assert "model = peft_model.merge_and_unload()" in message


def test_adapters_of_peft_that_are_merged_in_part() -> None:
    assert "2 modules, 'bert.encoder.layer.0.attention.self.query' the first, 1 of them merged" in refusal(
        adapted(True, False)
    )
    assert "2 of them merged and not taken out" in refusal(adapted(True, True))


def test_models_wrapped_by_peft() -> None:
    assert "Wrapped has PEFT adapters in 1 modules" in refusal(Wrapped(adapted(False)))
    assert "get_base_model()" in refusal(Wrapped(bert()))


def test_a_configuration_of_another_quantisation() -> None:
    model = bert()
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    assert "BertModel is quantised (bitsandbytes). Its weights cannot be cut" in refusal(model)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "is quantised (gptq)" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_few_bits(dtype: torch.dtype) -> None:
    model = bert()
    weight = model.pooler.dense.weight
    model.pooler.dense.weight = nn.Parameter(torch.zeros(weight.shape).to(dtype), requires_grad=False)
    assert f"('pooler.dense.weight' is of {dtype})" in refusal(model)


def test_layers_of_a_package_that_quantises() -> None:
    model = bert()
    model.pooler.dense = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(24, 24)
    assert "('pooler.dense' is a Linear8bitLt)" in refusal(model)


def test_compacted_models_are_not_taken_for_quantised_ones() -> None:
    model = bert()
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1, 0, 1, 1]
        small = cofiprune.compact(model)
    assert cofiprune.structure(small)["layers.0.heads"].size == 3


class Described(Adapter):
    model_types = ("remote-thing",)

    def describe(self, config: PretrainedConfig) -> Any:
        return cofiprune.adapter_for(bert()).describe(BertConfig(**TEXT))


def test_code_from_a_repository_needs_an_adapter(register: Callable[[Adapter], None]) -> None:
    config = BertConfig(**TEXT)
    cls = type("RemoteModel", (BertModel,), {"__module__": "transformers_modules.someone.thing.modeling_thing"})
    model = cls(config)
    model.config.model_type = "remote-thing"
    message = refusal(model)
    assert "RemoteModel is code from a model's own repository (trust_remote_code)" in message
    assert "cofiprune.register_adapter(MyAdapter())" in message
    register(Described())
    assert cofiprune.structure(model)["layers.0.heads"].size == 4


def test_an_adapter_of_ones_own_for_a_model_of_several_comes_first(register: Callable[[Adapter], None]) -> None:
    """Who registers an adapter for a whole knows what it is."""
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**SIZES, image_size=8, patch_size=4), BertConfig(**TEXT)
    )

    class Whole(Adapter):
        model_types = ("vision-text-dual-encoder",)

    register(Whole())
    with pytest.raises(AdapterError, match=r"Whole has no describe"):
        cofiprune.structure(transformers.VisionTextDualEncoderModel(config))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        lambda module: l1_unstructured(module, "weight", 0.5),
    ],
)
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("BertModel", "encoder.layer.0.intermediate.dense"),
        ("BertModel", "pooler.dense"),
        ("SplinterModel", "encoder.layer.0.attention.self.query"),  # declared nowhere
    ],
)
def test_weights_that_are_computed(change: Callable[[nn.Module], Any], name: str, path: str) -> None:
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**TEXT))
    change(model.get_submodule(path))
    message = refusal(model)
    assert f"the weight of '{path}' is no parameter: it is computed from" in message
    assert "remove_parametrizations(module, 'weight')" in message
