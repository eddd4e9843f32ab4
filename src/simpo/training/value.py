"""The value function of PPO: a network that starts from a reward model, or a layer on the policy's hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from simpo.errors import SimpoError
from simpo.models.adapters import disable_dropout, freeze_parts_unused_by_text
from simpo.models.loading import load_tokenizer
from simpo.models.reward import load_reward_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import find_head, prepare_policy, value_forward
from simpo.training.configs import OnlineConfig

FILE = "value.safetensors"  # in a checkpoint


class ValueFunction:
    """Predicts the rewards that are still to come from the text before a token.

    The trainer's optimizer and schedule update it with the policy. It is not part of the trainer's model, so that the
    model is saved without it; gradients are averaged over ranks, and clipped, here. Every rank has all of it.

    Args:
        policy: the model that is trained.
        args: ``value_model`` names a reward model; None: a layer on the policy's states, which starts with values of 0
            and whose loss also trains the policy's other layers.
        tokenizer: of the policy.
        loading: how the policy was loaded; ``trust_remote_code`` and ``allow_pickle`` also apply to the reward model.

    Raises:
        SimpoError: the reward model cannot be used, or has another vocabulary.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        args: OnlineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        loading: ModelArguments | None = None,
    ) -> None:
        self._path = args.forward_path
        self.head: nn.Module | None = None  # the layer, or None for a network
        if args.value_model is None:
            self.module: Any = _new_head(policy)
            self.head = self.module
        else:
            self.module = _load(args.value_model, policy, tokenizer, loading)
            if args.disable_dropout:
                disable_dropout(self.module)
            _enable_checkpointing(self.module, args)
        self.module.to(args.device)
        if args.world_size > 1:
            for parameter in self.parameters:  # a new adapter is random
                broadcast(parameter.data)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self._trained().values())

    def of(self, batch: PackedBatch) -> Tensor:
        """``[S]`` values of the states in which the scored tokens of ``batch`` are chosen, by a network."""
        return value_forward(self.module, batch, path=self._path)

    def check(self, comparisons: Sequence[TokenizedComparison]) -> None:
        """Run a network on ``comparisons``, to find out early whether it can read them and by which path."""
        batch = PackedBatch.build(comparisons).to(next(self.module.parameters()).device)
        with torch.no_grad():
            self.of(batch)

    # ---- Steps of the optimizer.

    def add_to_optimizer(self, optimizer: torch.optim.Optimizer, trainer: Trainer) -> None:
        """Add the parameters to the trainer's ``optimizer``, with their own learning rate if there is one."""
        args: Any = trainer.args
        decayed = set(trainer.get_decay_parameter_names(self.module))
        rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        for decay, chosen in ((args.weight_decay, True), (0.0, False)):
            group = [parameter for name, parameter in self._trained().items() if (name in decayed) == chosen]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": decay, "lr": rate})

    def prepare_step(self) -> None:
        """Clear the gradients of the previous step."""
        self.module.train()
        self.module.zero_grad()

    def average_and_clip_gradients(self, accelerator: Accelerator, max_norm: float) -> float:
        """Average gradients over ranks and clip them to ``max_norm`` (0: not); returns their norm before."""
        for parameter in self.parameters:
            if parameter.grad is not None and accelerator.num_processes > 1:
                parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))
        return float(nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf))

    # ---- Checkpoints.

    def save(self, folder: Path) -> None:
        """Write the trained parameters to a checkpoint's ``folder``."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._trained().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; raises :class:`SimpoError` if there is nothing, or another value function."""
        if not (folder / FILE).is_file():
            raise SimpoError(
                f"resume_from_checkpoint: {folder} has no value function; it was not written by a run with ppo"
            )
        stored, parameters = load_file(folder / FILE), self._trained()
        if {name: each.shape for name, each in stored.items()} != {
            name: each.shape for name, each in parameters.items()
        }:
            raise SimpoError(f"resume_from_checkpoint: {folder} has another value function; name the same value_model")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}


def _new_head(policy: nn.Module) -> nn.Linear:
    """A layer that starts with values of 0, in fp32 at least."""
    inner = prepare_policy(policy)
    output = find_head(inner)
    if output is None:
        raise SimpoError(
            f"objective: the output layer of {type(inner).__name__} is not a plain matrix product, next to which a "
            "value head could be put; name a reward model as value_model"
        )
    head = nn.Linear(output.weight.shape[1], 1, dtype=torch.promote_types(_dtype(policy), torch.float32))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _enable_checkpointing(model: Any, args: Any) -> None:
    """Enable checkpointing as ``Trainer`` does for the policy; before 5.23 transformers named it after gradients."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False) and hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(getattr(args, f"{name}_kwargs") or None)
            return


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)


def _load(
    name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None, loading: ModelArguments | None
) -> PreTrainedModel | PeftModel:
    """A reward model in the policy's type of weights, and with an adapter of the same size if the policy has one."""
    adapter: dict[str, Any] = {}
    if isinstance(policy, PeftModel):
        config: Any = policy.peft_config[policy.active_adapter]
        adapter = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    allowed: dict[str, Any] = {}
    if loading is not None:
        allowed = {"trust_remote_code": loading.trust_remote_code, "allow_pickle": loading.allow_pickle}
    try:
        dtype = str(_dtype(policy)).removeprefix("torch.")
        arguments = ModelArguments(name, dtype=dtype, use_peft=bool(adapter), **adapter, **allowed)
        own_tokenizer = load_tokenizer(arguments)
        model = load_reward_model(arguments)
    except SimpoError as error:
        raise SimpoError(f"value_model: {str(error).removeprefix('model_name_or_path: ')}") from error
    if tokenizer is not None and own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise SimpoError(
            f"value_model: {name} has another vocabulary than the policy, whose tokens it has to read; train a reward "
            "model that starts from the policy's family, or leave it out"
        )
    freeze_parts_unused_by_text(model)
    return model
