"""Model files that contradict their configuration, and limits on what a model can read: rejected in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from simpo import PreferenceTrainer, SimpoError, cli
from simpo.models.checkpoint import Limits
from simpo.models.loading import check_model_files, load_model
from simpo.models.reward import load_reward_model
from simpo.models.settings import ModelArguments
from simpo.training.batches import check_rows


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model("qwen2", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def variant(base, tmp_path):
    """``variant(config=..., rename=..., without=..., extra=...)``: the folder of a modified model."""

    def make(config=None, rename=None, without=None, extra=None) -> Path:
        folder = shutil.copytree(base, tmp_path / "variant")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        weights = load_file(folder / "model.safetensors") | (extra or {})
        weights = {(rename or str)(key): value for key, value in weights.items() if key != without}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def layers(count: int) -> dict:
    """Return the configuration keys for this many layers."""
    return {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}


MASK = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.attn.bias": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": layers(4)}, r"12 missing \(model\.layers\.3\.input_layernorm\.weight, "),
        ({"config": layers(2)}, r"12 unexpected \(model\.layers\.2\.input_layernorm\.weight, "),
        ({"config": {"vocab_size": 70}}, r"2 with the wrong shape \(lm_head\.weight, model\.embed_tokens\.weight\)"),
        ({"without": "lm_head.weight"}, r"1 missing \(lm_head\.weight\)"),
        ({"extra": {"v_head.weight": torch.ones(1)}}, r"1 unexpected \(v_head\.weight\)"),
        ({"rename": "base_model.model.{}".format}, r"39 unexpected \(base_model\.model\.lm_head\.weight, "),
        ({"rename": "module.{}".format}, r"39 missing .*39 unexpected \(module\.lm_head\.weight, "),
        ({"rename": "_orig_mod.{}".format}, r"39 missing .*39 unexpected \(_orig_mod\.lm_head\.weight, "),
        (
            {"rename": lambda key: key.replace("model.", "model.language_model.", 1)},
            r"38 missing .*38 unexpected \(model\.language_model\.embed_tokens\.weight, ",
        ),
    ],
)
def test_mismatched_weights_are_reported_by_name(changes, message, variant):
    folder = variant(**changes)
    for load in (load_model, lambda name: check_model_files(ModelArguments(name))):
        with pytest.raises(SimpoError, match=message) as error:
            load(str(folder))
        assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    with pytest.raises(SimpoError):
        load_reward_model(ModelArguments(str(folder)))


@pytest.mark.parametrize("changes", [{}, {"extra": MASK}, {"rename": lambda key: key.removeprefix("model.")}])
def test_harmless_weight_differences_are_accepted(changes, variant, base):
    """Buffers stored in old checkpoints, and weight names of a bare model."""
    found, expected = (load_model(str(folder)).state_dict() for folder in (variant(**changes), base))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_tied_weights_are_stored_once(make_model, tmp_path):
    make_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(str(tmp_path))


def test_an_output_layer_under_a_different_name_is_loaded(make_model, tmp_path):
    make_model("gpt_neox").save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    load_model(str(tmp_path))
    load_reward_model(ModelArguments(str(tmp_path)), new_head=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_not_a_policy_and_a_language_model_is_not_a_judge(tied, make_model, tmp_path):
    make_model("qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path / "lm")
    reward = load_reward_model(ModelArguments(str(tmp_path / "lm")), new_head=True)  # as training does
    reward.save_pretrained(tmp_path / "rm")
    with pytest.raises(SimpoError, match=r"unexpected \(score\.weight\)"):
        load_model(str(tmp_path / "rm"))
    with pytest.raises(SimpoError, match=r"not a reward model: its files contain no score\.weight"):
        load_reward_model(ModelArguments(str(tmp_path / "lm")))
    config = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(config | layers(4)))
    with pytest.raises(SimpoError, match=r"12 missing \(model\.layers\.3"):
        load_reward_model(ModelArguments(str(tmp_path / "lm")), new_head=True)
    head = load_file(tmp_path / "rm/model.safetensors")
    del head["score.weight"]
    save_file(head, tmp_path / "rm/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SimpoError, match=r"score\.weight"):  # a classifier without its head is not a language model
        load_reward_model(ModelArguments(str(tmp_path / "rm")), new_head=True)


def test_every_command_rejects_a_folder_with_missing_layers(chat_world, tmp_path, capsys):
    folder = shutil.copytree(chat_world / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    data, out = chat_world / "train.jsonl", f"--output_dir={tmp_path / 'out'}"
    (tmp_path / "responses.jsonl").write_text('{"id": "0", "prompt": "What?", "responses": ["It is 3.", "It is 4."]}\n')
    named = [f"--model_name_or_path={folder}", f"--dataset_name={data}", out]
    judged = ["annotate", str(tmp_path / "responses.jsonl")]
    for command in (
        ["train", "--objective=simpo", *named],
        ["sft", *named[:1], f"--dataset_name={chat_world / 'sft.jsonl'}", out],
        ["reward", *named],
        ["sample", str(folder), str(data), out],
        ["chat", str(folder)],
        ["compare", str(folder), str(folder), f"--prompts={data}", f"--judge=logp:{folder}", f"{out}-2"],
        [*judged, f"--annotator=logp:{folder}", f"{out}-3"],
        [*judged, f"--annotator=reward:{folder}", f"{out}-4"],
    ):
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err.splitlines()[-1]
        assert "missing (" in error and "transformer.h.2" in error, command


# ---- what a model can read ----


def rows_of(*shapes, token=5) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [[token] * prompt for prompt, _ in shapes],
            "response_ids": [[[7] * n for n in responses] for _, responses in shapes],
            "where": [f"file.jsonl:{number}" for number in range(1, len(shapes) + 1)],
        }
    )


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (hf.GPT2Config(n_positions=50), 50),
        (hf.LlamaConfig(max_position_embeddings=50), 50),
        (hf.BloomConfig(), None),
        (hf.MambaConfig(), None),
        (hf.FalconConfig(alibi=True), None),
        (hf.FalconConfig(max_position_embeddings=50), 50),
        (hf.LlamaConfig(max_position_embeddings=50, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), None),
        (
            hf.Qwen2Config(
                max_position_embeddings=50,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50},
            ),
            200,
        ),
        (
            hf.LlamaConfig(
                max_position_embeddings=50,
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 25,
                },
            ),
            50,
        ),
        (hf.LlavaConfig(text_config=hf.LlamaConfig(max_position_embeddings=50)), 50),
        (hf.Gemma3TextConfig(max_position_embeddings=50), 50),  # its RoPE settings differ by layer type
    ],
)
def test_the_number_of_positions_comes_from_the_configuration(config, positions):
    assert Limits.of(config).positions == positions


def test_a_row_longer_than_the_models_positions_is_reported():
    limits = Limits(20, 100)
    check_rows(limits, rows_of((10, (10, 3)), (19, (1, 1))), "train")
    with pytest.raises(SimpoError, match=r"train: file\.jsonl:2: 21 tokens .* 20; set max_length to 20 or less"):
        check_rows(limits, rows_of((10, (10, 3)), (11, (3, 10))), "train")


@pytest.mark.parametrize("token", [100, 99999, -7])
def test_a_row_with_an_unknown_token_is_reported(token):
    with pytest.raises(SimpoError, match=rf"eval: file\.jsonl:1: token id {token}; .* 0 to 99"):
        check_rows(Limits(None, 100), rows_of((3, (4, 2)), token=token), "eval")


@pytest.mark.parametrize("shapes", [((3, (4, 2)), (120, (9, 3))), ((120, (9, 3)),)])
def test_training_does_not_start_with_unreadable_rows(shapes, make_trainer):
    """The rows of a GPT-2 with 128 positions are checked before the self-check runs the model on them."""
    with pytest.raises(SimpoError, match=r"train: .*129 tokens"):
        make_trainer(rows_of(*shapes))
    with pytest.raises(SimpoError, match=r"eval: file\.jsonl:1: token id 61; .* 0 to 60"):
        make_trainer(rows_of((3, (4, 2))), eval_dataset=rows_of((3, (4, 2)), token=61))
    trainer: PreferenceTrainer = make_trainer(rows_of((3, (4, 2))))
    with pytest.raises(SimpoError, match=r"eval: .*129 tokens"):
        trainer.evaluate(rows_of((120, (9, 3))))


def test_inspect_reports_unreadable_rows_without_loading_weights(chat_world, tmp_path, capsys):
    folder = shutil.copytree(chat_world / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"prompt": "What is 1?", "chosen": "It is 3.", "rejected": "It is 4."}\n'
        + json.dumps({"prompt": "What? " * 40, "chosen": "It is 3.", "rejected": "It is 4."})
        + "\n"
    )
    assert cli.main(["inspect", str(data), f"--model={folder}"]) == 2
    assert "train: data.jsonl:2: 128 tokens with its answer; the model has room for 64" in capsys.readouterr().err
    assert cli.main(["inspect", str(data), f"--model={folder}", "--max_length=64"]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    assert cli.main(["inspect", str(data), f"--model={folder}", "--max_length=64"]) == 2
    assert "the model has embeddings for 0 to 19" in capsys.readouterr().err


# ---- dtype of the saved weights ----


def train(chat_world, output, *options) -> int:
    named = [f"--model_name_or_path={chat_world / 'model'}", f"--dataset_name={chat_world / 'train.jsonl'}"]
    settings = ["--max_steps=2", "--save_steps=1", "--save_strategy=steps", "--learning_rate=1e-2"]
    return cli.main(["train", "--objective=simpo", f"--output_dir={output}", *named, *settings, *options])


@pytest.mark.parametrize("options", [(), ("--use_peft=true", "--lora_r=4")])
def test_the_finished_model_is_rounded_once(options, chat_world, tmp_path, capsys):
    whole, rounded = tmp_path / "whole", tmp_path / "rounded"
    assert train(chat_world, whole, *options) == train(chat_world, rounded, *options, "--save_dtype=bfloat16") == 0
    name = "adapter_model.safetensors" if options else "model.safetensors"
    exact, found = load_file(whole / name), load_file(rounded / name)
    assert exact.keys() == found.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[key].to(torch.bfloat16))
    assert load_file(rounded / "checkpoint-2" / name).popitem()[1].dtype == torch.float32
    assert (whole / "checkpoint-2" / name).read_bytes() == (rounded / "checkpoint-2" / name).read_bytes()
    if not options:
        assert hf.AutoModelForCausalLM.from_pretrained(rounded, dtype="auto").dtype == torch.bfloat16
    assert train(chat_world, rounded, *options) == 2  # the same run except for the saved dtype
    assert "save_dtype" in capsys.readouterr().err


def test_a_classifier_keeps_the_order_of_its_labels(make_model, tmp_path):
    """Models with several labels are rejected for training and judging, and the error gives their number."""
    make_model("qwen2").save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).save_pretrained(tmp_path / "three")
    for kinds in ({"new_head": True}, {"gated": True}):
        with pytest.raises(SimpoError, match="has 3 labels; a reward model has one"):
            load_reward_model(ModelArguments(str(tmp_path / "three")), **kinds)
