"""TRL's loss functions on the same log-probabilities; where its definitions differ, the test explains how."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from simpo.objectives import OBJECTIVES, Responses, reference_point, sft_term

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def pairs() -> tuple[Responses, Responses]:
    generator = torch.Generator().manual_seed(0)

    def side() -> Responses:
        length = torch.randint(1, 30, (16,), generator=generator).double()
        avg = -(0.05 + 3 * torch.rand(16, generator=generator, dtype=torch.float64))
        ratio = torch.randn(16, generator=generator, dtype=torch.float64) * length.sqrt() / 4
        return Responses(avg * length, length, avg * length - ratio)

    return side(), side()


def bare(trainer_class: type, **attributes):
    """Return a TRL trainer with only the attributes its loss reads."""
    trainer = object.__new__(trainer_class)
    accelerator = Accelerator(cpu=True)
    for name, value in ({"accelerator": accelerator, "aux_loss_enabled": False} | attributes).items():
        setattr(trainer, name, value)
    return trainer


def cpo_loss(w: Responses, y: Responses, averages: bool, **attributes):
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5} | attributes
    columns = (w.avg, y.avg) if averages else (w.logp, y.logp)
    losses, *rewards = bare(CPOTrainer, **settings).cpo_loss(*columns)
    return losses, rewards


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_matches_trl(pairs, label_smoothing):
    theirs, rewards = cpo_loss(
        *pairs, True, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=label_smoothing
    )
    settings = OBJECTIVES["simpo"].resolve({"beta": 2.0, "gamma": 0.7, "label_smoothing": label_smoothing})
    torch.testing.assert_close(OBJECTIVES["simpo"].loss(*pairs, **settings), theirs, **TOLERANCE)
    for side, reward in zip(pairs, rewards, strict=True):
        torch.testing.assert_close(OBJECTIVES["simpo"].reward(side, **settings), reward, **TOLERANCE)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 0.0])
def test_alphapo_matches_trl(pairs, alpha):
    theirs, rewards = cpo_loss(*pairs, True, loss_type="simpo", beta=2.5, simpo_gamma=0.25, alpha=alpha)
    settings = OBJECTIVES["alphapo"].resolve({"alpha": alpha, "beta": 2.5, "gamma": 0.25})
    torch.testing.assert_close(OBJECTIVES["alphapo"].loss(*pairs, **settings), theirs, **TOLERANCE)
    for side, reward in zip(pairs, rewards, strict=True):
        torch.testing.assert_close(OBJECTIVES["alphapo"].reward(side, **settings), reward, **TOLERANCE)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpos_pair_term_matches_trl(pairs, label_smoothing):
    """TRL's SFT term is the mean over all chosen tokens in the device batch; ours, as in the SimPO paper's table, is
    the sum over a response's tokens, pair by pair."""
    theirs, rewards = cpo_loss(*pairs, False, loss_type="sigmoid", beta=0.1, label_smoothing=label_smoothing)
    row = OBJECTIVES["cpo"]
    torch.testing.assert_close(
        row.with_hyperparameters(beta=0.1, label_smoothing=label_smoothing).pair(*pairs), theirs, **TOLERANCE
    )
    for side, reward in zip(pairs, rewards, strict=True):
        torch.testing.assert_close(row.reward(side, beta=0.1), reward, **TOLERANCE)


@pytest.mark.parametrize("link", ["simpo", "slic_hf"])
def test_hinges_match_trl(pairs, link):
    """TRL has one hinge, ``relu(1 - beta * difference)``: on averages it is ours without SimPO's margin, on sums it is
    SLiC-HF's with delta 1 at beta 1."""
    theirs, _ = cpo_loss(*pairs, link == "simpo", loss_type="hinge", beta=1.0)
    settings = {"link": "hinge", "beta": 1.0, "gamma_beta_ratio": 0.0} if link == "simpo" else {"delta": 1.0}
    torch.testing.assert_close(OBJECTIVES[link].with_hyperparameters(**settings).pair(*pairs), theirs, **TOLERANCE)


def test_orpo_matches_trl(pairs):
    """TRL computes in fp32 and returns the pair term with the opposite sign. Its SFT term includes the prompt, and its
    logged reward is lam times the average log-probability, which ranks responses like the log-odds do."""
    from trl.experimental.orpo import ORPOTrainer

    w, y = pairs
    losses, *rewards, _, log_odds = bare(ORPOTrainer, beta=0.1).odds_ratio_loss(w.avg, y.avg)
    row = OBJECTIVES["orpo"]
    torch.testing.assert_close(row.with_hyperparameters(lam=0.1).pair(w, y), -losses.double(), **TOLERANCE)
    torch.testing.assert_close((row.reward(w) - row.reward(y)).mean(), log_odds.double(), **TOLERANCE)
    torch.testing.assert_close(row.anchor(w), sft_term(w))
    assert torch.equal(rewards[0] > rewards[1], row.reward(w) > row.reward(y))


class Scored(nn.Module):
    """A model that returns given log-probabilities: each row's total, spread over its tokens."""

    def __init__(self, logps: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.logps = logps  # keyed by the first id of a batch

    def forward(self, input_ids, labels, **_):
        mask = labels[:, 1:] != -100
        logps = self.logps[input_ids[0, 0].item()]
        log_probs = mask * (logps / mask.sum(1))[:, None]
        unused = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=unused, mean_logits=unused, is_top1=mask)


def rows(length: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """Return padded rows of one prompt token, ``first``, and ``length`` completion tokens."""
    position = torch.arange(int(length.max()) + 1)
    completion = (position >= 1) & (position <= length[:, None])
    return {
        "input_ids": torch.full(completion.shape, first),
        "attention_mask": completion | (position == 0),
        "completion_mask": completion.long(),
    }


@pytest.mark.parametrize(
    ("loss_type", "name", "settings", "beta"),
    [
        ("sigmoid", "dpo", {"beta": 0.1}, 0.1),
        ("ipo", "ipo", {"tau": 0.1, "length_normalized": True}, 0.1),
        ("sigmoid_norm", "dpo_norm", {"beta": 5.0}, 5.0),
        ("apo_zero", "apo_zero", {"beta": 0.2}, 0.2),
        ("apo_down", "apo_down", {"beta": 0.2}, 0.2),
        ("nca_pair", "nca", {"beta": 0.2}, 0.2),
        ("sppo_hard", "sppo", {"beta": 0.1}, 0.1),
        ("bco_pair", "bco", {"beta": 0.2}, 0.2),
        (("sigmoid", "js_divergence"), "f_dpo", {"divergence": "js"}, 0.1),
        (("sigmoid", "forward_kl"), "f_dpo", {"divergence": "forward_kl"}, 0.1),
        (("sigmoid", "alpha_divergence"), "f_dpo", {"divergence": "alpha", "alpha": 0.3}, 0.1),
    ],
)
def test_the_dpo_family_matches_trl(pairs, loss_type, name, settings, beta):
    """One pair at a time, because TRL returns means. Its IPO divides by lengths; ours does so on request. Its BCO has
    no reward shift, and the order of its alpha divergence is one minus the paper's."""
    from trl import DPOTrainer

    loss_type, divergence = (loss_type, "reverse_kl") if isinstance(loss_type, str) else loss_type
    trainer = bare(
        DPOTrainer,
        beta=beta, loss_types=[loss_type], loss_weights=[1.0], f_divergence_type=divergence,
        f_alpha_divergence_coef=1 - settings.get("alpha", 0.0),
        ld_alpha=None, precompute_ref_logps=True, use_weighting=False, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    w, y = pairs
    if divergence == "alpha_divergence":  # TRL only computes it in single precision
        w, y = (Responses(side.logp.float(), side.length.float(), side.ref_logp.float()) for side in pairs)
    theirs = []
    for i in range(len(w.logp)):
        trainer.model = Scored({7: torch.stack([w.logp[i], y.logp[i]])})
        inputs = rows(torch.stack([w.length[i], y.length[i]]), 7)
        inputs |= {"ref_chosen_logps": w.ref_logp[i : i + 1], "ref_rejected_logps": y.ref_logp[i : i + 1]}
        theirs.append(trainer._compute_loss(trainer.model, inputs, return_outputs=False))
    torch.testing.assert_close(OBJECTIVES[name].loss(w, y, **settings), torch.stack(theirs), **TOLERANCE)


@pytest.mark.parametrize("mismatched", [2.0, -2.0])
def test_kto_matches_trl(pairs, mismatched):
    """TRL averages over responses, chosen and rejected; our paired version adds a pair's two terms, which is twice as
    much. Its reference point is a log-ratio; ours includes beta."""
    from trl import KTOTrainer

    trainer = bare(
        KTOTrainer,
        beta=0.1, loss_type="kto", desirable_weight=1.33, undesirable_weight=0.5,
        calculate_KL=True, precompute_ref_logps=True, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    w, y = pairs
    logp, length, ref = (
        torch.cat(columns) for columns in ((w.logp, y.logp), (w.length, y.length), (w.ref_logp, y.ref_logp))
    )
    label = torch.arange(len(logp)) < len(w.logp)
    of_others = ref + mismatched + torch.linspace(-1, 1, len(ref), dtype=torch.float64)
    trainer.model = Scored({7: logp, 8: of_others})
    kl_rows = {f"KL_{key}": value for key, value in rows(length, 8).items()}
    inputs = rows(length, 7) | kl_rows | {"label": label, "ref_logps": ref, "ref_KL_logps": ref}
    theirs = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    settings = OBJECTIVES["kto"].resolve({"desirable_weight": 1.33, "undesirable_weight": 0.5})
    z_ref = reference_point((of_others - ref).mean(), beta=0.1)
    assert (z_ref > 0) == (mismatched > 0)
    torch.testing.assert_close(OBJECTIVES["kto"].loss(w, y, z_ref=z_ref, **settings).mean() / 2, theirs, **TOLERANCE)
    both = Responses(logp, length, ref)
    torch.testing.assert_close(
        OBJECTIVES["kto"].with_hyperparameters(**settings).unpaired(both, label, z_ref=z_ref).mean(),
        theirs,
        **TOLERANCE,
    )
