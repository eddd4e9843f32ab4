"""Expert load and balancing loss for mixtures of experts, with every token of a batch counted once."""

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

_LOSS = "load_balancing_loss_func"  # transformers uses this name in every modeling file that has a balancing loss


class Routing:
    """Records the router outputs of one batch. Prompts count once, and padding does not count."""

    def __init__(self, model: PreTrainedModel, batch: PackedBatch) -> None:
        self._model: Any = model
        device, spans = batch.input_ids.device, batch.layout.spans
        rows = [(span.prompt, k == 0) for span in spans for k in range(len(span.responses))]
        self._prompts = torch.tensor([prompt for prompt, _ in rows], device=device)  # [R] prompt lengths
        self._is_first = torch.tensor([first for _, first in rows], device=device)  # [R] first of its comparison
        self._rows = 0  # padded rows computed so far
        self._counted: Tensor | None = None  # which tokens of the current forward count; None for all
        self._logits: dict[nn.Module, list[tuple[Tensor, Tensor | None]]] = {}

    def before_forward(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        """Work out which tokens of this forward count."""
        if not torch.is_grad_enabled():  # for example, the reference model's forward
            return
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._counted = None
        if mask is not None and mask.dim() == 4:  # a packed batch
            return
        rows, width = ids.shape
        if mask is not None:
            self._counted = mask[:, -width:].bool()
        if not inputs.get("use_cache"):  # padded rows repeat their prompt
            current = slice(self._rows, self._rows + rows)
            self._rows += rows
            is_new = torch.arange(width, device=ids.device) >= self._prompts[current, None]
            is_new = is_new | self._is_first[current, None]
            self._counted = is_new if self._counted is None else self._counted & is_new

    def after_router(self, index: int) -> Callable[..., None]:
        """Return a hook that records a router's logits, its output number ``index``."""

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            logits = (output[index] if isinstance(output, tuple) else output).flatten(0, -2)  # [tokens, E]
            # indexing waits until later: inside a checkpoint, the recomputation would not repeat it
            self._logits.setdefault(module, []).append((logits, self._counted))

        return record

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded, as with reentrant checkpoints, whose first pass runs without gradients."""
        return not self._logits

    @property
    def _layers(self) -> tuple[Tensor, ...]:
        """Router logits of each layer, ``[tokens, E]``."""
        return tuple(
            torch.cat([logits if counted is None else logits[counted.flatten()] for logits, counted in parts])
            for parts in self._logits.values()
        )

    def loss(self) -> Tensor:
        """Compute the model's own balancing loss ``[]``, without its coefficient."""
        if self.is_empty:
            raise SimpoError("output_router_logits: needs use_reentrant: false in gradient_checkpointing_kwargs")
        balance = _balancing_loss(self._model)
        assert balance is not None  # routing is only recorded for models that have one
        return balance(self._layers, self._model.num_experts, self._model.num_experts_per_tok)

    @torch.no_grad()
    def max_load(self) -> Tensor:
        """Return the load of the busiest expert in multiples of its fair share, averaged over layers, ``[]``."""
        count, top = self._model.num_experts, self._model.num_experts_per_tok
        loads = [torch.bincount(x.topk(top).indices.flatten(), minlength=count) for x in self._layers]
        return torch.stack([load.max() * count / load.sum() for load in loads]).mean()


def balance_weight(model: nn.Module) -> float:
    """Return the coefficient of the balancing loss in the model's own forward, or 0 if it has none."""
    inner: Any = causal_lm(model)
    config = inner.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None) if getattr(config, "output_router_logits", False) else None
    if weight and _balancing_loss(inner) is not None and _recorder(inner) is None:
        raise SimpoError(
            f"output_router_logits: the balancing loss of {type(inner).__name__} is not supported; "
            "set output_router_logits to false in the model's configuration"
        )
    return float(weight) if weight and _recorder(inner) is not None else 0.0


def _balancing_loss(model: Any) -> Callable[..., Tensor] | None:
    """Find the balancing loss in the module that defines the model's class or (with FSDP2) one of its bases."""
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    return next((getattr(module, _LOSS) for module in modules if hasattr(module, _LOSS)), None)


def _recorder(model: Any) -> Any:
    """Return transformers' description of the model's routers, or None if there are none or several kinds."""
    recordable = getattr(type(model.base_model), "_can_record_outputs", None) or {}
    recorder = recordable.get("router_logits")
    known = _balancing_loss(model) is not None and hasattr(model, "num_experts_per_tok")
    return recorder if known and isinstance(getattr(recorder, "target_class", None), type) else None


@contextmanager
def record_routing(model: nn.Module, batch: PackedBatch) -> Iterator[Routing | None]:
    """Record routing while an unwrapped model runs on ``batch``; yields None without gradients or experts."""
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
