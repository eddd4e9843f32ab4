"""Tiny vision-language models with random weights and their own processors, without files or downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch.nn import functional as F
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from simpo.world.pairs import make_tokenizer

_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 32, "patch_size": 8}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_QWEN_VISION |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_WORDS = ("what is in the picture?", "a red square", "two blue circles and a line", "compare the first with the second")
_TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class ImageOnlyQwenProcessor(hf.Qwen2_5_VLProcessor):
    """Qwen's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tokenizer(rendered: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """Build a tokenizer whose template writes ``rendered`` for an image, with named special tokens."""
    plain = make_tokenizer(_WORDS * 4)
    backend = plain.backend_tokenizer
    backend.add_special_tokens(list(named.values()))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{kind}_token": getattr(plain, f"{kind}_token") for kind in ("bos", "eos", "pad")},
        extra_special_tokens=named,
    )
    tokenizer.chat_template = _TURNS.replace("IMAGE", rendered)
    return tokenizer


def llava() -> hf.LlavaProcessor:
    images = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = _tokenizer("<image>", image_token="<image>")
    return hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def gemma3() -> hf.Gemma3Processor:
    tokenizer = _tokenizer(
        "<start_of_image>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)


def qwen2_5_vl() -> ImageOnlyQwenProcessor:
    tokenizer = _tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>",
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=4096
    )
    return ImageOnlyQwenProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def _config(kind: str, tokenizer: hf.PreTrainedTokenizerFast) -> hf.PretrainedConfig:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = _TEXT | special | {"vocab_size": len(tokenizer)}
    image = tokenizer.image_token_id
    if kind == "llava":
        vision = _VISION | {"model_type": "clip_vision_model"}
        return hf.LlavaConfig(text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_index=image)
    if kind == "gemma3":
        return hf.Gemma3Config(
            text_config=text
            | {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            vision_config=_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=image,
        )
    tokens = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in _QWEN_TOKENS.items()}
    if kind == "qwen2_5_vl":
        vision = _QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 32}
        return hf.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": _MROPE}, vision_config=vision, **tokens)
    vision = _QWEN_VISION | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return hf.Qwen3VLConfig(
        text_config=text | {"head_dim": 8, "rope_parameters": _MROPE}, vision_config=vision, **tokens
    )


_QWEN_TOKENS = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
_QWEN_TOKENS |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}


class Family(NamedTuple):
    """A kind of vision-language model."""

    processor: Callable[[], ProcessorMixin]
    model: type[hf.PreTrainedModel]


FAMILIES = {
    "llava": Family(llava, hf.LlavaForConditionalGeneration),
    "gemma3": Family(gemma3, hf.Gemma3ForConditionalGeneration),
    "qwen2_5_vl": Family(qwen2_5_vl, hf.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": Family(qwen2_5_vl, hf.Qwen3VLForConditionalGeneration),
}


def make_vision_model(
    name: str, tokenizer: hf.PreTrainedTokenizerFast, dtype=torch.float32, *, kind: type | None = None
) -> hf.PreTrainedModel:
    """Build a model with random weights, norms and biases; ``kind`` selects a model class, with one label."""
    torch.manual_seed(0)
    config = _config(name, tokenizer)
    if kind is not None:
        config.num_labels = 1
    model = (kind or FAMILIES[name].model)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.copy_(parameter + 0.05 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.train()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def following(model, inputs, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities ``[V]`` of the token after ``ids``, which begin with a processor's ``inputs``."""
    given = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "attention_mask")}
    for name in {"token_type_ids", "mm_token_type_ids"} & given.keys():
        given[name] = F.pad(given[name], (0, len(ids) - given[name].shape[1]))
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **given).logits[0, -1].log_softmax(-1)
