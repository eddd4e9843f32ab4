"""Images in packed batches against the model's own forward on its processor's output, one sequence at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import transformers as hf
from tests.vision import FAMILIES, make_vision_model, picture

from simpo.errors import SimpoError
from simpo.packing import attention as kernels
from simpo.packing.attention import AttentionStyle
from simpo.packing.images import check_image_inputs, forward_inputs
from simpo.packing.layout import AttentionLayout, PackedBatch, Span, TokenizedComparison
from simpo.packing.model import policy_logprobs, reward_forward, state_of

TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Row(NamedTuple):
    """The processor's output for a prompt, and the responses to it."""

    inputs: hf.BatchFeature
    comparison: TokenizedComparison


def make_row(processor, text: str, pictures: list, responses: list[str]) -> Row:
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    each = (processor(text=[processor.image_token], images=[one], return_tensors="pt") for one in pictures)
    images = tuple({name: tensor for name, tensor in one.items() if name not in TEXT} for one in each)
    ids = [processor.tokenizer(response).input_ids for response in responses]
    return Row(inputs, TokenizedComparison(inputs.input_ids[0].tolist(), ids, images=images))


@pytest.fixture(scope="module")
def rows():
    """``rows(processor)``: K = 3 with an image, K = 2 without, and K = 2 with two images of different sizes."""

    def make(processor) -> list[Row]:
        image = processor.image_token
        return [
            make_row(processor, f"what is {image} there?", [picture(40, 24, 1)], ["a red", "two blue circles", "b"]),
            make_row(processor, "compare the first", [], ["a", "second"]),
            make_row(processor, f"{image} and {image} then", [picture(64, 32, 2), picture(16, 48, 3)], ["a line", "o"]),
        ]

    return make


def naive(model, rows: list[Row]) -> torch.Tensor:
    found = []
    for inputs, comparison in rows:
        for response in comparison.response_ids:
            longer = {name: tensor for name, tensor in inputs.items() if name not in TEXT}
            for name in TEXT[2:]:
                if name in inputs:
                    longer[name] = torch.nn.functional.pad(inputs[name], (0, len(response)))
            ids = torch.tensor([comparison.prompt_ids + response])
            logits = model(input_ids=ids, use_cache=False, **longer).logits[0, len(comparison.prompt_ids) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.cat(found)


def gradients(logps: torch.Tensor, model) -> dict[str, torch.Tensor]:
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((logps * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare relative to each gradient's norm. A key's bias has a zero gradient, because softmax cancels it."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, exact in expected.items():
        assert (found[name] - exact).norm() <= 1e-3 * max(exact.norm(), 1e-4 * total), name
    vision = [name for name in expected if "vision" in name or "visual" in name]
    assert sum(expected[name].norm() > 1e-4 * total for name in vision) > len(vision) / 3


@pytest.mark.parametrize("path", ["auto", "padded"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_images_match_the_models_own_forward(kind, path, rows):
    processor = FAMILIES[kind].processor()
    model, several = make_vision_model(kind, processor.tokenizer), rows(processor)
    expected = naive(model, several)
    found = policy_logprobs(model, PackedBatch.build([row.comparison for row in several]), path=path)
    assert (state_of(model).path, state_of(model).reasons) == ("packed", [])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert_close(gradients(found, model), gradients(expected, model))


@pytest.mark.parametrize("path", ["auto", "padded"])
def test_rewards_match_the_models_own_forward(path, rows):
    """Scores and gradients of a sequence classifier on the processor's output."""
    processor = FAMILIES["gemma3"].processor()
    model = make_vision_model("gemma3", processor.tokenizer, kind=hf.Gemma3ForSequenceClassification)
    several = rows(processor)
    expected = naive_rewards(model, several)
    found = reward_forward(model, PackedBatch.build([row.comparison for row in several]), path=path)
    assert (state_of(model).path, state_of(model).reasons, state_of(model).fused_head) == ("packed", [], True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert_close(gradients(found, model), gradients(expected, model))
    state_of(model).fused_head = False  # as for a model whose head is more than one layer
    own = reward_forward(model, PackedBatch.build([row.comparison for row in several]))
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def naive_rewards(model, rows: list[Row]) -> torch.Tensor:
    found = []
    for inputs, comparison in rows:
        for response in comparison.response_ids:
            longer = {name: tensor for name, tensor in inputs.items() if name not in TEXT}
            if "token_type_ids" in inputs:
                longer["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, len(response)))
            states = model.model(input_ids=torch.tensor([comparison.prompt_ids + response]), **longer)[0]
            found.append(states[0, -1] @ model.score.weight[0])
    return torch.stack(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_comparison_does_not_depend_on_its_neighbors(kind, rows):
    """Bit for bit, whichever of its neighbors' images, prompts or responses change."""
    processor = FAMILIES[kind].processor()
    model, several = make_vision_model(kind, processor.tokenizer), [row.comparison for row in rows(processor)]
    before = policy_logprobs(model, PackedBatch.build(several))
    image = processor.image_token
    other = make_row(processor, f"{image} but {image} now", [picture(64, 32, 8), picture(16, 48, 9)], ["a line", "o"])
    after = policy_logprobs(model, PackedBatch.build([*several[:2], other.comparison]))
    mine = PackedBatch.build(several).response_of < 5
    assert torch.equal(before[mine], after[mine])
    assert (before[~mine] != after[~mine]).any()


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_image_is_encoded_once_for_all_responses(kind, rows):
    processor = FAMILIES[kind].processor()
    model, several = make_vision_model(kind, processor.tokenizer), rows(processor)
    batch = PackedBatch.build([row.comparison for row in several])
    policy_logprobs(model, batch)  # runs the self-check first
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    encoded = []
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    policy_logprobs(model, batch)
    policy_logprobs(model, batch, path="padded")
    hook.remove()
    once = [sum(len(image["pixel_values"]) for image in row.comparison.images) for row in several]
    assert encoded == [sum(once), 3 * once[0] + 2 * once[2]]


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_gradient_checkpointing_changes_nothing(kind, rows):
    processor = FAMILIES[kind].processor()
    model = make_vision_model(kind, processor.tokenizer)
    batch = PackedBatch.build([row.comparison for row in rows(processor)])
    expected = gradients(policy_logprobs(model, batch), model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(policy_logprobs(model, batch), model)
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-4, atol=1e-5)


def test_the_self_check_detects_wrong_attention_to_images(rows, caplog):
    """Gemma's image tokens attend to each other in both directions; without that, the packed path must be rejected."""
    processor = FAMILIES["gemma3"].processor()
    model, several = make_vision_model("gemma3", processor.tokenizer), rows(processor)
    expected = naive(model, several)
    batch = PackedBatch.build([row.comparison for row in several])
    model.model.language_model.register_forward_pre_hook(_without_blocks, with_kwargs=True)
    found = policy_logprobs(model, batch)
    assert state_of(model).path == "padded"
    assert "images cannot be combined with a cache" in caplog.text
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def _without_blocks(_, args, kwargs):
    layout = kwargs.get("attention_layout")
    return args, kwargs if layout is None else kwargs | {
        "attention_layout": AttentionLayout(layout.spans, windows=layout.windows)
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_inputs_match_the_processors(kind):
    processor = FAMILIES[kind].processor()
    model = make_vision_model(kind, processor.tokenizer)
    one = make_row(processor, processor.image_token, [picture(40, 24)], ["a"])
    twice = processor(text=[processor.image_token * 2], images=[picture(40, 24)] * 2, return_tensors="pt")
    check_image_inputs(model, one.comparison.images[0], twice)
    with pytest.raises(SimpoError, match="not supported: pixel_mask would differ"):
        check_image_inputs(model, one.comparison.images[0], {**twice, "pixel_mask": torch.ones(2, 2)})


def test_a_text_model_rejects_images(make_model):
    with pytest.raises(SimpoError, match="LlamaForCausalLM takes no images"):
        check_image_inputs(make_model("llama"), {}, {})


def test_images_of_different_sizes_are_zero_padded():
    """At the end, as processors pad several images; the first dimension counts images."""
    model = make_vision_model("llava", FAMILIES["llava"].processor().tokenizer)
    images = [{"pixel_values": torch.full((count, 3, h, w), float(count))} for count, h, w in ((1, 2, 5), (2, 4, 3))]
    expected = torch.zeros(3, 3, 4, 5)
    expected[:1, :, :2, :5], expected[1:, :, :4, :3] = 1, 2
    assert torch.equal(forward_inputs(model, torch.tensor([[1]]), images)["pixel_values"], expected)


@pytest.mark.parametrize("window", [None, 6])
def test_kernels_let_image_tokens_attend_to_each_other(window):
    """Both kernels against an explicit mask over all pairs of tokens."""
    layout = AttentionLayout((Span(9, (4, 2)), Span(3, (5,))))
    blocks = torch.full((layout.total,), -1)
    blocks[1:4], blocks[5:8], blocks[15:17] = 0, 1, 2
    layout = AttentionLayout(layout.spans, blocks=blocks)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, layout.total, 16, dtype=torch.float64) for _ in range(3))
    place = [(c, part, i) for c, span in enumerate(layout.spans) for part, i in _places(span)]
    mask = torch.tensor([[_sees(a, b, i, j, blocks, window) for j, b in enumerate(place)] for i, a in enumerate(place)])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    style = AttentionStyle(0.3, window)
    for kernel in (kernels.by_segment, kernels.flex):
        torch.testing.assert_close(kernel(query, key, value, layout, style), expected.transpose(1, 2))


def _places(span: Span):
    yield from ((0, i) for i in range(span.prompt))
    for k, size in enumerate(span.responses, start=1):
        yield from ((k, span.prompt + i) for i in range(size))


def _sees(a, b, i, j, blocks, window) -> bool:
    """Return whether the token at ``a`` = (comparison, part, position) attends to the one at ``b``."""
    if a[0] != b[0] or b[1] not in (0, a[1]):
        return False
    same_image = blocks[i] >= 0 and blocks[i] == blocks[j]
    return bool((b[2] <= a[2] or same_image) and (window is None or b[2] > a[2] - window))
