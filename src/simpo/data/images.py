"""Reads the images in rows, writes them into rendered texts as image tokens, and converts them to tensors."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from simpo.data.messages import IMAGE_COLUMNS, images_of
from simpo.data.rendering import Rendered
from simpo.data.rows import ROW, BadRow, check_unicode, undecoded
from simpo.errors import SimpoError, one_line

IMAGES, DIGESTS = "images", "image_digests"
# Columns of tokenized rows: the encoded bytes or file path of each image, and the SHA-256 of the bytes.
COLUMNS = {IMAGES: List({"path": Value("string"), "bytes": Value("binary")}), DIGESTS: List(Value("string"))}
# Keys of a processor's output that describe the text rather than an image.
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"}
_BATCH = 1000
# Pillow's other formats run programs (PostScript runs Ghostscript) or are rarely used and tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# A small file can hold a huge image, and processors enlarge a long and thin one.
_MAX_PIXELS, _MAX_ASPECT_RATIO, _MAX_FILE_SIZE = 50_000_000, 200, 1 << 28

Reference = dict[str, Any]


class ImageReader:
    """Reads images with a model's processor.

    Args:
        processor: the processor of a vision-language model.
        folder: base folder of relative paths; the working directory if None.

    Raises:
        SimpoError: the processor has no image token.
    """

    def __init__(self, processor: ProcessorMixin, folder: str | None = None) -> None:
        self.processor: Any = processor
        self._folder = Path(folder or ".").expanduser()
        self.token: str = getattr(processor, "image_token", None) or ""
        if not self.token or not hasattr(processor, "image_processor"):
            raise SimpoError(f"processing_class: {type(processor).__name__} has no image token")

    # ---- From the cells of a row to text.

    def insert_images(self, texts: Sequence[Rendered], values: Sequence[Any]) -> list[tuple[Rendered, dict[str, Any]]]:
        """Write a row's images into its rendered texts.

        Args:
            texts: the texts, with one image token from the chat template per image. If a conversation has several, in
                order, each has the row's first images, as many as it has tokens; the last one has all of them.
            values: the images as given in the row, in order: paths, bytes or ``{"bytes", "path"}``.

        Returns:
            Each text with as many image tokens as the model expects, and its values for :data:`COLUMNS`.

        Raises:
            BadRow: an image cannot be read, or the template does not render all of them.
        """
        if not values:
            return [(rendered, {IMAGES: [], DIGESTS: []}) for rendered in texts]
        counts = [rendered.texts[-1].count(self.token) for rendered in texts]
        if counts[-1] != len(values):  # checked first, because a row may have thousands of images
            raise BadRow(f"the row has {len(values)} images, but the chat template renders {counts[-1]}")
        references = [self._to_reference(value) for value in values]
        digests = [_digest(_read_bytes(reference)) for reference in references]
        expansions = [self._expand_token(reference) for reference in references]
        return [
            (self._expand(rendered, expansions), {IMAGES: references[:count], DIGESTS: digests[:count]})
            for rendered, count in zip(texts, counts, strict=True)
        ]

    def _to_reference(self, value: Any) -> Reference:
        fields = value if isinstance(value, Mapping) else {"bytes" if isinstance(value, bytes) else "path": value}
        content, path = fields.get("bytes"), fields.get("path")
        if content is None and isinstance(path, str) and path.startswith("data:"):
            content = path.partition(",")[2]
        if isinstance(content, str):
            content = _decode_base64(content.rpartition(",")[2])
        if isinstance(content, bytes):
            return {"path": None, "bytes": content}
        if not isinstance(path, str):
            raise BadRow(f"an image is a {type(value).__name__}; give a file path or bytes")
        if path.startswith(("http://", "https://")):
            raise BadRow("an image is a URL, which is not downloaded; give a file path or bytes")
        check_unicode(path)
        return {"path": str((self._folder / path.removeprefix("file://")).absolute()), "bytes": None}

    def _expand_token(self, reference: Reference) -> str:
        """Return the text that the processor writes instead of an image's token."""
        (offsets,) = self._process([reference], return_text_replacement_offsets=True)["text_replacement_offsets"]
        return offsets[0]["replacement"]

    def _expand(self, rendered: Rendered, expansions: Sequence[str]) -> Rendered:
        """Replace the image tokens in ``rendered`` with their expansions."""

        def expand(text: str) -> str:
            first, *rest = text.split(self.token)
            return first + "".join(
                expansion + following for expansion, following in zip(expansions[: len(rest)], rest, strict=True)
            )

        answers = tuple(replace(answer, prompt=expand(answer.prompt)) for answer in rendered.answers)
        return replace(rendered, prompt=expand(rendered.prompt), answers=answers)

    def fingerprint(self, dataset: Dataset) -> list[str]:
        """Return what the text of images depends on besides the rows: the processor, and the files that rows refer to.

        A file is identified by its path, size in bytes and modification time.
        """
        digest = hashlib.sha256()
        for value in _cells(dataset):
            try:
                path = self._to_reference(value)["path"]
                status = path and Path(path).stat()
            except (BadRow, OSError, ValueError):  # reported when the row is tokenized
                continue
            if status:
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        return [self.processor.to_json_string(), digest.hexdigest()]

    # ---- From tokenized rows to model inputs.

    def tensors(self, references: Sequence[Reference], digests: Sequence[str]) -> tuple[dict[str, Any], ...]:
        """Return the processor's tensors for each image, keyed by the names of the model's arguments.

        Shapes depend on the processor; dimension 0 counts images, crops or patches.

        Args:
            references: the images, as stored in the column :data:`IMAGES`.
            digests: the SHA-256 of each.
        """
        tensors_per_image = []
        for reference, digest in zip(references, digests, strict=True):
            try:
                if _digest(_read_bytes(reference)) != digest:
                    raise SimpoError(f"{reference['path']}: the image has changed since the run started; restart it")
                inputs = self._process([reference], return_tensors="pt")
            except BadRow as bad:
                raise SimpoError(f"{reference['path'] or 'images'}: {bad.reason}") from bad
            tensors_per_image.append({name: tensor for name, tensor in inputs.items() if name not in _TEXT_INPUTS})
        return tuple(tensors_per_image)

    def example(self, reference: Reference) -> dict[str, Any]:
        """Return the processor's complete output for a text that consists of one image twice."""
        return dict(self._process([reference, reference], return_tensors="pt"))

    def _process(self, references: Sequence[Reference], **options: Any) -> Any:
        contents = [_read_bytes(reference) for reference in references]
        try:
            images = [_decode(content) for content in contents]
            return self.processor(text=[self.token * len(images)], images=images, **options)
        except BadRow:
            raise
        except Exception as error:  # damaged files can raise anything
            raise BadRow(f"an image cannot be read ({_describe_error(error)})") from error


def as_text(reference: Reference) -> str:
    """Return an image as text that can be read again: the path of its file, or its bytes as a ``data:`` URL."""
    return reference["path"] or f"data:;base64,{base64.b64encode(_read_bytes(reference)).decode()}"


def _decode(content: bytes) -> Any:
    """Return a Pillow image; raise BadRow if it is too large or too long to be decoded and processed."""
    from PIL import Image as Pillow  # noqa: PLC0415 - not needed without images

    image = Pillow.open(io.BytesIO(content), formats=_FORMATS)
    short, long = sorted(image.size)
    if short * long > _MAX_PIXELS:
        raise BadRow(f"an image has more than {_MAX_PIXELS:,} pixels; scale it down")
    if long > _MAX_ASPECT_RATIO * short:
        raise BadRow(f"an image is more than {_MAX_ASPECT_RATIO} times as long as it is wide; cut it")
    return load_image(image)


def _read_bytes(reference: Reference) -> bytes:
    """Return the bytes of the encoded image; raise BadRow if its file cannot be read."""
    if reference["bytes"] is not None:
        return reference["bytes"]
    path = Path(reference["path"])
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may never end
            raise BadRow("an image is not a regular file")
        if status.st_size > _MAX_FILE_SIZE:
            raise BadRow(f"the file of an image has more than {_MAX_FILE_SIZE >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRow(f"an image cannot be read ({_describe_error(error)})") from error


def _describe_error(error: Exception) -> str:
    """Return an error's text without the file name, so that rows with the same fault are counted together."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else one_line(error)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadRow("an image is text that is not base64") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- Datasets and processors.


def split_processor(
    processing_class: Any, folder: str | None = None
) -> tuple[PreTrainedTokenizerBase, ImageReader | None]:
    """Return the tokenizer, and a reader of images from ``folder`` if ``processing_class`` is a processor."""
    tokenizer = text_tokenizer(processing_class)
    assert tokenizer is not None
    return tokenizer, None if tokenizer is processing_class else ImageReader(processing_class, folder)


def has_images(dataset: Dataset) -> bool:
    """Whether any row has images; the dataset may be tokenized."""
    if IMAGES in dataset.column_names and DIGESTS in dataset.column_names:
        return True
    return any(True for _ in _cells(undecoded(dataset)))


def _cells(dataset: Dataset) -> Iterator[Any]:
    """Yield the images of all rows, as given; rows that cannot be read are skipped, and reported when tokenized."""
    names = [name for name in (ROW, *IMAGE_COLUMNS) if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format(None).iter(_BATCH) if names else ():
        if ROW in names:  # JSON, parsed only if it may contain images
            rows = (json.loads(text) for text in batch[ROW] if '"image' in text)
        else:
            rows = (
                dict(zip(names, cells, strict=True)) for cells in zip(*(batch[name] for name in names), strict=True)
            )
        for row in rows:
            with suppress(BadRow):
                yield from images_of(row)


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return a processor's tokenizer with the processor's chat template; return a tokenizer or None unchanged."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = processing_class.tokenizer
    if processing_class.chat_template is not None:
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer
