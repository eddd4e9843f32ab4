"""Answers to prompts with images against the model's own forward on its processor's output, token by token."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from tests.vision import FAMILIES, following, make_vision_model, picture
from transformers import AutoProcessor

from simpo import cli
from simpo.data.images import ImageReader
from simpo.data.prompts import prepare_prompts
from simpo.data.rows import as_dataset
from simpo.generation.engine import TransformersEngine
from simpo.generation.responses import write_responses
from simpo.generation.settings import SamplingSettings
from simpo.models.loading import load_model

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in {"a.png": (40, 24), "b.png": (64, 32), "c.png": (16, 48)}.items():
        picture(*size, seed=ord(name[0])).save(folder / name)
    return folder


def asked(*parts: str | None, images=()) -> dict:
    """Return a row whose prompt consists of texts and images (None)."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"prompt": [{"role": "user", "content": content}], **({"images": list(images)} if images else {})}


ROWS = [
    asked(None, "what is in the picture?", images=["a.png"]),
    asked(None, "what is in the picture?", images=["b.png"]),
    asked("compare the first"),
    asked("what is ", None, " and ", None, " there?", images=["b.png", "c.png"]),
]


def processed(processor, row: dict, folder) -> dict:
    """Return the processor's output for a row's prompt."""
    return processor(
        text=[processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)],
        images=[Image.open(folder / name).convert("RGB") for name in row.get("images", ())] or None,
        return_tensors="pt",
        add_special_tokens=False,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_are_the_models_own(kind, temperature, folder):
    """Greedy tokens are the most likely ones, and log-probabilities equal those of full forwards without a cache."""
    processor = FAMILIES[kind].processor()
    model = make_vision_model(kind, processor.tokenizer)
    prompts = prepare_prompts(as_dataset(ROWS, "prompts"), processor, image_folder=str(folder)).prompts
    reader, engine = ImageReader(processor, str(folder)), TransformersEngine(model, processor.tokenizer)
    settings = SamplingSettings(temperature=temperature, max_new_tokens=COUNT)
    images = [reader.tensors(prompt.images, prompt.digests) for prompt in prompts]
    found = engine.generate([prompt.ids for prompt in prompts], settings, 3, images=images)
    model.eval()
    for row, prompt, sampled in zip(ROWS, prompts, found, strict=True):
        inputs = processed(processor, row, folder)
        assert inputs["input_ids"][0].tolist() == prompt.ids
        total = 0.0
        for place, token in enumerate(sampled.ids):
            logps = following(model, inputs, prompt.ids + sampled.ids[:place])
            assert temperature or token == logps.argmax()
            total += logps[token].item()
        assert sampled.logp == pytest.approx(total, abs=1e-4)
        assert sampled.ids and (sampled.finished or len(sampled.ids) == COUNT)
    one, other = (following(model, {}, [1, 2]) for _ in range(2))  # no image state is left in the model
    assert torch.equal(one, other)
    (last,) = engine.generate([prompts[2].ids], settings, 3)
    assert temperature or last.ids == found[2].ids


def test_images_are_part_of_a_prompts_identity(folder, tmp_path):
    """A written row can be read again, whether its image was given as a file or as bytes."""
    processor = FAMILIES["gemma3"].processor()
    content = {"path": None, "bytes": (folder / "a.png").read_bytes()}
    rows = [
        {"prompt": "what is there?", "images": ["a.png"]},
        {"prompt": "what is there?", "images": ["b.png"]},
        {"prompt": "what is there?", "images": ["a.png"]},
        {"prompt": "<image> or <image>?", "images": [content, {"path": "b.png", "bytes": None}]},
        {"prompt": "what is there?"},
    ]
    known = prepare_prompts(as_dataset(rows, "prompts"), processor, image_folder=str(folder))
    assert len(known) == len({prompt.id for prompt in known}) == 4
    assert known.report.dropped == {"repeated prompt": 1}
    write_responses(tmp_path / "responses.jsonl", known.prompts, [[]] * 4, [[]] * 4)
    written = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [len(row.get("images", ())) for row in written] == [1, 1, 2, 0]
    again = prepare_prompts(
        as_dataset([{key: row[key] for key in ("prompt", "images") if key in row} for row in written], "again"),
        processor,
    )
    for before, after in zip(known, again, strict=True):
        assert (before.ids, before.digests) == (after.ids, after.digests)


@pytest.fixture(scope="module")
def sampled(folder, tmp_path_factory):
    """A folder with a model, and the output of ``simpo sample`` for :data:`ROWS`."""
    made = tmp_path_factory.mktemp("sampled")
    processor = FAMILIES["llava"].processor()
    make_vision_model("llava", processor.tokenizer).save_pretrained(made / "model")
    processor.save_pretrained(made / "model")
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert cli.main(command(made, folder, made / "out")) == 0
    return made


def command(made, folder, output, *more) -> list[str]:
    given = {"n": 2, "max_new_tokens": COUNT, "seed": 1, "image_folder": folder, "output_dir": output}
    options = [f"--{key}={value}" for key, value in given.items()]
    return ["sample", str(made / "model"), str(made / "prompts.jsonl"), *options, *more]


def test_sampled_log_probabilities_match_full_forwards(sampled, folder):
    """For answers sampled at temperature 1."""
    processor, model = AutoProcessor.from_pretrained(sampled / "model"), load_model(str(sampled / "model")).eval()
    found = [json.loads(line) for line in (sampled / "out/responses.jsonl").read_text().splitlines()]
    assert [len(row.get("images", ())) for row in found] == [len(row.get("images", ())) for row in ROWS]
    for row, answers in zip(ROWS, found, strict=True):
        inputs = processed(processor, row, folder)
        assert len(answers["response_ids"]) == 2
        for ids, logp in zip(answers["response_ids"], answers["logps"], strict=True):
            context = inputs["input_ids"][0].tolist()
            logps = [following(model, inputs, context + ids[:place])[token] for place, token in enumerate(ids)]
            assert logp == pytest.approx(sum(logps).item(), abs=1e-4)


def test_a_changed_image_makes_a_different_run(sampled, folder, tmp_path, capsys):
    other = tmp_path / "pictures"
    shutil.copytree(folder, other)
    assert cli.main(command(sampled, folder, sampled / "out")) == 0  # already finished
    picture(40, 24, seed=1).save(other / "a.png")
    assert cli.main(command(sampled, other, sampled / "out")) == 2
    assert "prompts" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_engines_without_image_support_are_rejected(engine, sampled, folder, tmp_path, capsys):
    assert cli.main(command(sampled, folder, tmp_path / "out", f"--engine={engine}")) == 2
    assert "image_folder:" in capsys.readouterr().err


def test_rows_with_images_are_not_judged(sampled, tmp_path, capsys):
    """Judges would only see the text."""
    answers = str(sampled / "out/responses.jsonl")
    for number, given in enumerate(
        (
            ["annotate", answers, "--annotator=exact"],
            ["pair", answers],
            ["label", answers],
            ["compare", answers, answers, "--judge=exact"],
        )
    ):
        assert cli.main([*given, f"--output_dir={tmp_path / str(number)}"]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "responses.jsonl:1: images" in message
