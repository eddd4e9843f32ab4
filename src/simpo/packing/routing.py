"""The routing of a batch's tokens by a mixture of experts, each token counted once: load and balancing loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.packing.attention import causal_lm
from simpo.packing.layout import PackedBatch

_LOSS = "load_balancing_loss_func"  # the name of the balancing loss in every module of transformers that has one


class Routing:
    """Records the routers' outputs in forwards of one batch. Prompts are counted once, and padding is not counted."""

    def __init__(self, model: PreTrainedModel, batch: PackedBatch) -> None:
        self._model: Any = model
        device, spans = batch.input_ids.device, batch.layout.spans
        numbers = [(span.prompt, place == 0) for span in spans for place in range(len(span.responses))]
        self._prompts = torch.tensor([prompt for prompt, _ in numbers], device=device)  # [R]
        self._is_first = torch.tensor([first for _, first in numbers], device=device)  # [R] of its comparison
        self._rows = 0  # padded rows that were computed so far
        self._counted: Tensor | None = None  # which tokens of the running forward count; None for all
        self._logits: dict[nn.Module, list[tuple[Tensor, Tensor | None]]] = {}

    def before_forward(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        """Note which tokens of a forward count."""
        if not torch.is_grad_enabled():  # such as a reference's
            return
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._counted = None
        if mask is not None and mask.dim() == 4:  # a packed batch
            return
        rows, width = ids.shape
        if mask is not None:
            self._counted = mask[:, -width:].bool()
        if not inputs.get("use_cache"):  # padded rows repeat their prompt
            here = slice(self._rows, self._rows + rows)
            self._rows += rows
            is_new = torch.arange(width, device=ids.device) >= self._prompts[here, None]
            is_new = is_new | self._is_first[here, None]
            self._counted = is_new if self._counted is None else self._counted & is_new

    def after_router(self, index: int) -> Callable[..., None]:
        """A hook that keeps a router's logits, which are its ``index``-th output."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            logits = (output[index] if isinstance(output, tuple) else output).flatten(0, -2)  # [tokens, E]
            # chosen later: inside a checkpoint it would be an operation that the second computation lacks
            self._logits.setdefault(module, []).append((logits, self._counted))

        return keep

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded: checkpoints that reenter compute their layers without gradients at first."""
        return not self._logits

    @property
    def _layers(self) -> tuple[Tensor, ...]:
        """``[tokens, E]`` logits of each layer's router."""
        return tuple(
            torch.cat([logits if counted is None else logits[counted.flatten()] for logits, counted in parts])
            for parts in self._logits.values()
        )

    def loss(self) -> Tensor:
        """``[]`` the model's own balancing loss, without its coefficient."""
        if self.is_empty:
            raise SimpoError("output_router_logits: needs use_reentrant: false in gradient_checkpointing_kwargs")
        balance = _balancing_loss(self._model)
        assert balance is not None  # as of every model whose routing is recorded
        return balance(self._layers, self._model.num_experts, self._model.num_experts_per_tok)

    @torch.no_grad()
    def max_load(self) -> Tensor:
        """``[]`` how many times its fair share of tokens the busiest expert of a layer gets; the mean over layers."""
        count, top = self._model.num_experts, self._model.num_experts_per_tok
        loads = [torch.bincount(x.topk(top).indices.flatten(), minlength=count) for x in self._layers]
        return torch.stack([load.max() * count / load.sum() for load in loads]).mean()


def balance_weight(model: nn.Module) -> float:
    """The coefficient of the balancing loss that the model's own forward adds; 0 if it adds none."""
    inner: Any = causal_lm(model)
    config = inner.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None) if getattr(config, "output_router_logits", False) else None
    if weight and _balancing_loss(inner) is not None and _recorder(inner) is None:
        raise SimpoError(
            f"output_router_logits: the loss that balances the experts of {type(inner).__name__} is not supported; "
            "set it to false in the model's configuration"
        )
    return float(weight) if weight and _recorder(inner) is not None else 0.0


def _balancing_loss(model: Any) -> Callable[..., Tensor] | None:
    """The balancing loss of the module that defines the model's class or, as with FSDP2's classes, a base of it."""
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    return next((getattr(module, _LOSS) for module in modules if hasattr(module, _LOSS)), None)


def _recorder(model: Any) -> Any:
    """The class of the model's routers, as transformers records it; None if there are none or several kinds."""
    found = getattr(type(model.base_model), "_can_record_outputs", None) or {}
    recorder = found.get("router_logits")
    known = _balancing_loss(model) is not None and hasattr(model, "num_experts_per_tok")
    return recorder if known and isinstance(getattr(recorder, "target_class", None), type) else None


@contextmanager
def record_routing(model: nn.Module, batch: PackedBatch) -> Iterator[Routing | None]:
    """Record the routing in forwards of ``batch`` by an unwrapped model; None without gradients or experts."""
    inner: Any = causal_lm(model)
    recorder = _recorder(inner) if torch.is_grad_enabled() else None
    if recorder is None:
        yield None
        return
    routing = Routing(inner, batch)
    routers = [
        module
        for name, module in inner.named_modules()
        if isinstance(module, recorder.target_class) and name.endswith(recorder.layer_name or "")
    ]
    hooks = [router.register_forward_hook(routing.after_router(recorder.index)) for router in routers]
    hooks.append(inner.base_model.register_forward_pre_hook(routing.before_forward, with_kwargs=True))
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()
