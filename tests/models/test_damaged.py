"""Damaged model folders, and folders with code: a one-line error that names the model, and nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from simpo.errors import SimpoError
from simpo.models.checkpoint import Checkpoint, model_digest
from simpo.models.loading import check_model_files, generation_config, load_model, load_tokenizer
from simpo.models.reward import load_reward_model
from simpo.models.settings import ModelArguments


@pytest.fixture
def model(make_model, tmp_path):
    """The folder of a tiny model."""
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def make_adapter(make_model, tmp_path):
    """``make_adapter(**changes)``: the folder of an adapter for a tiny model, with a changed configuration."""

    def make(**changes):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
        get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
        change_json(tmp_path / "adapter" / "adapter_config.json", **changes)
        return tmp_path / "adapter"

    return make


def change_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def pickled(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def test_pickled_weights_need_permission(model):
    weights = load_model(str(model)).state_dict()
    pickled(model)
    for load in (load_model, lambda name: check_model_files(ModelArguments(name))):
        with pytest.raises(SimpoError, match=r"pytorch_model\.bin.*safetensors.*--allow_pickle"):
            load(str(model))
    allowed = load_model(ModelArguments(str(model), allow_pickle=True)).state_dict()
    assert all(torch.equal(allowed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("allowed", [False, True])
def test_code_in_a_pickle_never_runs(model, tmp_path, allowed):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SimpoError, match="model_name_or_path"):
        load_model(ModelArguments(str(model), allow_pickle=allowed))
    assert not (tmp_path / "ran").exists()


def index(model, file):
    """Replace the weights of ``model`` by an index that says that they are all in ``file``."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    total = sum(tensor.nbytes for tensor in weights.values())
    change_json(
        model / "model.safetensors.index.json", metadata={"total_size": total}, weight_map=dict.fromkeys(weights, file)
    )
    return weights


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("file", ["weights.pkl", "pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_with_any_name_need_permission(model, file, decoy):
    if file == "adapter_model.bin":
        change_json(model / "config.json", transformers_weights=file)
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
    else:
        weights = index(model, file)
    if decoy:
        save_file({}, model / "other.safetensors")
    torch.save(weights, model / file)
    for load in (load_model, lambda name: check_model_files(ModelArguments(name)), load_reward_model):
        with pytest.raises(SimpoError, match=f"{file}.*--allow_pickle"):
            load(str(model))
    allowed = load_model(ModelArguments(str(model), allow_pickle=True)).state_dict()
    assert all(torch.equal(allowed[name], weights[name].float()) for name in weights)
    before = model_digest(ModelArguments(str(model)))
    (model / file).write_bytes(b"other")
    assert model_digest(ModelArguments(str(model))) != before


@pytest.fixture
def cached(model, tmp_path, monkeypatch):
    """``cached()``: puts the model into the hub's cache as ``someone/model``."""

    def move() -> None:
        repository = tmp_path / "hub" / "models--someone--model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.move(model, repository / "snapshots" / ("0" * 40))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return move


def test_pickled_weights_of_a_model_on_the_hub_need_permission(model, cached):
    torch.save(index(model, "weights.pkl"), model / "weights.pkl")
    cached()
    with pytest.raises(SimpoError, match=r"weights\.pkl.*--allow_pickle"):
        load_model("someone/model")
    load_model(ModelArguments("someone/model", allow_pickle=True))


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("file", ["../other/model.safetensors", "{tmp_path}/other/model.safetensors", 3, None])
def test_weights_outside_the_folder_are_rejected(model, tmp_path, file, allowed):
    shutil.copytree(model, tmp_path / "other")
    index(model, file.format(tmp_path=tmp_path) if isinstance(file, str) else file)
    arguments = ModelArguments(str(model), allow_pickle=allowed)
    for load in (load_model, model_digest, load_reward_model):
        with pytest.raises(SimpoError, match=r"model_name_or_path: .*model\.safetensors\.index\.json"):
            load(arguments)


def test_weights_outside_the_folder_of_the_configuration_are_rejected(model):
    shutil.copytree(model, model / "inside")
    change_json(model / "config.json", transformers_weights="inside/model.safetensors")
    with pytest.raises(SimpoError, match=r"model_name_or_path: .*transformers_weights"):
        load_model(str(model))


def test_weights_named_by_an_index_are_loaded(model):
    weights = index(model, "shard.safetensors")
    save_file(weights, model / "shard.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(model)).state_dict()
    assert all(torch.equal(loaded[name], weights[name].float()) for name in weights)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_file_that_affects_a_result_is_part_of_the_identity(model, name):
    if not (model / name).exists():
        (model / name).write_text('{"version": "1.0"}')
    (model / "notes.txt").write_text("not a part")
    before = model_digest(ModelArguments(str(model)))
    (model / "notes.txt").unlink()
    assert model_digest(ModelArguments(str(model))) == before
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(content)
    assert model_digest(ModelArguments(str(model))) != before


def test_pickled_weights_are_part_of_the_identity(model):
    pickled(model)
    before = model_digest(ModelArguments(str(model)))
    (model / "pytorch_model.bin").write_bytes(b"other")
    assert model_digest(ModelArguments(str(model))) != before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"x"', '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}', "[" * 9999]
)
def test_damaged_generation_settings_are_reported(model, text):
    assert generation_config(str(model), "main").eos_token_id == load_model(str(model)).generation_config.eos_token_id
    (model / "generation_config.json").write_text(text)
    for load in (load_model, lambda name: generation_config(name, "main")):
        with pytest.raises(SimpoError, match=r"model_name_or_path: .*model.*generation_config\.json"):
            load(str(model))


def test_generation_settings_are_optional(model):
    (model / "generation_config.json").unlink()
    assert generation_config(str(model), "main") is None
    load_model(str(model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'"x"', b"\xff\x00", b"[" * 9999, b"\x00" * 4 + b"\x01" * 60])
def test_damaged_files_are_reported(model, name, content):
    (model / name).write_bytes(content)
    load = load_tokenizer if name.startswith("tokenizer") else load_model
    with pytest.raises(SimpoError, match=r"model_name_or_path: .*model"):
        load(str(model))


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "("},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"(": 1}},
        {"exclude_modules": "("},
        {"rank_pattern": 3},
        {"base_model_name_or_path": 3},
        {"base_model_name_or_path": None},
        {"revision": 3},
        {"r": "x"},
        {"peft_type": "NOPE"},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    ],
)
def test_damaged_adapters_are_reported(make_adapter, model, change):
    with pytest.raises(SimpoError, match="adapter"):
        load_model(str(make_adapter(**{"base_model_name_or_path": str(model)} | change)))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_reward_model, model_digest, Checkpoint.read])
def test_an_adapter_of_an_adapter_is_rejected(make_adapter, model, tmp_path, load):
    adapter = make_adapter(base_model_name_or_path=str(tmp_path / "adapter"))
    (adapter / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(SimpoError, match=r"adapter.*itself an adapter.*simpo merge"):
        load(ModelArguments(str(adapter)))


def test_an_adapter_of_an_adapter_on_the_hub_is_rejected(make_adapter, model, cached):
    for file in make_adapter(base_model_name_or_path="someone/base").iterdir():
        shutil.copy(file, model)
    cached()
    with pytest.raises(SimpoError, match=r"someone/model.*itself an adapter"):
        load_model(str(make_adapter(base_model_name_or_path="someone/model")))


@pytest.mark.parametrize("count", [10_001, 100_000, 1_000_000_000, 1e9])
@pytest.mark.parametrize("change", [{"num_hidden_layers": ...}, {"text_config": {"n_layer": ...}}])
def test_too_many_layers_are_reported_at_once(model, monkeypatch, change, count):
    def reached(*_, **__):
        raise AssertionError("transformers would build lists of these layers")

    change_json(model / "config.json", **json.loads(json.dumps(change, default=lambda _: count)))
    monkeypatch.setattr(AutoConfig, "from_pretrained", reached)
    for load in (load_model, load_reward_model, lambda name: Checkpoint.read(ModelArguments(name))):
        with pytest.raises(SimpoError, match=r"model_name_or_path: .*config\.json: (num_hidden_layers|n_layer) is 1"):
            load(str(model))


@pytest.mark.parametrize("factor", [1e300, float("nan"), float("inf"), "x"])
def test_position_limits_without_a_meaning_are_reported(model, factor):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 10**18}
    change_json(model / "config.json", rope_parameters=rope)
    assert Checkpoint.read(ModelArguments(str(model))).context == 4 * 10**18
    change_json(model / "config.json", rope_parameters=rope | {"factor": factor})
    with pytest.raises(SimpoError, match=r"model_name_or_path: .*model"):
        Checkpoint.read(ModelArguments(str(model)))


def test_an_attention_implementation_from_the_hub_counts_as_code():
    with pytest.raises(SimpoError, match=r"attn_implementation: .*trust_remote_code"):
        ModelArguments("x", attn_implementation="org/kernel")
    ModelArguments("x", attn_implementation="org/kernel", trust_remote_code=True)


def test_a_tokenizer_with_settings_of_the_wrong_type_is_reported(chat_world, tmp_path):
    folder = shutil.copytree(chat_world / "model", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": []}))
    with pytest.raises(SimpoError, match=r"model_name_or_path: .*model"):
        load_tokenizer(str(folder))


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


TENFOLD = replace({"String": "a"}, "a" * 10)


@pytest.mark.parametrize(
    ("part", "steps", "growth"),
    [
        ("normalizer", [TENFOLD] * 4, "10,000"),
        ("decoder", [TENFOLD] * 9, "1,000,000,000"),
        ("normalizer", [TENFOLD, TENFOLD, {"type": "Sequence", "normalizers": [TENFOLD, TENFOLD]}], "10,000"),
        ("normalizer", [replace({"Regex": "(?=a)"}, "a")] * 10, "1,024"),
        ("normalizer", [{"type": "Prepend", "prepend": "a" * 9}, *[TENFOLD] * 3], "10,000"),
        ("normalizer", [TENFOLD] * 3, None),
        ("normalizer", [replace({"String": c}, "0" * 3) for c in "abcdefghij"], None),  # they do not multiply
    ],
)
def test_tokenizers_that_make_texts_huge_are_rejected(chat_world, tmp_path, part, steps, growth):
    folder = shutil.copytree(chat_world / "model", tmp_path / "model")
    change_json(folder / "tokenizer.json", **{part: {"type": "Sequence", f"{part}s": steps}})
    if growth is None:
        assert load_tokenizer(str(folder)).backend_tokenizer.normalizer.normalize_str("a") in ("a" * 1000, "000")
        return
    with pytest.raises(SimpoError, match=rf"model_name_or_path: .*tokenizer\.json: its {part} .*{growth} times"):
        load_tokenizer(str(folder))
