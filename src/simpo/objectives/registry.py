"""The table of objectives."""

from __future__ import annotations

from simpo.objectives import kto, likelihood, reference_based, reference_free
from simpo.objectives.objective import OBJECTIVES, Objective, Spelling

_GAMMA = {"gamma": Spelling("gamma_beta_ratio", lambda gamma, values: gamma / values["beta"])}

_ROWS = (
    Objective(
        "simpo",
        reference_free.simpo,
        reference_free.simpo_reward,
        paper="Meng, Xia, Chen 2024, arXiv 2405.14734, eq. 6",
        length_normalized=True,
        spellings=_GAMMA,
    ),
    Objective(
        "dpo",
        reference_based.dpo,
        reference_based.dpo_reward,
        paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
        needs_reference=True,
    ),
    Objective(
        "ipo",
        reference_based.ipo,
        reference_based.ipo_reward,
        paper="Azar et al. 2023, arXiv 2310.12036, eq. 17",
        needs_reference=True,
    ),
    Objective(
        "cpo",
        reference_free.cpo,
        reference_free.cpo_reward,
        paper="Xu et al. 2024, arXiv 2401.08417, eq. 3",
        anchor_term=likelihood.nll_term,
    ),
    Objective(
        "kto",
        kto.kto,
        reference_based.dpo_reward,
        paper="Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7",
        unpaired_term=kto.kto_unpaired,
        needs_reference=True,
        spellings={"desirable_weight": Spelling("lam_w"), "undesirable_weight": Spelling("lam_l")},
    ),
    Objective(
        "orpo",
        reference_free.orpo,
        reference_free.orpo_reward,
        paper="Hong, Lee, Thorne 2024, arXiv 2403.07691, eqs. 6 and 7",
        anchor_term=likelihood.sft_term,
        length_normalized=True,
    ),
    Objective(
        "r_dpo",
        reference_based.r_dpo,
        reference_based.dpo_reward,
        paper="Park et al. 2024, arXiv 2403.19159",
        needs_reference=True,
    ),
    Objective(
        "slic_hf",
        reference_free.slic_hf,
        reference_free.slic_hf_reward,
        paper="Zhao et al. 2023, arXiv 2305.10425",
        anchor_term=likelihood.nll_term,
    ),
    Objective(
        "rrhf",
        reference_free.rrhf,
        reference_free.rrhf_reward,
        paper="Yuan et al. 2023, arXiv 2304.05302",
        anchor_term=likelihood.nll_term,
        length_normalized=True,
    ),
    Objective(
        "dpo_norm",
        reference_based.dpo_norm,
        reference_based.dpo_norm_reward,
        paper="Lambert et al. 2024, arXiv 2411.15124",
        needs_reference=True,
        length_normalized=True,
    ),
    Objective(
        "alphapo",
        reference_free.alphapo,
        reference_free.alphapo_reward,
        paper="Gupta et al. 2025, arXiv 2501.03884",
        length_normalized=True,
        spellings=_GAMMA,
    ),
    Objective(
        "simper",
        reference_free.simper,
        reference_free.simper_reward,
        paper="Xiao et al. 2025, arXiv 2502.00883",
        length_normalized=True,
    ),
    Objective(
        "dpop",
        reference_based.dpop,
        reference_based.dpo_reward,
        paper="Pal et al. 2024, arXiv 2402.13228",
        needs_reference=True,
    ),
)

OBJECTIVES.update({row.name: row for row in _ROWS})
