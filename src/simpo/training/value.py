"""PPO's value function: a separate network initialized from a reward model, or a head on the policy."""

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

FILE = "value.safetensors"  # its name in a checkpoint


class ValueFunction:
    """Predicts the rewards still to come, given the text before a token.

    The trainer's optimizer and schedule update it along with the policy. It is not part of the trainer's model, so the
    model is saved without it, and its gradients are averaged over ranks and clipped here. Every rank holds all of it.

    Args:
        policy: the model being trained.
        args: ``value_model`` names a reward model; if None, the value function is a head on the policy's hidden states
            that predicts 0 at first and whose loss also trains the policy's other layers.
        tokenizer: the policy's tokenizer.
        loading: how the policy was loaded; ``trust_remote_code`` and ``allow_pickle`` also apply to the reward model.

    Raises:
        SimpoError: the reward model cannot be used or has another vocabulary.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        args: OnlineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        loading: ModelArguments | None = None,
    ) -> None:
        self._path = args.forward_path
        self.head: nn.Module | None = None  # the head on the policy, or None for a separate network
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
            for parameter in self.parameters:  # a new adapter is initialized at random
                broadcast(parameter.data)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self._trained().values())

    def values(self, batch: PackedBatch) -> Tensor:
        """Return the network's values ``[S]`` of the states in which the scored tokens of ``batch`` are chosen."""
        return value_forward(self.module, batch, path=self._path)

    def check(self, comparisons: Sequence[TokenizedComparison]) -> None:
        """Run the network on ``comparisons`` to find out early whether it can read them, and on which path."""
        batch = PackedBatch.build(comparisons).to(next(self.module.parameters()).device)
        with torch.no_grad():
            self.values(batch)

    # ---- Optimizer steps.

    def add_to_optimizer(self, optimizer: torch.optim.Optimizer, trainer: Trainer) -> None:
        """Add the parameters to the trainer's ``optimizer``, with ``value_learning_rate`` if it is set."""
        args: Any = trainer.args
        decayed = set(trainer.get_decay_parameter_names(self.module))
        rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        for decay, decays in ((args.weight_decay, True), (0.0, False)):
            group = [parameter for name, parameter in self._trained().items() if (name in decayed) == decays]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": decay, "lr": rate})

    def prepare_step(self) -> None:
        """Clear the gradients of the previous step."""
        self.module.train()
        self.module.zero_grad()

    def average_and_clip_gradients(self, accelerator: Accelerator, max_norm: float) -> float:
        """Average gradients over ranks, clip them to ``max_norm`` (unless it is 0) and return their unclipped norm."""
        for parameter in self.parameters:
            if parameter.grad is not None and accelerator.num_processes > 1:
                parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))
        return float(nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf))

    # ---- Checkpoints.

    def save(self, folder: Path) -> None:
        """Write the trained parameters to a checkpoint ``folder``."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._trained().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Load the saved parameters; raise :class:`SimpoError` if they are missing or of another value function."""
        if not (folder / FILE).is_file():
            raise SimpoError(
                f"resume_from_checkpoint: {folder} has no value function; use a checkpoint of a run with ppo"
            )
        stored, parameters = load_file(folder / FILE), self._trained()
        if {name: each.shape for name, each in stored.items()} != {
            name: each.shape for name, each in parameters.items()
        }:
            raise SimpoError(f"resume_from_checkpoint: {folder} has another value function; use the same value_model")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}


def _new_head(policy: nn.Module) -> nn.Linear:
    """Create a head that predicts 0, in fp32 or higher precision."""
    inner = prepare_policy(policy)
    output = find_head(inner)
    if output is None:
        raise SimpoError(
            f"objective: cannot add a value head to {type(inner).__name__}, because its output layer is not a plain "
            "matrix product; set value_model to a reward model"
        )
    head = nn.Linear(output.weight.shape[1], 1, dtype=torch.promote_types(_dtype(policy), torch.float32))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _enable_checkpointing(model: Any, args: Any) -> None:
    """Enable activation checkpointing as ``Trainer`` does (called gradient checkpointing before transformers 5.23)."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False) and hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(getattr(args, f"{name}_kwargs") or None)
            return


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)


def _load(
    name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None, loading: ModelArguments | None
) -> PreTrainedModel | PeftModel:
    """Load a reward model with the policy's dtype and, if the policy has an adapter, one of the same size."""
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
        its_tokenizer = load_tokenizer(arguments)
        model = load_reward_model(arguments)
    except SimpoError as error:
        raise SimpoError(f"value_model: {str(error).removeprefix('model_name_or_path: ')}") from error
    if tokenizer is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise SimpoError(
            f"value_model: {name} has another vocabulary than the policy, whose tokens it has to read; use a reward "
            "model of the policy's family, or leave it out"
        )
    freeze_parts_unused_by_text(model)
    return model
