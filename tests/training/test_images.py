"""Training on rows with images, from files to a saved model, against the model's own forward on processor output."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file
from tests.forked import run_ranks
from tests.training_runs import killed_after_step
from tests.vision import FAMILIES, following, make_vision_model, picture

from simpo import PreferenceConfig, PreferenceTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, cli
from simpo.data.rows import as_dataset
from simpo.errors import SimpoError
from simpo.training.batches import image_reader
from simpo.training.reference import with_mismatched

QUESTION = "what is in the picture?"
ROWS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs, two thirds of them with images of several sizes, and tiny models in ``world / kind``."""
    folder = tmp_path_factory.mktemp("vision")
    rows = []
    for number in range(ROWS + 6):
        row = {"prompt": QUESTION, "chosen": f"a red square, {number}", "rejected": f"{number} lines"}
        if number % 3:
            names = [f"{number}-{place}.png" for place in range(number % 3)]
            for place, name in enumerate(names):
                picture(16 + 8 * (number % 4), 32, seed=10 * number + place).save(folder / name)
            row["images"] = names
        else:
            row["prompt"] = f"compare {number} with the second"
        rows.append(row)
    for name, part in (("train", rows[:ROWS]), ("test", rows[ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for kind in ("llava", "gemma3"):
        processor = FAMILIES[kind].processor()
        make_vision_model(kind, processor.tokenizer).save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return folder


def rows_of(world, name: str = "train") -> list[dict]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def options(world, kind, output, *more) -> list[str]:
    given = {
        "model_name_or_path": world / kind,
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "image_folder": world,
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
    }
    return ["train", *(f"--{key}={value}" for key, value in given.items()), *more]


def config(world, tmp_path, kind=PreferenceConfig, **settings):
    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    quiet |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    if kind is PreferenceConfig:
        quiet |= {"reference_cache": str(tmp_path / "reference")}
    return kind(**quiet | {"image_folder": str(world)} | settings)


def processed(processor, row: dict, world, answer: str, end: str | None = None) -> dict:
    """Return the processor's output for a row's prompt, an answer and its ending (EOS by default)."""
    asked = [{"role": "user", "content": [*({"type": "image"} for _ in row.get("images", ())), text(row["prompt"])]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    pictures = [hf.image_utils.load_image(str(world / name)) for name in row.get("images", ())]
    return processor(
        text=[prompt + answer + (processor.tokenizer.eos_token if end is None else end)],
        images=pictures or None,
        return_tensors="pt",
        add_special_tokens=False,
    )


def naive(model, processor, row: dict, world, answer: str) -> float:
    """Return an answer's average log-probability by the model's own forward on the processor's output."""
    inputs = processed(processor, row, world, answer)
    size = len(processor.tokenizer(answer, add_special_tokens=False).input_ids) + 1
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -size - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, -size:, None]).mean().item()


def text(content: str) -> dict:
    return {"type": "text", "text": content}


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_training_goes_from_files_to_a_saved_model(kind, world, tmp_path):
    """The vision tower is trained, and the saved model and processor reproduce the reported results."""
    output = tmp_path / "out"
    assert cli.main(options(world, kind, output, "--objective=simpo", "--max_steps=3")) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (world / kind, output))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= {
        part for name in changed for part in name.split(".")
    }
    processor = hf.AutoProcessor.from_pretrained(output)
    assert type(processor) is type(FAMILIES[kind].processor())
    model = hf.AutoModelForImageTextToText.from_pretrained(output)
    examples = [json.loads(line) for line in (output / "examples_after.jsonl").read_text().splitlines()]
    token = processor.tokenizer.image_token
    most = {"llava": 1, "gemma3": 2}[kind]  # Gemma's images have text between them
    shown = [example["prompt"].count(token) for example in examples]
    assert shown == [min(most, len(row.get("images", ()))) for row in rows_of(world, "test")]
    scores = [json.loads(line) for line in (output / "held_out_after.jsonl").read_text().splitlines()]
    for row, found in zip(rows_of(world, "test"), scores, strict=True):
        for side in ("chosen", "rejected"):
            assert found[f"logps/{side}"] == pytest.approx(naive(model, processor, row, world, row[side]), abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_reward_training_goes_from_files_to_a_saved_model(adapter, world, tmp_path):
    """Starts from a language model; the saved model gives the reported scores in plain transformers."""
    output = tmp_path / "out"
    more = ["--use_peft=true", "--lora_r=4", "--lora_dropout=0"] if adapter else []
    assert cli.main(["reward", *options(world, "gemma3", output, "--max_steps=3", *more)[1:]]) == 0
    processor = hf.AutoProcessor.from_pretrained(output)
    if adapter:
        base = hf.AutoModelForSequenceClassification.from_pretrained(world / "gemma3", num_labels=1)
        model = PeftModel.from_pretrained(base, output).eval()
    else:
        model = hf.AutoModelForSequenceClassification.from_pretrained(output).eval()
        before, after = (load_file(folder / "model.safetensors") for folder in (world / "gemma3", output))
        changed = {part for name in before.keys() & after for part in name.split(".") if differ(before, after, name)}
        assert {"vision_tower", "multi_modal_projector", "language_model"} <= changed
    scores = [json.loads(line) for line in (output / "held_out_after.jsonl").read_text().splitlines()]
    rows = rows_of(world, "test")
    assert sum("images" in row for row in rows) == 4
    for row, found in zip(rows, scores, strict=True):
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                logits = model(**processed(processor, row, world, row[side])).logits
            assert found[f"rewards/{side}"] == pytest.approx(logits.item(), abs=1e-4)


def differ(before, after, name) -> bool:
    return not torch.equal(before[name], after[name])


def test_a_reward_architecture_that_transformers_lacks_is_an_error(world, tmp_path, capsys):
    assert cli.main(["reward", *options(world, "llava", tmp_path / "out")[1:]]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model_name_or_path:" in message and "ForSequenceClassification" in message
    assert not (tmp_path / "out").exists()


def test_reward_training_on_text_updates_the_score_layer(world, tmp_path):
    """Rows without images freeze the tower and the projector but not the reward head."""
    processor = FAMILIES["gemma3"].processor()
    model = make_vision_model("gemma3", processor.tokenizer, kind=hf.Gemma3ForSequenceClassification)
    rows = as_dataset([row for row in rows_of(world) if "images" not in row], "train")
    before = model.score.weight.detach().clone()
    RewardTrainer(model, config(world, tmp_path, RewardConfig, max_steps=1), rows, processing_class=processor).train()
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert not torch.equal(model.score.weight, before)


def test_answers_to_images_are_generated_before_and_after_training(world, tmp_path):
    """Greedy answers from the start and the trained model to held-out prompts, most of them with images."""
    output = tmp_path / "out"
    more = ["--max_steps=2", "--eval_generations=6", "--eval_strategy=steps", "--eval_steps=2", "--max_length=80"]
    assert cli.main(options(world, "gemma3", output, "--objective=simpo", "--learning_rate=0.01", *more)) == 0
    processor = hf.AutoProcessor.from_pretrained(output)
    rows, found = rows_of(world, "test"), []
    for name, folder in {"start.jsonl": world / "gemma3", "step-2.jsonl": output}.items():
        model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
        answers = [json.loads(line) for line in (output / "generations" / name).read_text().splitlines()]
        for row, answer in zip(rows, answers, strict=True):
            assert answer.get("images", []) == [str(world / name) for name in row.get("images", ())]
            (ids,), (logp,) = answer["response_ids"], answer["logps"]
            inputs = processed(processor, row, world, "", end="")
            context, total = inputs["input_ids"][0].tolist(), 0.0
            for place, token in enumerate(ids):
                logps = following(model, inputs, context + ids[:place])
                assert token == logps.argmax()
                total += logps[token].item()
            assert ids and logp == pytest.approx(total, abs=1e-3)
        found.append([answer["logps"] for answer in answers])
    assert all(before != after for before, after in zip(*found, strict=True))


def test_judges_reject_rows_with_images(world, tmp_path, capsys):
    more = ["--max_steps=1", "--eval_generations=2", "--eval_strategy=steps", "--eval_steps=1", "--eval_judge=exact"]
    assert cli.main(options(world, "llava", tmp_path / "out", "--objective=simpo", *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "eval_judge:" in message and "images" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_identical_weights(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ["--objective=dpo", "--max_steps=5"]
    assert cli.main(options(world, "llava", whole, *settings)) == 0
    with killed_after_step(3):
        cli.main(options(world, "llava", killed, *settings))
    assert (killed / "checkpoint-2" / "processor_config.json").is_file()
    assert cli.main(options(world, "llava", killed, *settings)) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_train_like_one(world, tmp_path):
    """Some micro-batches on each process have no images."""
    named = ["--objective=simpo", "--max_steps=2", "--save_strategy=no"]
    both = options(world, "gemma3", tmp_path / "two", *named, "--per_device_train_batch_size=2", "--ddp_backend=gloo")
    done = run_ranks(2, cli.main, both, folder=tmp_path)
    assert done.codes == [0, 0], done.stderr
    assert cli.main(options(world, "gemma3", tmp_path / "one", *named)) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["simpo", "dpo", "ipo", "orpo", "cpo", "kto", "bco"])
def test_every_objective_takes_a_step(objective, world, tmp_path):
    """On pairs, and for objectives that take them, also on single responses."""
    for unpaired in (False, True):
        rows = rows_of(world)
        if unpaired:
            if objective not in ("kto", "bco"):
                continue
            keep = {"prompt", "images"}
            rows = [
                {key: value for key, value in row.items() if key in keep}
                | {"completion": row["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
                for number, row in enumerate(rows)
            ]
        processor = FAMILIES["llava"].processor()
        model = make_vision_model("llava", processor.tokenizer)
        before = model.model.multi_modal_projector.linear_1.weight.detach().clone()
        args = config(world, tmp_path / str(unpaired), objective=objective, max_steps=1, per_device_train_batch_size=8)
        trainer = PreferenceTrainer(model, args, as_dataset(rows, "train"), processing_class=processor)
        trainer.train()
        assert trainer.path == "packed"
        assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, before)


def test_supervised_fine_tuning_loss_is_the_mean_over_scored_tokens(world, tmp_path):
    """Compared with the model's own forward, including images in later turns."""
    processor = FAMILIES["gemma3"].processor()
    model = make_vision_model("gemma3", processor.tokenizer)
    turns = [
        {"role": "user", "content": [{"type": "image"}, text("what?")]},
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": [text("and "), {"type": "image"}]},
        {"role": "assistant", "content": "a line"},
    ]
    names = ["1-0.png", "2-0.png"]
    rows = as_dataset([{"messages": turns, "images": names}], "train")
    trainer = SFTTrainer(model, config(world, tmp_path, SFTConfig), rows, processing_class=processor)
    found = trainer.score_rows(trainer.train_dataset)["loss"][0]
    row = trainer.train_dataset[0]
    whole = processor(
        text=[processor.apply_chat_template(turns, tokenize=False)],
        images=[hf.image_utils.load_image(str(world / name)) for name in names],
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert whole["input_ids"][0].tolist() == row["prompt_ids"] + row["response_ids"][0]
    with torch.no_grad():
        logps = model.eval()(**whole).logits[0, :-1].log_softmax(-1)
    chosen = logps.gather(-1, whole["input_ids"][0, 1:, None])[-len(row["response_ids"][0]) :, 0]
    assert found == pytest.approx(-chosen[torch.tensor(row["scored"][0])].mean().item(), abs=1e-4)


def test_one_question_about_two_images_is_two_prompts(world, tmp_path):
    """KTO pairs each prompt with a response to a different prompt."""
    processor = FAMILIES["llava"].processor()
    rows = [row | {"images": [name]} for row, name in zip(rows_of(world)[:2], ("1-0.png", "2-0.png"), strict=True)]
    rows = [{**row, "prompt": QUESTION} for row in rows]
    args = config(world, tmp_path)
    prepared = PreferenceTrainer.prepare(as_dataset(rows, "train"), processor, args, "train").dataset
    assert prepared[0]["prompt_ids"] == prepared[1]["prompt_ids"]
    assert with_mismatched(prepared, 512, "train")["mismatched_ids"][0] in prepared[1]["response_ids"]
    same = [row | {"images": ["1-0.png"]} for row in rows]
    prepared = PreferenceTrainer.prepare(as_dataset(same, "train"), processor, args, "train").dataset
    with pytest.raises(SimpoError, match="all prompts are the same"):
        with_mismatched(prepared, 512, "train")


def test_mistakes_are_reported(world, tmp_path, make_model):
    processor = FAMILIES["llava"].processor()
    model = make_vision_model("llava", processor.tokenizer)
    rows, args = as_dataset(rows_of(world), "train"), config(world, tmp_path)
    tokenized = PreferenceTrainer.prepare(rows, processor, args, "train").dataset
    with pytest.raises(SimpoError, match=r"images: .*processing_class"):
        PreferenceTrainer(model, args, tokenized)
    with pytest.raises(SimpoError, match="images: GPT2LMHeadModel takes no images"):
        PreferenceTrainer(make_model("gpt2", torch.float32), args, tokenized, processing_class=processor)
    reward = make_model("llama", kind=hf.LlamaForSequenceClassification, num_labels=1)
    with pytest.raises(SimpoError, match="images: LlamaForSequenceClassification takes no images"):
        RewardTrainer(reward, config(world, tmp_path, RewardConfig), rows, processing_class=processor)
    other = tmp_path / "pictures"
    shutil.copytree(world, other, ignore=lambda folder, names: [name for name in names if not name.endswith("g")])
    args = config(other, tmp_path)
    trainer = PreferenceTrainer(model, args, as_dataset(rows_of(world)[1:2], "train"), processing_class=processor)
    picture(40, 40, seed=99).save(other / "1-0.png")
    with pytest.raises(SimpoError, match=r"1-0.png: the image has changed"):
        trainer.train()


def test_the_self_check_includes_held_out_rows_with_images(world, tmp_path):
    """Here, text rows are correct in packed batches but rows with images are not."""
    processor = FAMILIES["gemma3"].processor()
    model = make_vision_model("gemma3", processor.tokenizer)
    model.model.language_model.register_forward_pre_hook(_causal_images, with_kwargs=True)
    rows = rows_of(world)
    train = as_dataset([row for row in rows if "images" not in row], "train")
    held_out = as_dataset([row for row in rows if "images" in row], "eval")
    args = config(world, tmp_path)
    assert PreferenceTrainer(model, args, train, processing_class=processor).path == "packed"
    assert PreferenceTrainer(model, args, train, held_out, processing_class=processor).path == "padded"


def _causal_images(_, args, kwargs):
    layout = kwargs.get("attention_layout")
    return args, kwargs if layout is None else kwargs | {"attention_layout": replace(layout, blocks=None)}


def test_sharding_configured_by_the_launcher_is_rejected(world, monkeypatch):
    """Its settings come from the environment rather than the configuration."""
    processor = FAMILIES["llava"].processor()
    model = make_vision_model("llava", processor.tokenizer)
    rows = PreferenceTrainer.prepare(as_dataset(rows_of(world), "train"), processor, config(world, world), "train")
    given = SimpleNamespace(world_size=2, fsdp=None, deepspeed=None, gradient_checkpointing=False)
    assert image_reader(model, processor, [rows.dataset], given) is not None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SimpoError, match="DDP"):
        image_reader(model, processor, [rows.dataset], given)


def test_without_images_the_tower_is_not_trained(world, tmp_path):
    processor = FAMILIES["llava"].processor()
    model = make_vision_model("llava", processor.tokenizer)
    rows = as_dataset([row for row in rows_of(world) if "images" not in row], "train")
    PreferenceTrainer(model, config(world, tmp_path), rows, processing_class=processor)
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
