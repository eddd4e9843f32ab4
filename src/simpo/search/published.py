"""Hyperparameters of the paper's comparison: what is published, what was searched over, and in which settings.

Meng, Xia, Chen 2024, arXiv 2405.14734: its appendix has the search ranges of all methods, and the README of its
authors' repository (github.com/princeton-nlp/SimPO) the best values of SimPO and DPO. They published no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A start model with its preference data.

    Attributes:
        name: as on the command line.
        stem: the recipe's name, with a place for the objective's.
        title: model and data in a few words.
        model: hub name or folder.
        data: lines of YAML that name the data.
        max_length: longest prompt with response, in tokens.
        max_prompt_length: what an overlong prompt is cut to; None for the default.
    """

    name: str
    stem: str
    title: str
    model: str
    data: str
    max_length: int
    max_prompt_length: int | None


def _table(*settings: Setting) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


PAPER_SETTINGS = _table(
    Setting(
        "mistral-base",
        "mistral-7b-base-{}",
        "Mistral-7B base after SFT on UltraChat (Zephyr's SFT model), offline UltraFeedback pairs",
        "alignment-handbook/zephyr-7b-sft-full",
        "dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}\n"
        "dataset_splits: [train_prefs, test_prefs]\n"
        "auto_insert_empty_system_msg: true  # this template shows one, and the paper's code then puts it first",
        1024,  # the authors' file; the paper says 2048
        512,
    ),
    Setting(
        "mistral-instruct",
        "mistral-7b-instruct-{}",
        "Mistral-7B-Instruct-v0.2, its own answers to UltraFeedback prompts ranked by PairRM",
        "mistralai/Mistral-7B-Instruct-v0.2",
        "dataset_mixer: {princeton-nlp/mistral-instruct-ultrafeedback: 1.0}\ndataset_splits: [train, test]",
        2048,
        1800,
    ),
    Setting(
        "llama3-base",
        "llama-3-8b-base-{}",
        "Llama-3-8B base after SFT on UltraChat, offline UltraFeedback pairs",
        "princeton-nlp/Llama-3-Base-8B-SFT",
        "dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}\ndataset_splits: [train_prefs, test_prefs]",
        2048,
        1800,
    ),
    Setting(
        "llama3-instruct",
        "llama-3-8b-instruct-{}",
        "Llama-3-8B-Instruct, its own answers to UltraFeedback prompts ranked by PairRM",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "dataset_mixer: {princeton-nlp/llama3-ultrafeedback: 1.0}\ndataset_splits: [train, test]",
        2048,
        1800,
    ),
    Setting(
        "llama3-instruct-v0.2",
        "llama-3-8b-instruct-{}-v2",
        "Llama-3-8B-Instruct v0.2, its own answers to UltraFeedback prompts scored by ArmoRM",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "dataset_mixer: {princeton-nlp/llama3-ultrafeedback-armorm: 1.0}\ndataset_splits: [train, test]",
        2048,
        1800,
    ),
    Setting(
        "gemma2",
        "gemma-2-9b-it-{}",
        "Gemma-2-9B-it, its own answers to UltraFeedback prompts scored by ArmoRM",
        "google/gemma-2-9b-it",
        "dataset_mixer: {princeton-nlp/gemma2-ultrafeedback-armorm: 1.0}\ndataset_splits: [train, test]",
        2048,
        1800,
    ),
)

TINY = Setting(
    "tiny",
    "tiny-{}",
    "the built-in tiny world: the model and the pairs that 'simpo demo --output_dir runs/demo-1' leaves",
    "runs/demo-1/sft",
    "dataset_name: runs/demo-1/pairs.jsonl\neval_dataset_name: runs/demo-1/held-out-pairs.jsonl",
    128,
    None,
)

SETTINGS = PAPER_SETTINGS | {TINY.name: TINY}

# Best values, by objective and setting.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "simpo": {
        "mistral-base": {"beta": 2.0, "gamma_beta_ratio": 0.8, "learning_rate": 3e-7},
        "mistral-instruct": {"beta": 2.5, "gamma_beta_ratio": 0.1, "learning_rate": 5e-7},
        "llama3-base": {"beta": 2.0, "gamma_beta_ratio": 0.5, "learning_rate": 6e-7},
        "llama3-instruct": {"beta": 2.5, "gamma_beta_ratio": 0.55, "learning_rate": 1e-6},
        "llama3-instruct-v0.2": {"beta": 10.0, "gamma_beta_ratio": 0.3, "learning_rate": 1e-6},
        "gemma2": {"beta": 10.0, "gamma_beta_ratio": 0.5, "learning_rate": 8e-7},
    },
    "dpo": {
        "mistral-base": {"beta": 0.01, "learning_rate": 5e-7},
        "mistral-instruct": {"beta": 0.01, "learning_rate": 5e-7},
        "llama3-base": {"beta": 0.01, "learning_rate": 5e-7},
        "llama3-instruct": {"beta": 0.01, "learning_rate": 7e-7},
        "llama3-instruct-v0.2": {"beta": 0.01, "learning_rate": 3e-7},
        "gemma2": {"beta": 0.01, "learning_rate": 5e-7},
    },
}


@dataclass(frozen=True)
class Searched:
    """The values that the paper's authors tried or advise, and the one to start from, which is our choice."""

    values: tuple[float, ...]
    start: float


# Of every objective, where nothing better is published for the setting: the grid that the README advises.
LEARNING_RATE = Searched((3e-7, 5e-7, 8e-7, 1e-6), start=5e-7)

# By objective and hyperparameter. Where the scale is DPO's, the start is what was best for DPO in every setting.
_DPO_BETA = Searched((0.01, 0.05, 0.1), start=0.01)
SEARCHED: Mapping[str, Mapping[str, Searched]] = {
    "dpo": {"beta": _DPO_BETA},
    "ipo": {"tau": Searched((0.01, 0.1, 0.5, 1.0), start=0.1)},
    "cpo": {"beta": Searched((0.01, 0.05, 0.1), start=0.05)},
    "kto": {"beta": _DPO_BETA},
    "orpo": {"lam": Searched((0.1, 0.5, 1.0, 2.0), start=0.5)},
    "r_dpo": {"beta": _DPO_BETA, "alpha": Searched((0.05, 0.1, 0.5, 1.0), start=0.1)},
    "slic_hf": {
        "delta": Searched((0.1, 0.5, 1.0, 2.0), start=1.0),
        "lam": Searched((0.1, 0.5, 1.0, 10.0), start=0.5),
    },
    "rrhf": {"lam": Searched((0.1, 0.5, 1.0, 10.0), start=0.5)},
}
