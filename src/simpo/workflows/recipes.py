"""A complete recipe for any objective in any of the paper's settings, and the published values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from simpo.config.fields import nearest
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES

_TEMPLATES = Path(__file__).parent / "templates"  # a whole recipe each, with gaps


@dataclass(frozen=True)
class Setting:
    """A start model with its preference data."""

    stem: str  # the recipe's name, with a gap for the objective's
    title: str  # model and data in a few words
    model: str  # hub name or folder
    data: str  # lines of YAML that name the data
    max_length: int = 2048  # longest prompt with response, in tokens
    max_prompt_length: int | None = 1800  # length that overlong prompts are cut to; None for the default


def _data(name: str, splits: str = "train, test") -> str:
    return f"dataset_mixer: {{{name}: 1.0}}\ndataset_splits: [{splits}]"


_ULTRAFEEDBACK = _data("HuggingFaceH4/ultrafeedback_binarized", "train_prefs, test_prefs")
_LLAMA_3 = "meta-llama/Meta-Llama-3-8B-Instruct"

PAPER_SETTINGS = {
    "mistral-base": Setting(
        "mistral-7b-base-{}",
        "Mistral-7B base after SFT on UltraChat (Zephyr's SFT model), offline UltraFeedback pairs",
        "alignment-handbook/zephyr-7b-sft-full",
        f"{_ULTRAFEEDBACK}\n"
        "auto_insert_empty_system_msg: true  # this template supports one, and the paper's code then adds it",
        1024,  # the authors' file; the paper says 2048
        512,
    ),
    "mistral-instruct": Setting(
        "mistral-7b-instruct-{}",
        "Mistral-7B-Instruct-v0.2, its own answers to UltraFeedback prompts ranked by PairRM",
        "mistralai/Mistral-7B-Instruct-v0.2",
        _data("princeton-nlp/mistral-instruct-ultrafeedback"),
    ),
    "llama3-base": Setting(
        "llama-3-8b-base-{}",
        "Llama-3-8B base after SFT on UltraChat, offline UltraFeedback pairs",
        "princeton-nlp/Llama-3-Base-8B-SFT",
        _ULTRAFEEDBACK,
    ),
    "llama3-instruct": Setting(
        "llama-3-8b-instruct-{}",
        "Llama-3-8B-Instruct, its own answers to UltraFeedback prompts ranked by PairRM",
        _LLAMA_3,
        _data("princeton-nlp/llama3-ultrafeedback"),
    ),
    "llama3-instruct-v0.2": Setting(
        "llama-3-8b-instruct-{}-v2",
        "Llama-3-8B-Instruct v0.2, its own answers to UltraFeedback prompts scored by ArmoRM",
        _LLAMA_3,
        _data("princeton-nlp/llama3-ultrafeedback-armorm"),
    ),
    "gemma2": Setting(
        "gemma-2-9b-it-{}",
        "Gemma-2-9B-it, its own answers to UltraFeedback prompts scored by ArmoRM",
        "google/gemma-2-9b-it",
        _data("princeton-nlp/gemma2-ultrafeedback-armorm"),
    ),
}
_TINY = "tiny"
SETTINGS = PAPER_SETTINGS | {
    _TINY: Setting(
        "tiny-{}",
        "the built-in tiny world, with the model and the pairs that 'simpo demo --output_dir runs/demo-1' writes",
        "runs/demo-1/sft",
        "dataset_name: runs/demo-1/pairs.jsonl\neval_dataset_name: runs/demo-1/held-out-pairs.jsonl",
        128,
        None,
    )
}

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

    def __str__(self) -> str:
        return f"{{{', '.join(map(_number, self.values))}}}"


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
    "repo": {"gamma": Searched((0.2, 0.4, 0.6, 0.8, 1.0), start=0.4)},
    "chi_po": {"beta": Searched((0.005, 0.05), start=0.05)},
}

# The grid that the README advises, for objectives without a better published value.
LEARNING_RATE = Searched((3e-7, 5e-7, 8e-7, 1e-6), start=5e-7)
_TINY_LEARNING_RATE = 1e-4  # the best of a sweep on the tiny world's pairs; a model this small needs a larger one

_OPTIONS = ("label_smoothing", "link", "length_normalized")  # variants of a loss, not written into recipes


def compose_recipe(objective: str, setting: str) -> str:
    """The recipe, as YAML text with comments.

    ``setting`` is one of :data:`~simpo.workflows.recipes.SETTINGS`.
    """
    for option, name, known in (("objective", objective, OBJECTIVES), ("setting", setting, SETTINGS)):
        if name not in known:
            hint = nearest(name, known) or f"; there are {', '.join(known)}"
            raise SimpoError(f"--{option}: {name!r} is unknown{hint}")
    chosen = SETTINGS[setting]
    template = _TEMPLATES / ("tiny.yaml" if setting == _TINY else "paper.yaml")
    gaps = vars(chosen) | {"objective": objective, "setting": setting, "paper": OBJECTIVES[objective].paper}
    gaps["name"] = chosen.stem.format(objective)
    gaps["hyperparameters"] = "\n".join(_hyperparameters(objective, setting))
    return Template(template.read_text(encoding="utf-8")).substitute(gaps)


def _hyperparameters(objective: str, setting: str) -> Iterator[str]:
    """A line for each of the objective's hyperparameters and for the learning rate, with the source of its value."""
    published = PUBLISHED.get(objective, {}).get(setting, {})
    searched = {} if setting == _TINY else SEARCHED.get(objective, {})  # for models of 7 to 9 billion weights
    defaults = {name: known.default for name, known in OBJECTIVES[objective].hyperparameters.items()}
    for name in (*defaults, "learning_rate"):
        if name in published:
            yield f"{name}: {_number(published[name])}  # published: github.com/princeton-nlp/SimPO, README"
        elif name in searched:
            start = _number(searched[name].start)
            yield f"{name}: {start}  # searched over {searched[name]} in the paper; start here and use simpo sweep"
        elif name in defaults and name not in _OPTIONS:
            yield f"{name}: {_number(defaults[name])}  # the objective's default; try others with simpo sweep"
    if setting == _TINY:
        yield f"learning_rate: {_number(_TINY_LEARNING_RATE)}  # for a model this small; try others with simpo sweep"
    elif "learning_rate" not in published:
        yield (
            f"learning_rate: {_number(LEARNING_RATE.start)}  # of {LEARNING_RATE}, the grid that the README "
            "of github.com/princeton-nlp/SimPO advises; start here and use simpo sweep"
        )


def _number(value: float | str) -> str:
    """A number as YAML reads it, with a decimal point even before an exponent; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 and value else repr(float(value))
