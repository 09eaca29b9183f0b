"""Directories of the original CoFi release: what they load as, and what is refused.

The oracle is the original's forward under masks, written down here once more as plain tensor arithmetic in float64;
where sample directories made by the original itself are at hand, they are compared with as well.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel

import cofiprune
from cofiprune.cofi_checkpoint import convert, load_cofi_checkpoint
from cofiprune.errors import CheckpointError

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "cofi"
SAMPLES = (
    "bert4-binary-released", "bert4-soft_binhidden-full_zs", "roberta4-binary-released",
    "roberta4-soft_binhidden-full_zs",
)  # fmt: skip
SEQUENCE, ANSWER = "ForSequenceClassification", "ForQuestionAnswering"
AUTO = {SEQUENCE: AutoModelForSequenceClassification, ANSWER: AutoModelForQuestionAnswering}
KINDS = [(family, head) for family in ("bert", "roberta") for head in (SEQUENCE, ANSWER)]
PREFIX = {"bert": "Bert", "roberta": "Roberta"}
H, LAYERS, HEADS, WIDTH, VOCABULARY = 32, 3, 4, 24, 50
TOLERANCE = 2e-5

State = dict[str, Tensor]


def dense_model(family: str = "bert", head: str = SEQUENCE, **settings: Any) -> PreTrainedModel:
    """A tiny dense model in which no bias is zero and no norm is trivial."""
    torch.manual_seed(0)
    if head == SEQUENCE:
        settings = {"num_labels": 3, **settings}
    sizes = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": WIDTH}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, max_position_embeddings=40, **sizes, **settings)
    model = AUTO[head].from_config(config, dtype=torch.float32)
    for name, value in model.named_parameters():
        noise = torch.randn_like(value) * 0.2
        value.data = noise + (1 if name.endswith("LayerNorm.weight") else 0)
    return model.eval()


def original_state(model: PreTrainedModel, family: str) -> State:
    """The state dict as the original's class has it, with what the ordinary class lacks."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[f"{family}.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    for name in (f"{family}.pooler.dense", "layer_transformation"):
        state.setdefault(f"{name}.weight", torch.randn(H, H))
        state.setdefault(f"{name}.bias", torch.randn(H))
    return state


def original_config(model: PreTrainedModel, family: str, head: str) -> dict[str, Any]:
    """The configuration as transformers 4 wrote it for the original's class."""
    entries = model.config.to_dict()
    for name in ("dtype", "architectures", "transformers_version"):
        entries.pop(name, None)
    return entries | {
        "architectures": [f"CoFi{PREFIX[family]}{head}"],
        "do_layer_distill": True,
        "output_attentions": True,
        "output_hidden_states": True,
        "position_embedding_type": "absolute",
        "pruned_heads": {"0": [0, 1, 2], "2": []},
        "torch_dtype": "float32",
        "transformers_version": "4.28.1",
    }


def soft_masks(seed: int = 1) -> State:
    """Masks of all five kinds as the original stores them: zeros and fractions, no ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, zero: float) -> Tensor:
        values = torch.rand(shape, generator=generator) * 0.8 + 0.15
        return values * (torch.rand(shape, generator=generator) > zero)

    masks = {
        "head_z": draw(LAYERS, 1, HEADS, 1, 1, zero=0.4),
        "head_layer_z": draw(LAYERS, zero=0),
        "intermediate_z": draw(LAYERS, 1, 1, WIDTH, zero=0.5),
        "mlp_z": draw(LAYERS, zero=0),
        "hidden_z": draw(H, zero=0.3),
    }
    masks["head_z"][:, :, 0], masks["intermediate_z"][..., 0] = 0.7, 0.6
    masks["head_layer_z"][1] = masks["mlp_z"][2] = 0
    return masks


def binary(masks: State) -> State:
    return {name: (value > 0).float() for name, value in masks.items()}


def example(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    padding = 1 if family == "roberta" else 0
    return {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}


def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    assert "hidden_states" not in outputs
    assert "attentions" not in outputs
    if "logits" in outputs:
        return outputs.logits
    # Positions under padding have no meaning that anybody reads.
    both = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    return both * inputs["attention_mask"].unsqueeze(-1)


def reference(state: State, masks: State, config: Any, head: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the original under masks [as stored in zs.pt], in float64."""
    family, layers, heads = config.model_type, config.num_hidden_layers, config.num_attention_heads
    w = {name: value.double() for name, value in state.items()}
    z = {name: value.detach().double() for name, value in masks.items()}
    hidden_z = z.get("hidden_z", torch.ones(config.hidden_size, dtype=torch.float64))
    there = hidden_z.nonzero().flatten()

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = w[f"{name}.LayerNorm.weight"][there], w[f"{name}.LayerNorm.bias"][there]
        small = F.layer_norm(x[..., there], (len(there),), scale, shift, config.layer_norm_eps)
        return torch.zeros_like(x).index_copy(-1, there, small) * hidden_z

    def leave(block: Tensor, x: Tensor, name: str) -> Tensor:
        """A block whose output sums to zero is skipped with its norm; otherwise bias and norm act."""
        return x if block.sum() == 0 else norm(block * hidden_z + x, name)

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if family == "roberta":
        seen = (ids != config.pad_token_id).long()
        positions = seen.cumsum(1) * seen + config.pad_token_id
    else:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    types = inputs.get("token_type_ids", torch.zeros_like(ids))
    x = sum(
        w[f"{family}.embeddings.{kind}_embeddings.weight"][index]
        for kind, index in (("word", ids), ("position", positions), ("token_type", types))
    )
    x = norm(x * hidden_z, f"{family}.embeddings")
    for i in range(layers):
        path = f"{family}.encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{path}.attention.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + (mask[:, None, None] == 0) * -1e9
        context = scores.softmax(-1) @ v * (z["head_z"][i] if "head_z" in z else 1)
        block = linear(context.transpose(1, 2).flatten(2), f"{path}.attention.output.dense")
        x = leave(block * (z["head_layer_z"][i] if "head_layer_z" in z else 1), x, f"{path}.attention.output")
        inner = F.gelu(linear(x, f"{path}.intermediate.dense")) * (
            z["intermediate_z"][i] if "intermediate_z" in z else 1
        )
        block = linear(inner, f"{path}.output.dense") * (z["mlp_z"][i] if "mlp_z" in z else 1)
        x = leave(block, x, f"{path}.output")
    if head == ANSWER:
        return linear(x, "qa_outputs") * mask.unsqueeze(-1)
    if family == "roberta":
        return linear(torch.tanh(linear(x[:, 0], "classifier.dense")), "classifier.out_proj")
    return linear(torch.tanh(linear(x[:, 0], f"{family}.pooler.dense")), "classifier")


def released_state(state: State, masks: State, family: str) -> State:
    """Cut the weights by binary masks as the original does, with all that it leaves in the file."""
    hidden = masks["hidden_z"].nonzero().flatten()
    cut = dict(state)
    for name, value in state.items():
        match = re.search(r"encoder\.layer\.(\d+)\.(.*)", name)
        layer, part = (int(match[1]), match[2]) if match else (0, "")
        heads = (masks["head_z"][layer].flatten() * masks["head_layer_z"][layer]).repeat_interleave(H // HEADS)
        width = masks["intermediate_z"][layer].flatten() * masks["mlp_z"][layer]
        if part.startswith("attention"):
            inner, writer = heads.nonzero().flatten(), part.startswith("attention.output")
        elif part:
            inner, writer = width.nonzero().flatten(), part.startswith("output")
        if part and "LayerNorm" in part:
            full = part.startswith("attention") and not len(inner)
            cut[name] = value if full else value[hidden]
        elif part and not len(inner):
            del cut[name]
        elif part:
            rows, columns = (hidden, inner) if writer else (inner, hidden)
            cut[name] = value[rows][:, columns] if value.dim() == 2 else value[rows]
        elif re.search(r"embeddings\.\w+_embeddings|pooler\.dense\.w|er\.dense\.w|qa_outputs\.w|^layer_t\w+\.w", name):
            cut[name] = value[:, hidden]
        elif "LayerNorm" in name:
            cut[name] = value[hidden]
    return cut


def write(folder: Path, state: State, config: dict[str, Any], masks: Any = None, **how: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin", **how)
    if masks is not None:
        torch.save(masks, folder / "zs.pt")
    return folder


def full(folder: Path, family: str = "bert", head: str = SEQUENCE, masks: Any = None, **settings: Any) -> Path:
    """A directory of full weights and masks."""
    model = dense_model(family, head, **settings)
    zs = soft_masks() if masks is None else masks
    return write(folder, original_state(model, family), original_config(model, family, head), zs)


def released(folder: Path, family: str = "bert", head: str = SEQUENCE, masks: State | None = None) -> Path:
    """A directory of cut weights."""
    model = dense_model(family, head)
    state = released_state(original_state(model, family), binary(masks or soft_masks()), family)
    return write(folder, state, original_config(model, family, head))


def expected(masks: State, family: str = "bert", head: str = SEQUENCE) -> Tensor:
    model = dense_model(family, head)
    return reference(original_state(model, family), masks, model.config, head, example(family))


def difference(model: PreTrainedModel, masks: State, family: str = "bert", head: str = SEQUENCE) -> float:
    return float((outputs_of(model, example(family)) - expected(masks, family, head)).abs().max())


def check_reload(model: PreTrainedModel, auto: Any, inputs: dict[str, Tensor], folder: Path) -> None:
    model.save_pretrained(folder)
    assert torch.equal(outputs_of(auto.from_pretrained(folder), inputs), outputs_of(model, inputs))


def sample(name: str) -> Path:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"sample directory {name} is not here")
    return folder


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_the_original(name: str, tmp_path: Path) -> None:
    folder = sample(name)
    inputs = load_file(folder / "inputs.safetensors")
    kind = "masked_logits" if name.endswith("zs") else "logits"
    logits = load_file(folder / f"expected_{kind}.safetensors")["logits"]
    model = load_cofi_checkpoint(folder)
    assert not model.training
    assert float((outputs_of(model, inputs) - logits).abs().max()) <= TOLERANCE
    check_reload(model, AutoModelForSequenceClassification, inputs, tmp_path)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.endswith("zs")])
def test_the_reference_agrees_with_the_original(name: str) -> None:
    folder = sample(name)
    config = AutoConfig.from_pretrained(folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    masks = torch.load(folder / "zs.pt", weights_only=True)
    ours = reference(state, masks, config, SEQUENCE, load_file(folder / "inputs.safetensors"))
    theirs = load_file(folder / "expected_masked_logits.safetensors")["logits"]
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "head"), KINDS)
def test_released_form(family: str, head: str, tmp_path: Path) -> None:
    masks = binary(soft_masks())
    model = load_cofi_checkpoint(released(tmp_path / "in", family, head))
    assert type(model).__name__ == f"{PREFIX[family]}{head}"
    assert difference(model, masks, family, head) <= TOLERANCE
    found = cofiprune.structure(model)
    assert found["hidden"].size == int(masks["hidden_z"].sum())
    assert found["layers.0.heads"].size == int(masks["head_z"][0].sum())
    assert "layers.1.heads" not in found
    assert "layers.2.intermediate" not in found
    check_reload(model, AUTO[head], example(family), tmp_path / "out")


@pytest.mark.parametrize(("family", "head"), KINDS)
def test_full_form_folds_every_mask_exactly(family: str, head: str, tmp_path: Path) -> None:
    masks = soft_masks()  # hidden masks are fractional too
    model = load_cofi_checkpoint(full(tmp_path / "in", family, head, masks))
    assert difference(model, masks, family, head) <= TOLERANCE
    assert model.num_parameters() < dense_model(family, head).num_parameters()
    check_reload(model, AUTO[head], example(family), tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("head_z",),
        ("intermediate_z",),
        ("hidden_z",),
        ("head_layer_z", "mlp_z"),  # block gates alone count; the original's compaction ignores them
        ("head_z", "mlp_z"),
        ("head_z", "head_layer_z", "hidden_z"),
    ],
)
def test_absent_masks_are_ones(names: tuple[str, ...], tmp_path: Path) -> None:
    masks = {name: soft_masks()[name] for name in names}
    assert difference(load_cofi_checkpoint(full(tmp_path, masks=masks)), masks) <= TOLERANCE


@pytest.mark.parametrize("form", [full, released])
def test_whole_layers_gone(form: Any, tmp_path: Path) -> None:
    masks = soft_masks()
    masks["head_layer_z"][:2] = masks["mlp_z"][:2] = 0
    masks = binary(masks) if form is released else masks
    model = load_cofi_checkpoint(form(tmp_path, masks=masks))
    assert difference(model, masks) <= TOLERANCE
    assert {group.layer for group in cofiprune.structure(model).values()} == {None, 2}


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_open_block_without_inner_units_keeps_its_bias_and_norm(family: str, gates: bool, tmp_path: Path) -> None:
    masks = soft_masks()
    masks["head_z"][0] = 0
    masks["intermediate_z"][1] = 0
    if not gates:
        del masks["head_layer_z"], masks["mlp_z"]
    model = load_cofi_checkpoint(full(tmp_path, family, masks=masks))
    assert difference(model, masks, family) <= TOLERANCE
    found = cofiprune.structure(model)
    assert found["layers.0.heads"].size == found["layers.1.intermediate"].size == 1


def test_an_open_block_without_inner_units_and_bias_is_skipped(tmp_path: Path) -> None:
    masks = soft_masks()
    masks["intermediate_z"][0] = 0
    model = dense_model()
    state = original_state(model, "bert")
    state["bert.encoder.layer.0.output.dense.bias"].zero_()
    small = load_cofi_checkpoint(write(tmp_path, state, original_config(model, "bert", SEQUENCE), masks))
    wanted = reference(state, masks, model.config, SEQUENCE, example("bert"))
    assert float((outputs_of(small, example("bert")) - wanted).abs().max()) <= TOLERANCE
    assert "layers.0.ffn" not in cofiprune.structure(small)


def test_masks_from_a_gpu_that_require_grad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {name: value.requires_grad_() for name, value in soft_masks().items()}
    masks["hidden_z"] = torch.nn.Parameter(masks["hidden_z"].detach())
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    folder = full(tmp_path, masks=masks)
    monkeypatch.undo()
    assert difference(load_cofi_checkpoint(folder), masks) <= TOLERANCE


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_old_names_and_old_files(form: str, tmp_path: Path) -> None:
    model, masks = dense_model(), soft_masks()
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in original_state(model, "bert").items()
    }
    # The prefix of the class that came before the release.
    config = original_config(model, "bert", SEQUENCE) | {"architectures": ["NewBertForSequenceClassification"]}
    folder = write(tmp_path, state, config, masks, _use_new_zipfile_serialization=form == "zip")
    assert difference(load_cofi_checkpoint(folder), masks) <= TOLERANCE


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    model = dense_model()
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    small = load_cofi_checkpoint(write(tmp_path, state, original_config(model, "bert", SEQUENCE), soft_masks()))
    assert small.dtype == torch.float16


def test_the_head_can_be_named(tmp_path: Path) -> None:
    folder = full(tmp_path, head=ANSWER)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="task_head"):
        load_cofi_checkpoint(folder)
    assert difference(load_cofi_checkpoint(folder, task_head=ANSWER), soft_masks(), head=ANSWER) <= TOLERANCE


def test_the_result_is_an_ordinary_model(tmp_path: Path) -> None:
    """It trains, keeps what the configuration says of the model and nothing of the run that made it."""
    folder = full(tmp_path)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = load_cofi_checkpoint(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.config.hidden_size == H
    assert not any(hasattr(model.config, name) for name in ("pruned_heads", "do_layer_distill"))
    loss = model.train()(**example("bert"), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(value.grad is not None for value in model.parameters())


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"finetuning_task": "mnli"}, ["contradiction", "entailment", "neutral"]),
        ({"finetuning_task": "MNLI", "id2label": {0: 0, 1: 1, 2: 2}}, ["contradiction", "entailment", "neutral"]),
        ({"finetuning_task": "mnli", "id2label": {0: "yes", 1: "maybe", 2: "no"}}, ["yes", "maybe", "no"]),
        ({"finetuning_task": "other"}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_label_order(settings: dict[str, Any], labels: list[str], tmp_path: Path) -> None:
    if "id2label" in settings:
        settings = settings | {"label2id": {str(label): index for index, label in settings["id2label"].items()}}
    found = load_cofi_checkpoint(full(tmp_path, **settings)).config
    assert [found.id2label[index] for index in range(3)] == labels
    assert labels == [found.id2label[index] for _, index in sorted(found.label2id.items(), key=lambda item: item[1])]


def test_convert(tmp_path: Path) -> None:
    folder = full(tmp_path / "in")
    (folder / "vocab.txt").write_text("a\n")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "l0_module.pt").write_bytes(pickle.dumps(Trap(tmp_path / "touched")))
    convert(folder, tmp_path / "deep" / "out")
    names = sorted(file.name for file in (tmp_path / "deep" / "out").iterdir())
    code = "modeling_bert_compacted.py"
    assert names == ["config.json", "model.safetensors", code, "tokenizer_config.json", "vocab.txt"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "deep" / "out")
    assert difference(model, soft_masks()) <= TOLERANCE
    assert not (tmp_path / "touched").exists()
    with pytest.raises(CheckpointError, match="choose another"):
        convert(folder, tmp_path / "in" / ".." / "in")
    with pytest.raises(CheckpointError, match="cannot write"):
        convert(folder, folder / "vocab.txt" / "out")
    with pytest.raises(CheckpointError, match="load it by from_pretrained"):
        load_cofi_checkpoint(converted_twice(tmp_path))


def converted_twice(tmp_path: Path) -> Path:
    """A directory of ours that happens to hold the original's file too."""
    folder = tmp_path / "deep" / "out"
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def edit_config(folder: Path, **changes: Any) -> None:
    entries = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in entries.items() if value != "-"}))


def edit_weights(folder: Path, change: Any) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def edit_masks(folder: Path, **changes: Any) -> None:
    torch.save(torch.load(folder / "zs.pt", weights_only=True) | changes, folder / "zs.pt")


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def flip(file: Path, value: Tensor) -> None:
    data = bytearray(file.read_bytes())
    data[data.find(value.numpy().tobytes()[:16]) + 3] ^= 0x40
    file.write_bytes(data)


def drop(*endings: str) -> Any:
    def change(state: State) -> None:
        for name in [name for name in state if any(ending in name for ending in endings)]:
            del state[name]

    return change


def rebased(state: State) -> None:
    for name in list(state):
        state[name.replace("bert.", "roberta.", 1)] = state.pop(name)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_cofi_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


WRONG_FILES = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "no weights": (lambda d: (d / "pytorch_model.bin").unlink(), r"has no pytorch_model\.bin; in it: config\.json"),
    "no masks": (lambda d: (d / "zs.pt").unlink(), "neither form.*full size and there is no zs.pt"),
    "truncated weights": (lambda d: truncate(d / "pytorch_model.bin"), r"pytorch_model\.bin is damaged"),
    "truncated masks": (lambda d: truncate(d / "zs.pt"), r"zs\.pt is damaged"),
    "empty weights": (lambda d: (d / "pytorch_model.bin").write_bytes(b""), r"pytorch_model\.bin is damaged"),
    "pointer": (
        lambda d: (d / "pytorch_model.bin").write_text("version https://lfs"), r"pytorch_model\.bin is damaged"),
    "flipped bit": (lambda d: flip(d / "zs.pt", soft_masks()["hidden_z"]), r"zs\.pt is damaged: the checksum"),
    "broken config": (lambda d: truncate(d / "config.json"), r"config\.json is damaged"),
    "other json": (lambda d: (d / "config.json").write_text("[]"), "holds a list instead of an object"),
    "masks are none": (lambda d: torch.save(None, d / "zs.pt"), "holds a NoneType"),
    "nested": (lambda d: torch.save({"model": {}}, d / "pytorch_model.bin"), "holds a dict under 'model'"),
}  # fmt: skip
WRONG_PARTS = {
    "unknown model": (lambda d: edit_config(d, model_type="nix"), "model_type 'nix'"),
    "bad value": (lambda d: edit_config(d, hidden_size="wide"), "no valid bert configuration"),
    "impossible": (lambda d: edit_config(d, num_attention_heads=5), "gives no bert model: .*not a multiple"),
    "other family": (lambda d: edit_config(d, model_type="roberta"), "contradicts itself"),
    "other weights": (lambda d: edit_weights(d, rebased), "names start with 'roberta', those of the 'bert' model"),
    "too many layers": (lambda d: edit_config(d, num_hidden_layers=4), "nothing of 'bert.encoder.layer.3'"),
    "too few layers": (lambda d: edit_config(d, num_hidden_layers=2), "of 2 layers has no 'bert.encoder.layer.2"),
    "other labels": (
        lambda d: edit_config(d, id2label={0: "a", 1: "b"}), r"'classifier.weight' has the shape \(3, 32\)"),
    "other vocabulary": (
        lambda d: edit_config(d, vocab_size=51), r"has the shape \(50, 32\), which is no cut of \(51,"),
    "narrower": (lambda d: edit_config(d, hidden_size=16), "is no cut of"),
    "missing tensor": (
        lambda d: edit_weights(d, drop("0.attention.self.key.bias")), "0.attention.self.key.bias' is missing"),
    "half a block": (lambda d: edit_weights(d, drop("1.output.dense.weight")), "without .*1.output.dense.weight"),
    "no head": (lambda d: edit_weights(d, drop("classifier")), r"'classifier.bias' is missing \(2 such"),
    "unknown tensor": (lambda d: edit_weights(d, lambda s: s.update(x=torch.ones(1))), "has no 'x'"),
    "unknown mask": (lambda d: edit_masks(d, qk_z=torch.ones(3)), "mask 'qk_z'"),
    "other layers' masks": (lambda d: edit_masks(d, mlp_z=torch.ones(12)), r"'mlp_z' has the shape \(12,\).*3 x 1"),
    "above one": (lambda d: edit_masks(d, hidden_z=torch.full((H,), 1.5)), r"'hidden_z' has values.*\[0, 1\]"),
    "not a number": (lambda d: edit_masks(d, mlp_z=torch.full((3,), torch.nan)), "'mlp_z' has values"),
    "nothing left": (lambda d: edit_masks(d, hidden_z=torch.zeros(H)), "zs.pt: every hidden dimension"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*WRONG_FILES, *WRONG_PARTS])
def test_wrong_input(case: str, tmp_path: Path) -> None:
    damage, message = (WRONG_FILES | WRONG_PARTS)[case]
    folder = full(tmp_path)
    damage(folder)
    refuse(folder, message)


def test_no_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no directory .*hf download")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "is a file; give the directory")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"has no config\.json and no pytorch_model\.bin; in it: nothing")
    dense_model().save_pretrained(tmp_path / "dense")
    refuse(tmp_path / "dense", "load by from_pretrained")


def test_weights_that_are_cut_already_take_no_masks(tmp_path: Path) -> None:
    torch.save(soft_masks(), released(tmp_path) / "zs.pt")
    refuse(tmp_path, "cut already")


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("2.attention.output.dense.bias", 1, "contradicts itself on 'hidden'"),
        ("0.attention.output.dense.weight", 3, "no cut of"),
    ],
)
def test_cut_weights_that_fit_no_model(name: str, cut: int, message: str, tmp_path: Path) -> None:
    """One hidden dimension less than elsewhere, and heads that are cut in the middle."""

    def narrow(state: State) -> None:
        state[f"bert.encoder.layer.{name}"] = state[f"bert.encoder.layer.{name}"][..., :-cut]

    edit_weights(released(tmp_path), narrow)
    refuse(tmp_path, message)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "zs.pt"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_code_is_never_executed(file: str, form: str, tmp_path: Path) -> None:
    folder, touched = full(tmp_path / "in"), tmp_path / "touched"
    payload = {"bert.x": torch.ones(2), "trap": Trap(touched)}
    if form == "plain":
        (folder / file).write_bytes(pickle.dumps({"trap": Trap(touched)}))
    else:
        torch.save(payload, folder / file, _use_new_zipfile_serialization=form == "zip")
    refuse(
        folder, rf"{file} contains pickled code \(\w+\.mkdir\)|{file} is damaged, or a pickle of anything but tensors"
    )
    assert not touched.exists()
    torch.load(folder / file, weights_only=False) if form != "plain" else pickle.loads((folder / file).read_bytes())
    assert touched.exists(), "the trap itself does not work"


def test_the_directory_is_left_as_it_was(tmp_path: Path) -> None:
    folder = full(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    load_cofi_checkpoint(folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
