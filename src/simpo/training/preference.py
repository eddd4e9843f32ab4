"""``PreferenceConfig`` and ``PreferenceTrainer``: preference objectives on packed batches, and what they log."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from simpo.config import setting
from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import Prepared, check_rankings, is_feedback, prepare, prepare_feedback
from simpo.errors import SimpoError, check_all
from simpo.objectives import OBJECTIVES, Objective, Responses, reference_point, sft_term
from simpo.packing.model import policy_forward
from simpo.packing.scoring import divergence_forward, mean_by_comparison
from simpo.runs.results import Metric
from simpo.training.batches import MISMATCHED_REF_LOGP, PlannedBatch, widest_type
from simpo.training.metrics import Scores, compare_preferences
from simpo.training.packed import Description, PackedTrainer
from simpo.training.reference import ReferenceModel, mismatched_rows, with_mismatched
from simpo.training.settings import TrainingSettings

_DEFAULT = "simpo"
_SIMPO_ONLY = ("gamma_beta_ratio", "gamma", "link")  # one of them implies SimPO
_SIMPO_BETA = 1.0  # the paper's values are 2 to 10; those of DPO and its relatives are 0.01 to 0.5

# The metrics of pairs and of single responses, by the names on people's dashboards.
NAMES = (
    "loss",
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)
UNPAIRED_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
KL = "kl"


def _hyperparameter(name: str) -> Any:
    """The field of ``PreferenceConfig`` for a hyperparameter, whose meaning the objectives define."""
    uses: dict[str, list[str]] = {}  # by meaning: the same name may mean different things to different objectives
    for row in OBJECTIVES.values():
        if name in row.hyperparameters:
            known = row.hyperparameters[name]
            uses.setdefault(known.help, []).append(f"{row.name} {known.default}")
        elif name in row.spellings:
            uses.setdefault(f"Another way to give {row.spellings[name].of}.", []).append(row.name)
    return setting(None, " ".join(f"{text.removesuffix('.')} ({', '.join(rows)})." for text, rows in uses.items()))


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

    learning_rate: float = setting(1e-6, "Peak learning rate; the paper's are 3e-7 to 1e-6.")

    objective: str | None = setting(None, f"The loss: one of {', '.join(OBJECTIVES)} (default: simpo).")
    loss_type: str | None = setting(None, "Alias for link (in the paper's recipes) or objective (in TRL's).")
    sft_weight: float = setting(0.0, "Weight of an SFT term: the chosen response's average negative log-probability.")
    kl_weight: float = setting(0.0, "Weight of KL(policy || start model), exact, mean over the response tokens.")
    precompute_ref_log_probs: bool | None = setting(
        None, "Compute the reference's log-probabilities once and keep them (default: true); false: at every step."
    )
    reference_cache: str | None = setting(None, "Folder for the reference's log-probabilities (default: in HF_HOME).")
    paper_tokenization: bool = setting(False, "Score the assistant header with the response, as the paper's code does.")

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
        """All hyperparameters of the objective, defaults filled in."""
        given = {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}
        return self.row.resolve(given)

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        return replace(super().tokenize_settings, paper_tokenization=self.paper_tokenization)

    def _reject(self) -> None:
        check_all(super()._reject, self._reject_guess)

    def _reject_guess(self) -> None:
        """Reject keys that leave open which objective is meant."""
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
        """Whether the objective has a term on the chosen response alone that is not 0."""
        response = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        anchor = self.row.with_hyperparameters(**hyperparameters).anchor(response)
        return anchor is not None and bool(anchor.any())

    def _resolve_loss_type(self) -> None:
        """Read ``loss_type`` as the objective, or as the link of one."""
        given, self.loss_type = self.loss_type, None
        if given is None:
            return
        if given in OBJECTIVES:
            if self.objective not in (None, given):
                raise SimpoError(f"loss_type {given!r} and objective {self.objective!r} disagree; give one of them")
            self.objective = given
            return
        with_link = (row.hyperparameters["link"] for row in OBJECTIVES.values() if "link" in row.hyperparameters)
        links = dict.fromkeys(chain.from_iterable(get_args(known.type) for known in with_link))
        if given not in links:
            known = ", ".join((*OBJECTIVES, *links))
            raise SimpoError(f"loss_type: {given!r} is neither an objective nor a link; there are {known}")
        if self.objective is None and not any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            raise SimpoError(
                f"loss_type: {given!r} alone may mean DPO's or SimPO's; add objective: dpo, or objective: simpo with "
                "gamma_beta_ratio"
            )
        name = self.objective or _DEFAULT
        keys = OBJECTIVES[name].hyperparameters
        if given == "sigmoid" and "link" not in keys and "label_smoothing" in keys:
            return  # the only link of this objective
        if "link" not in keys:
            raise SimpoError(f"loss_type: {given!r} is no objective and no link of objective {name!r}")
        if self.link not in (None, given):
            raise SimpoError(f"loss_type {given!r} and link {self.link!r} disagree; give one of them")
        self.link = given  # type: ignore[assignment]


def hyperparameter_names() -> list[str]:
    """Every name by which some objective's hyperparameter can be given."""
    return list(dict.fromkeys(name for row in OBJECTIVES.values() for name in (*row.hyperparameters, *row.spellings)))


class PreferenceTrainer(PackedTrainer):
    """Trains a causal language model on comparisons, or on single responses with labels where the objective takes them.

    A step's loss is the mean over its comparisons. One with more than two responses has the mean over its ordered
    pairs, and the anchor term once, on the best response. The reference is the policy that training starts from: the
    model as it is given here, its adapter included. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`; ``args`` is a :class:`PreferenceConfig`.
    """

    config_type = PreferenceConfig
    command, row_noun = "train", "pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._z_ref = torch.zeros(())
        compares = self.objective.needs_reference
        self._precomputed = compares and self.args.precompute_ref_log_probs
        copy_weights = bool(self.args.kl_weight) or (compares and not self._precomputed)
        self._reference = ReferenceModel(self, self.args.reference_cache, copy_weights=copy_weights)
        if self._precomputed and self.args.reference_cache is not None:
            self._reference.check_cache()

    @property
    def metric_names(self) -> tuple[str, ...]:
        names = UNPAIRED_NAMES if self._unpaired else NAMES
        return (*names, KL) if self.args.kl_weight else names

    @cached_property
    def objective(self) -> Objective:
        """The objective with its hyperparameters."""
        return self.args.row.with_hyperparameters(**self.args.hyperparameters)

    @cached_property
    def _unpaired(self) -> bool:
        """Whether the rows are single responses."""
        rows = next(iter(self._all_rows()), None)
        return rows is not None and "label" in rows.column_names

    def _all_rows(self) -> list[Dataset]:
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [rows for rows in (self.train_dataset, *held_out) if rows is not None]

    @classmethod
    def describe(cls, args: Any) -> Description:
        weights = {key: getattr(args, key) for key in ("sft_weight", "kl_weight") if getattr(args, key)}
        settings = ", ".join(f"{key} {value}" for key, value in (args.hyperparameters | weights).items())
        return Description(
            f"{args.objective} ({settings})" if settings else args.objective,
            f"aligned by **{args.objective}** ({args.row.paper})",
            ["simpo", "preference-optimization", args.objective],
        )

    def compare(self, before: Scores, after: Scores) -> list[Metric]:
        return compare_preferences(before, after, has_reference=self.objective.needs_reference)

    # ---- Data.

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
        """As in the base; the reference is evaluated and frozen before a checkpoint or a step changes the weights."""
        for rows in self._all_rows():
            self.completed(rows)
        self._reference.freeze()
        return super().train(*args, **kwargs)

    # ---- KTO's reference point.

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
        mean_ratio = self._sum_over_ranks(total) / batches[0].step_weight
        self._z_ref = reference_point(mean_ratio, self.args.hyperparameters["beta"])

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As in the base; KTO's reference point is that of all rows that are evaluated."""
        if "z_ref" in self.objective.needs:
            rows = dataloader.dataset.rows
            mismatched = mismatched_rows(rows)
            if self._precomputed:
                reference = torch.tensor(rows[MISMATCHED_REF_LOGP][:], dtype=torch.float64)
            else:
                reference = self._reference.response_logps(mismatched)
            logps = self.response_logps(mismatched)
            self._z_ref = reference_point((logps - reference.to(logps)).mean(), self.args.hyperparameters["beta"])
        return super().evaluation_loop(dataloader, *args, **kwargs)

    # ---- Loss.

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """As in the base, with the reference where one is needed, and KL(policy || reference) added and logged."""
        if self.objective.needs_reference and batch.ref_logps is None:
            batch = batch._replace(ref_logps=self._reference.logps(batch.packed))
        if not self.args.kl_weight:
            return super().forward_rows(model, batch)
        reference = self._reference.states(batch.packed)
        y, divergence = divergence_forward(model, batch.packed, reference, path=self.path)
        losses, metrics = self.loss_and_metrics(y, batch)
        kl = mean_by_comparison(batch.packed, divergence)  # [C], over the scored tokens of a comparison
        losses = losses + self.args.kl_weight * kl
        return losses, torch.cat([losses.detach()[:, None], metrics[:, 1:], kl.detach()[:, None]], dim=1)

    def loss_and_metrics(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and metrics of comparisons or of single responses.

        The SFT term applies to the best response of a comparison, and to single responses that are desirable.
        """
        context = {"z_ref": self._z_ref} if "z_ref" in self.objective.needs else {}
        if batch.ref_logps is not None:
            y = replace(y, ref_logp=batch.ref_logps.to(y.logp))
        if batch.labels is not None:
            losses = self.objective.unpaired(y, batch.labels, **context)
            if self.args.sft_weight:
                losses = losses + self.args.sft_weight * sft_term(y).masked_fill(~batch.labels, 0)
            metrics = unpaired_metrics(self.objective, y, batch.labels)
        else:
            pairs = batch.pairs
            w, l, best = (_taken(y, index) for index in (pairs.better, pairs.worse, pairs.best))  # noqa: E741
            losses, anchor = pairs.mean(self.objective.pair(w, l, **context)), self.objective.anchor(best)
            if anchor is not None:
                losses = losses + anchor
            if self.args.sft_weight:
                losses = losses + self.args.sft_weight * sft_term(best)
            metrics = pairs.mean(pair_metrics(self.objective, w, l))
        return losses, torch.cat([losses.detach()[:, None], metrics], dim=1)


def _taken(y: Responses, index: Tensor) -> Responses:
    """The responses with these numbers, ``[N]``."""
    columns = (y.logp, y.length, y.ref_logp)
    return Responses(*(None if column is None else column.index_select(0, index) for column in columns))


def pair_metrics(objective: Objective, w: Responses, l: Responses) -> Tensor:  # noqa: E741
    """``[B, 6]`` metrics of ``B`` pairs, detached: those of :data:`NAMES` without the loss.

    ``logps/*`` are averages over a response's tokens for length-normalized objectives and sums for the others, as in
    the paper's curves.
    """
    chosen, rejected = objective.reward(w), objective.reward(l)
    right = (chosen > rejected).to(chosen.dtype)
    columns = (chosen, rejected, right, chosen - rejected, _logged(objective, w), _logged(objective, l))
    return torch.stack(columns, dim=-1).detach()


def unpaired_metrics(objective: Objective, y: Responses, label: Tensor) -> Tensor:
    """``[B, 4]`` metrics of ``B`` single responses, detached: those of :data:`UNPAIRED_NAMES` without the loss.

    A desirable response (``label`` ``[B]``) has the metrics of chosen ones, an undesirable one those of rejected ones;
    the others are NaN.
    """
    values = (objective.reward(y), _logged(objective, y))
    columns = [value.masked_fill(hidden, torch.nan) for value in values for hidden in (~label, label)]
    return torch.stack(columns, dim=-1).detach()


def _logged(objective: Objective, y: Responses) -> Tensor:
    return y.avg if objective.average_logps else y.logp
