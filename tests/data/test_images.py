"""Rows with images: where images are read from, their places in the prompt, and bad rows."""

from __future__ import annotations

import io
import json
import os

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from tests.vision import FAMILIES, picture

from simpo.data.images import ImageReader, has_images
from simpo.data.inspection import shared_rows
from simpo.data.prompts import prepare_prompts
from simpo.data.rendering import Rendered
from simpo.data.rows import BadRow, as_dataset, concatenate, with_where
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import first_canonical
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare, prepare_sft
from simpo.errors import SimpoError

PARTS = [{"type": "text", "text": "what is "}, {"type": "image"}, {"type": "text", "text": " there?"}]
SIZES = ((40, 24), (64, 32), (16, 48))


@pytest.fixture(scope="module", params=["llava", "gemma3", "qwen2_5_vl"])
def processor(request):
    return FAMILIES[request.param].processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with three images of different sizes, and a file that only looks like an image."""
    path = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        picture(*size, seed=number).save(path / f"{number}.png")
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:200])
    return path


def png(number: int) -> bytes:
    content = io.BytesIO()
    picture(*SIZES[number], seed=number).save(content, "PNG")
    return content.getvalue()


def pair(prompt, **columns) -> dict:
    return {"prompt": prompt, "chosen": "a red square", "rejected": "a line", **columns}


def settings(folder, **changes) -> TokenizeSettings:
    return TokenizeSettings(**{"max_length": 400, "image_folder": str(folder), "on_bad_row": "error"} | changes)


def prepared(rows, processor, folder, **changes):
    return prepare(as_dataset(rows, "train"), processor, settings(folder, **changes))


def test_prompts_match_the_processors(processor, folder):
    """Including its template and image placeholders, with two images of different sizes."""
    messages = [{"role": "user", "content": [*PARTS, {"type": "image"}]}]
    rows = prepared([pair(messages, images=["0.png", "2.png"]), pair("hello")], processor, folder).dataset
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    own = processor(text=[text], images=[picture(*SIZES[n], seed=n) for n in (0, 2)], add_special_tokens=False)
    assert rows[0]["prompt_ids"] == own["input_ids"][0]
    assert [image["path"] for image in rows[0]["images"]] == [str(folder / "0.png"), str(folder / "2.png")]
    assert rows[1]["images"] == []
    decoded = [processor.tokenizer.decode(ids) for ids in rows[0]["response_ids"]]
    assert decoded == ["a red square<|end|>", "a line<|end|>"]


def test_every_kind_of_image_value_is_accepted(processor, folder, tmp_path):
    """A path, bytes, a Pillow image, a data URL, and image columns of the datasets library."""
    given = ["0.png", png(0), picture(*SIZES[0]), {"bytes": png(0), "path": "elsewhere.png"}, str(folder / "0.png")]
    listed = prepared([pair("what?", image=one) for one in given], processor, folder).dataset
    columns = Dataset.from_dict(
        {"prompt": ["what?"], "chosen": ["a"], "rejected": ["b"], "images": [[str(folder / "0.png")]]}
    )
    columnar = prepare(columns.cast_column("images", List(Image())), processor, settings(folder)).dataset
    expected = listed[0]["prompt_ids"]
    assert all(row["prompt_ids"] == expected for row in (*listed, *columnar))
    assert [row["images"][0]["bytes"] is None for row in listed] == [True, False, False, False, True]
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair("what?", images=["0.png"])) + "\n")
    assert has_images(load_rows(str(tmp_path / "rows.jsonl"), split="train"))
    assert not has_images(as_dataset([pair("what?"), pair("what?", images=[])], "train"))


def test_image_places_can_be_given_in_three_ways(processor, folder):
    """As parts, as the text ``<image>``, or by default at the start of the first question; all give the same prompt."""
    system = {"role": "system", "content": "<image> stays text here"}
    asked = [
        [system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
        [system, {"role": "user", "content": "<image>what?"}],
        [system, {"role": "user", "content": "what?"}],
    ]
    rows = prepared([pair(messages, images=["0.png"]) for messages in asked], processor, folder).dataset
    assert len({tuple(ids) for ids in rows["prompt_ids"]}) == 1
    assert processor.tokenizer.decode(rows[0]["prompt_ids"]).endswith("what?<|assistant|>")


def test_placeholder_text_stays_text(processor, folder):
    """A question about the placeholder token does not get a second image."""
    literal = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": f"why {processor.image_token}?"}],
    }
    row = prepared([pair([literal], images=["0.png"])], processor, folder).dataset[0]
    assert processor.tokenizer.decode(row["prompt_ids"]).count(f"why {processor.image_token}?") == 1
    expanded = processor.tokenizer.image_token_id
    one = prepared([pair([{"role": "user", "content": [{"type": "image"}]}], images=["0.png"])], processor, folder)
    assert row["prompt_ids"].count(expanded) == one.dataset[0]["prompt_ids"].count(expanded)


def test_any_question_in_a_conversation_can_have_images(processor, folder):
    turns = [
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "a line"},
    ]
    rows = as_dataset([{"messages": turns, "images": ["0.png", "1.png"]}], "train")
    row = prepare_sft(rows, processor, settings(folder)).dataset[0]
    text = processor.apply_chat_template(turns, tokenize=False)
    own = processor(text=[text], images=[picture(*SIZES[n], seed=n) for n in (0, 1)], add_special_tokens=False)
    assert row["prompt_ids"] + row["response_ids"][0] == own["input_ids"][0]
    assert len(row["images"]) == 2


def test_the_image_placeholder_works_in_a_later_question(folder):
    """It is a place like any other, and is never left as text while its image goes elsewhere."""
    processor = FAMILIES["llava"].processor()

    def turns(first, second):
        roles = ("user", "assistant", "user", "assistant")
        return [{"role": role, "content": c} for role, c in zip(roles, (first, "a", second, "b"), strict=True)]

    image, text = {"type": "image"}, {"type": "text", "text": "what?"}
    for written, parts, images in (
        (("hi", "<image>what?"), ("hi", [image, text]), ["0.png"]),
        (("<image>what?", "<image>what?"), ([image, text], [image, text]), ["0.png", "1.png"]),
    ):
        rows = as_dataset([{"messages": turns(*one), "images": images} for one in (written, parts)], "train")
        found = prepare_sft(rows, processor, settings(folder)).dataset
        assert (
            found[0]["prompt_ids"] + found[0]["response_ids"][0] == found[1]["prompt_ids"] + found[1]["response_ids"][0]
        )


def test_images_in_color_modes_without_png_support_are_read(folder, tmp_path):
    """CMYK images from Python, and from columns that are mixed with JSON rows."""
    processor, printed = FAMILIES["llava"].processor(), picture(*SIZES[0]).convert("CMYK")
    content = io.BytesIO()
    printed.save(content, "JPEG")
    columns = Dataset.from_list([pair("what?", image={"bytes": content.getvalue(), "path": None})])
    columns = with_where(columns.cast_column("image", Image()), "printed", "0")
    mixed = concatenate([columns, as_dataset([pair("what?", image=printed)], "train")])
    found = prepare(mixed, processor, settings(folder)).dataset
    assert [len(images) for images in found["images"]] == [1, 1]
    assert found[0]["images"][0]["bytes"] == content.getvalue()  # unchanged


def encoded(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Pillow.new("1", (width, height)).save(content, "PNG")
    return content.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("what?", images=[POSTSCRIPT]), "cannot be read (UnidentifiedImageError)"),
        (pair("what?", images=[encoded(13_000, 13_000)]), "more than 50,000,000 pixels"),
        (pair("what?", images=[encoded(1, 400_000)]), "200 times as long"),
        (pair("what?", images=["/dev/zero"]), "not a regular file"),
        (pair("what?", images=["a\0b"]), "cannot be read (embedded null"),
        (pair("what?", images=["a\ud800"]), "lone surrogate"),
        (pair("what?", images=["missing.png"]), "cannot be read (No such file or directory)"),
        (pair("what?", images=["broken.png"]), "cannot be read (OSError)"),
        (pair("what?", images=[b"not an image"]), "cannot be read (UnidentifiedImageError)"),
        (pair("what?", images=["https://example.com/a.png"]), "a URL"),
        (pair("what?", images=[3]), "an image is a int"),
        (pair("<image> and <image>", images=["0.png"]), "(1) does not match the placeholders in the messages (2)"),
        (
            pair([{"role": "user", "content": PARTS}], images=["0.png", "1.png"]),
            "(2) does not match the placeholders in the messages (1)",
        ),
        (pair([{"role": "user", "content": PARTS}]), "(0) does not match the placeholders in the messages (1)"),
        (pair("what?", images=["0.png"], image="1.png"), "keep one of them"),
        (pair("what?", images=["0.png"], videos=["a.mp4"]), "column 'videos'"),
        (pair([{"role": "user", "content": [{"type": "image", "image": "0.png"}]}]), "an image with 'image'"),
        (
            {"prompt": "what?", "chosen": [{"role": "assistant", "content": PARTS}], "rejected": "b", "image": "0.png"},
            "an assistant message contains an image",
        ),
    ],
)
def test_bad_rows_are_reported(row, reason, folder):
    """Each is reported with its reason; among a hundred good rows it is skipped and counted."""
    processor = FAMILIES["llava"].processor()
    with pytest.raises(SimpoError) as error:
        prepared([pair("hello"), row], processor, folder)
    assert "train_dataset[1]" in str(error.value) or "train[1]" in str(error.value)
    assert reason in str(error.value)
    found = prepared([pair("hello")] * 100 + [row], processor, folder, on_bad_row="skip")
    assert (found.report.used, sum(found.report.bad.values())) == (100, 1)


@pytest.mark.parametrize("nested", [False, True])
def test_loading_a_file_decodes_no_image(nested, tmp_path):
    """Whatever the column is: Pillow would run Ghostscript for PostScript."""
    image = {"bytes": POSTSCRIPT, "path": None}
    features = Features({"prompt": Value("string"), "other": List({"a": Image()}) if nested else Image()})
    rows = Dataset.from_dict({"prompt": ["p"], "other": [[{"a": image}] if nested else image]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        found = load_rows(str(tmp_path / name), split="train")[0]["other"]
        assert (found[0]["a"] if nested else found) == image
    assert first_canonical(rows)["prompt"] == "p"


def test_a_pipe_is_not_an_image(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SimpoError, match="not a regular file"):
        prepared([pair("what?", images=["pipe.png"])], FAMILIES["llava"].processor(), tmp_path)


def test_a_wrong_number_of_images_is_noticed_before_any_is_read(folder):
    """A row may have thousands of them."""
    processor = FAMILIES["llava"].processor()
    reader = ImageReader(processor, str(folder))
    rendered = Rendered(processor.image_token, ())
    with pytest.raises(BadRow, match="the row has 10000 images, but the chat template renders 1"):
        reader.insert_images([rendered], ["missing.png"] * 10_000)


def test_images_require_a_processor(folder):
    processor = FAMILIES["llava"].processor()
    with pytest.raises(SimpoError, match="no processor"):
        prepared([pair("what?", images=["0.png"])], processor.tokenizer, folder)
    with pytest.raises(SimpoError, match="images, but answers are sampled for text only"):
        prepare_prompts(as_dataset([pair("what?", images=["0.png"])], "prompts"), processor.tokenizer)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_with_images_are_never_truncated(mode, processor, folder):
    rows = [pair("7 " * 60, images=["1.png"]), pair("7 " * 60), pair("a")]
    found = prepared(rows, processor, folder, max_length=60, max_prompt_length=40, truncation_mode=mode)
    assert list(found.report.dropped.values()) == [1]
    assert "never cut" in next(iter(found.report.dropped))
    assert list(found.report.cut.values()) == [1]
    assert [len(images) for images in found.dataset["images"]] == [0, 0]


def test_the_content_of_an_image_file_matters(folder, tmp_path):
    """A changed image with the same name is read again, and the same question about it is a different row."""
    processor = FAMILIES["qwen2_5_vl"].processor()
    rows = [pair("what?", images=["one.png"])]
    picture(*SIZES[0], seed=0).save(tmp_path / "one.png")
    first = prepared(rows, processor, tmp_path).dataset
    picture(*SIZES[1], seed=1).save(tmp_path / "one.png")
    second = prepared(rows, processor, tmp_path).dataset
    assert len(second[0]["prompt_ids"]) > len(first[0]["prompt_ids"])
    same_size = prepared([pair("what?", images=[png(0)])], processor, folder).dataset
    other = prepared([pair("what?", images=[picture(*SIZES[0], seed=7)])], processor, folder).dataset
    assert same_size[0]["prompt_ids"] == other[0]["prompt_ids"]
    assert shared_rows(first, same_size) != shared_rows(first, other) == (0, 0)
