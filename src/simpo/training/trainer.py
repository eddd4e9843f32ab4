"""``PreferenceConfig`` and ``PreferenceTrainer``: objectives on packed batches, and what they log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import Prepared, check_rankings, is_feedback, prepare, prepare_feedback
from simpo.errors import SimpoError, check_all
from simpo.objectives import OBJECTIVES, Objective, Responses, reference_point, sft_term
from simpo.packing.model import policy_forward
from simpo.packing.scoring import divergence_forward, mean_by_comparison
from simpo.training.batches import MISMATCHED_REF_LOGP, PlannedBatch, widest_type
from simpo.training.packed import PackedTrainer
from simpo.training.reference import ReferenceModel, mismatched_rows, with_mismatched
from simpo.training.settings import TrainingSettings

# ---- The configuration of a preference run: the objective and its hyperparameters.


_DEFAULT = "simpo"


_SIMPO_ONLY = ("gamma_beta_ratio", "gamma", "link")  # whoever gives one of them means SimPO


_SIMPO_BETA = 1.0  # the paper's are 2 to 10; those of DPO and its kin are 0.01 to 0.5


def _hyperparameter(name: str) -> Any:
    """The field of ``PreferenceConfig`` for a hyperparameter, whose help the objectives give."""
    uses: dict[str, list[str]] = {}  # by meaning: the same name may mean different things to different objectives
    for row in OBJECTIVES.values():
        if name in row.hyperparameters:
            known = row.hyperparameters[name]
            uses.setdefault(known.help, []).append(f"{row.name} {known.default}")
        elif name in row.spellings:
            uses.setdefault(f"Another way to give {row.spellings[name].of}.", []).append(row.name)
    return field(
        default=None,
        metadata={"help": " ".join(f"{text.removesuffix('.')} ({', '.join(rows)})." for text, rows in uses.items())},
    )


@dataclass
class PreferenceConfig(TrainingSettings):
    """Configuration of a preference run.

    All keys of ``transformers.TrainingArguments``, those of :class:`~simpo.training.settings.TrainingSettings`, and the
    hyperparameters of the objectives (``beta``, ``gamma_beta_ratio``, ...), where None stands for the objective's own
    default.

    Pairs per optimizer step are ``per_device_train_batch_size * gradient_accumulation_steps * world_size``, as
    everywhere in transformers; the first two are folded into one, because micro-batches are cut by
    ``max_batch_tokens``.

    Raises:
        SimpoError: a value that is out of bounds, unknown or contradictory; the message names the key.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper's are 3e-7 to 1e-6."})

    objective: str | None = field(
        default=None, metadata={"help": f"The loss: one of {', '.join(OBJECTIVES)} (default: simpo)."}
    )
    loss_type: str | None = field(
        default=None, metadata={"help": "Alias for link (in the paper's recipes) or objective (in TRL's)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of an SFT term: the chosen response's average negative log-probability."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(policy || start model), exact, mean over the response tokens."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probabilities once and keep them (default: true); false: at "
            "every step."
        },
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder for the reference's log-probabilities (default: in HF_HOME)."}
    )
    paper_tokenization: bool = field(
        default=False, metadata={"help": "Score the assistant header with the response, as the paper's code does."}
    )

    beta: float | None = _hyperparameter("beta")
    gamma_beta_ratio: float | None = _hyperparameter("gamma_beta_ratio")
    gamma: float | None = _hyperparameter("gamma")
    link: Literal["sigmoid", "hinge"] | None = _hyperparameter("link")
    label_smoothing: float | None = _hyperparameter("label_smoothing")
    tau: float | None = _hyperparameter("tau")
    length_normalized: bool | None = _hyperparameter("length_normalized")
    lam: float | None = _hyperparameter("lam")
    lam_w: float | None = _hyperparameter("lam_w")
    lam_l: float | None = _hyperparameter("lam_l")
    desirable_weight: float | None = _hyperparameter("desirable_weight")
    undesirable_weight: float | None = _hyperparameter("undesirable_weight")
    alpha: float | None = _hyperparameter("alpha")
    delta: float | None = _hyperparameter("delta")

    @property
    def row(self) -> Objective:
        """The chosen objective with its default hyperparameters."""
        return OBJECTIVES[str(self.objective)]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's hyperparameters, all of them, defaults filled in."""
        given = {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}
        return self.row.resolve(given)

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """What the data layer needs to know."""
        return replace(super().tokenize_settings, paper_tokenization=self.paper_tokenization)

    def _refuse(self) -> None:
        check_all(super()._refuse, self._refuse_a_guess)

    def _refuse_a_guess(self) -> None:
        """Refuse keys that leave open which objective is meant."""
        if self.objective is not None or self.loss_type is not None:
            return
        if any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            return
        beta = self.beta
        if isinstance(beta, int | float) and 0 < beta < _SIMPO_BETA:
            raise SimpoError(
                f"objective: not given, and beta {beta:g} is on DPO's scale (SimPO's is 2 to 10); write objective: "
                f"dpo or kto with it, orpo with lam: {beta:g} or ipo with tau: {beta:g} in its place, or simpo"
            )
        found = "precompute_ref_log_probs" if self.precompute_ref_log_probs is not None else None
        if beta is None and self.label_smoothing:
            found = found or "label_smoothing"
        if found:
            raise SimpoError(f"objective: not given, and {found} is not only SimPO's; write objective: dpo, or simpo")

    def _resolve_loss_type(self) -> None:
        """Read ``loss_type`` as the objective, or as the link of one."""
        given, self.loss_type = self.loss_type, None
        if given in OBJECTIVES:
            if self.objective not in (None, given):
                raise SimpoError(f"loss_type {given!r} and objective {self.objective!r} disagree; give one of them")
            self.objective = given
        elif given is not None:
            self._take_link(given)

    def _take_link(self, link: str) -> None:
        if link not in _links():
            known = ", ".join((*OBJECTIVES, *_links()))
            raise SimpoError(f"loss_type: {link!r} is neither an objective nor a link; there are {known}")
        if self.objective is None and not any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            raise SimpoError(
                f"loss_type: {link!r} alone may mean DPO's or SimPO's; add objective: dpo, or objective: simpo with "
                "gamma_beta_ratio"
            )
        name = self.objective or _DEFAULT
        keys = OBJECTIVES[name].hyperparameters
        if link == "sigmoid" and "link" not in keys and "label_smoothing" in keys:
            return  # the only one that it has
        if "link" not in keys:
            raise SimpoError(f"loss_type: {link!r} is no objective and no link of objective {name!r}")
        if self.link not in (None, link):
            raise SimpoError(f"loss_type {link!r} and link {self.link!r} disagree; give one of them")
        self.link = link  # type: ignore[assignment]

    def _check(self) -> None:
        check_all(self._check_objective, super()._check)

    def _check_objective(self) -> None:
        if self.objective not in (None, *OBJECTIVES):
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        self._resolve_loss_type()
        self.objective = self.objective or _DEFAULT
        self.precompute_ref_log_probs = self.precompute_ref_log_probs is not False
        try:
            self.hyperparameters  # noqa: B018 - resolving is the check
        except ValueError as error:
            raise SimpoError(str(error)) from error
        for key in ("sft_weight", "kl_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise SimpoError(f"{key}: must be >= 0 and finite, not {getattr(self, key)}")
        if self.sft_weight and self._has_anchor(self.hyperparameters):
            weighted = "lam" in self.row.hyperparameters and not self._has_anchor(self.hyperparameters | {"lam": 0.0})
            remedy = ", or set lam: 0" if weighted else ""
            raise SimpoError(
                f"sft_weight: objective {self.objective!r} has a term on the chosen response already; leave sft_weight "
                f"out{remedy}"
            )

    def _has_anchor(self, hyperparameters: dict[str, Any]) -> bool:
        """Whether the objective's own term on the chosen response counts."""
        response = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        anchor = self.row.with_hyperparameters(**hyperparameters).anchor(response)
        return anchor is not None and bool(anchor.any())


def _links() -> tuple[str, ...]:
    """Every link that some objective can have."""
    found = (get_args(row.hyperparameters["link"].type) for row in OBJECTIVES.values() if "link" in row.hyperparameters)
    return tuple(dict.fromkeys(chain.from_iterable(found)))


def hyperparameter_names() -> list[str]:
    """Every name under which some objective's hyperparameter can be given."""
    return list(dict.fromkeys(name for row in OBJECTIVES.values() for name in (*row.hyperparameters, *row.spellings)))


# ---- What is logged of a batch of comparisons, under the names that people's dashboards have.


NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


UNPAIRED_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


KL = "kl"


def pair_metrics(objective: Objective, w: Responses, l: Responses) -> Tensor:  # noqa: E741
    """``[B, 6]`` figures of ``B`` pairs, detached: those of :data:`NAMES` but the loss.

    ``logps/*`` are averages over a response's tokens for length-normalised objectives and sums for the others, as in
    the curves of the paper.
    """
    chosen, rejected = objective.reward(w), objective.reward(l)
    right = (chosen > rejected).to(chosen.dtype)
    columns = (chosen, rejected, right, chosen - rejected, _logged(objective, w), _logged(objective, l))
    return torch.stack(columns, dim=-1).detach()


def unpaired_metrics(objective: Objective, y: Responses, label: Tensor) -> Tensor:
    """``[B, 4]`` figures of ``B`` responses that are judged alone, detached: :data:`UNPAIRED_NAMES` but the loss.

    A desirable response (``label`` ``[B]``) has those of chosen ones, an undesirable one those of rejected ones; the
    others are NaN.
    """
    figures = (objective.reward(y), _logged(objective, y))
    columns = [values.masked_fill(hidden, torch.nan) for values in figures for hidden in (~label, label)]
    return torch.stack(columns, dim=-1).detach()


def _logged(objective: Objective, y: Responses) -> Tensor:
    return y.avg if objective.average_logps else y.logp


class PreferenceTrainer(PackedTrainer):
    """Trains a causal language model on comparisons, or on single responses with labels where the objective takes them.

    A step's loss is the mean over its comparisons. One with more than two responses has the mean over its ordered
    pairs, and the anchor term once, on the best response. The reference is the policy that training starts from: the
    model as it is given here, its adapter included. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`; ``args`` is a :data:`~simpo.training.trainer.PreferenceConfig`.
    """

    config_type = PreferenceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._z_ref = torch.zeros(())
        self._precomputed = self.objective.needs_reference and self.args.precompute_ref_log_probs
        beside = "kl_weight" if self.args.kl_weight else None
        if self.objective.needs_reference and not self._precomputed:
            beside = "precompute_ref_log_probs"
        self._reference = ReferenceModel(self, self.args.reference_cache, beside)
        if self._precomputed and self.args.reference_cache is not None:
            self._reference.open_cache()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of a row's figures."""
        names = UNPAIRED_NAMES if self._unpaired else NAMES
        return (*names, KL) if self.args.kl_weight else names

    @cached_property
    def objective(self) -> Objective:
        """The objective with its hyperparameters."""
        return self.args.row.with_hyperparameters(**self.args.hyperparameters)

    @cached_property
    def _unpaired(self) -> bool:
        """Whether responses are judged alone."""
        rows = next(iter(self._given_rows()), None)
        return rows is not None and "label" in rows.column_names

    def _given_rows(self) -> list[Dataset]:
        """Those that the trainer was made with, training rows first."""
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [rows for rows in (self.train_dataset, *held_out) if rows is not None]

    # ---- data ----

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize comparisons, or single responses with labels; for KTO with the column ``mismatched_ids``."""
        if is_feedback(dataset):
            if not args.row.takes_unpaired:
                takers = ", ".join(name for name, row in OBJECTIVES.items() if row.takes_unpaired)
                raise SimpoError(
                    f"{label}: single responses with labels, and {args.objective!r} is trained on pairs; unpaired "
                    f"feedback is for objective {takers}"
                )
            prepared = prepare_feedback(dataset, tokenizer, args.tokenize_settings, label=label)
        else:
            prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
            check_rankings(prepared.dataset, label)
        if "z_ref" not in args.row.needs:
            return prepared
        return replace(prepared, dataset=with_mismatched(prepared.dataset, args.max_length, label))

    def completed(self, rows: Dataset) -> Dataset:
        """With the reference's log-probabilities, where the objective needs them."""
        if ("label" in rows.column_names) != self._unpaired:
            raise SimpoError(
                "eval_dataset: comparisons and single responses with labels; give the same kind as to train"
            )
        return self._reference.completed(rows) if self._precomputed else rows

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; what the reference has to say is asked before a checkpoint or a step moves the weights."""
        for rows in self._given_rows():
            self.completed(rows)
        self._reference.leave()
        return super().train(*args, **kwargs)

    # ---- KTO's reference point ----

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """KTO: estimate the reference point from all micro-batches of the step, over all ranks."""
        if "z_ref" not in self.objective.needs:
            return
        total = torch.zeros((), dtype=widest_type(self.args.device), device=self.args.device)
        for batch in (batch.to(self.args.device) for batch in batches):
            assert batch.mismatched is not None
            with torch.no_grad(), self.accelerator.autocast():
                logps = policy_forward(self.model, batch.mismatched, path=self.path).logp
            reference = batch.mismatched_ref_logps
            if reference is None:
                reference = self._reference.logps(batch.mismatched)
            total += ((logps.to(total) - reference.to(total)) * batch.packed.weights).sum()
        self._settle_reference_point(self._sum_over_ranks(total) / batches[0].step_weight)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As the base's; KTO's reference point is that of all rows that are evaluated."""
        if "z_ref" in self.objective.needs:
            rows = dataloader.dataset.rows
            mismatched = mismatched_rows(rows)
            if self._precomputed:
                reference = torch.tensor(rows[MISMATCHED_REF_LOGP][:], dtype=torch.float64)
            else:
                reference = self._reference.response_logps(mismatched)
            logps = self.response_logps(mismatched)
            self._settle_reference_point((logps - reference.to(logps)).mean())
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _settle_reference_point(self, mean_ratio: Tensor) -> None:
        self._z_ref = reference_point(mean_ratio, self.args.hyperparameters["beta"])

    # ---- loss ----

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """As the base's, with the reference where one is needed."""
        if self.objective.needs_reference and batch.ref_logps is None:
            batch = batch._replace(ref_logps=self._reference.logps(batch.packed))
        if self.args.kl_weight:
            return self._penalised_rows(model, batch)
        return super().forward_rows(model, batch)

    def _penalised_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """With KL(policy || reference), the mean over the scored tokens of a comparison, added and logged."""
        reference = self._reference.states(batch.packed)
        y, divergence = divergence_forward(model, batch.packed, reference, path=self.path)
        losses, figures = self.loss_and_metrics(y, batch)
        kl = mean_by_comparison(batch.packed, divergence)  # [C]
        losses = losses + self.args.kl_weight * kl
        return losses, torch.cat([losses.detach()[:, None], figures[:, 1:], kl.detach()[:, None]], dim=1)

    def loss_and_metrics(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and figures of comparisons or of responses that are judged alone."""
        context = {"z_ref": self._z_ref} if "z_ref" in self.objective.needs else {}
        if batch.ref_logps is not None:
            y = replace(y, ref_logp=batch.ref_logps.to(y.logp))
        if batch.labels is not None:
            return self._unpaired_figures(y, batch.labels, context)
        pairs = batch.pairs
        w, l, best = (_taken(y, index) for index in (pairs.better, pairs.worse, pairs.best))  # noqa: E741
        losses = pairs.mean(self.objective.pair(w, l, **context))
        anchor = self.objective.anchor(best)
        if anchor is not None:
            losses = losses + anchor
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(best)
        figures = pairs.mean(pair_metrics(self.objective, w, l))
        return losses, torch.cat([losses.detach()[:, None], figures], dim=1)

    def _unpaired_figures(self, y: Responses, labels: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses and metrics of responses that are judged alone; the SFT term applies to the desirable ones."""
        losses = self.objective.unpaired(y, labels, **context)
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(y).masked_fill(~labels, 0)
        figures = unpaired_metrics(self.objective, y, labels)
        return losses, torch.cat([losses.detach()[:, None], figures], dim=1)


def _taken(y: Responses, index: Tensor) -> Responses:
    """The responses with these numbers, ``[N]``."""
    columns = (y.logp, y.length, y.ref_logp)
    return Responses(*(None if column is None else column.index_select(0, index) for column in columns))
