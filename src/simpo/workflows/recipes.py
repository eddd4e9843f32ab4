"""A complete recipe for any objective in any of the paper's settings, and the published values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from simpo.config.coercion import nearest
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES

# ---- Hyperparameters of the paper's comparison: what is published, what was searched over, and in which
# settings.


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


_WHOLE = """\
# {objective} ({paper}):
# {title}.
#
# Written by: simpo recipe --objective {objective} --setting {setting}

output_dir: {folder}/{name}
seed: 42

# Objective
objective: {objective}
{hyperparameters}

# Model
model_name_or_path: {model}
{arithmetic}
# Data
{data}

{training}"""


_PAPER_ARITHMETIC = """\
dtype: float32  # at these learning rates an update is smaller than the spacing of bfloat16 weights
bf16: true
activation_checkpointing: true
activation_checkpointing_kwargs: {use_reentrant: false}
"""


_PAPER_TRAINING = """\
# Tokens, as the paper's code made them: the assistant header is scored with the response, and a pair that is too long
# loses the start of its prompt, then the ends of its responses.
max_length: {max_length}
max_prompt_length: {max_prompt_length}
paper_tokenization: true
truncation: paper

# Steps of 128 pairs: 2 a GPU x 16 accumulated x 4 GPUs; only the product matters.
per_device_train_batch_size: 2
gradient_accumulation_steps: 16
num_train_epochs: 1
optim: adamw_torch
lr_scheduler_type: cosine
warmup_steps: 0.1  # below 1: a share of all steps

# Evaluation and logging; the finished model is saved, steps on the way are not
eval_strategy: steps
eval_steps: 400
per_device_eval_batch_size: 4
logging_steps: 5
save_strategy: "no"
run_name: {name}
"""


_TINY_TRAINING = """\
max_length: {max_length}
per_device_train_batch_size: 16
num_train_epochs: 2
eval_strategy: steps
eval_steps: 20
save_strategy: "no"
report_to: none
"""


# Options of a loss rather than knobs: a recipe sets them where they are wanted.
_OPTIONS = ("label_smoothing", "link", "length_normalized")


# A model this small wants far larger ones than the paper's; of simpo sweep on the tiny world's pairs.
_TINY_LEARNING_RATE = 1e-4


def compose_recipe(objective: str, setting: str) -> str:
    """The recipe, as YAML text with comments.

    Args:
        objective: a row of the table of objectives.
        setting: one of :data:`~simpo.workflows.recipes.SETTINGS`.

    Raises:
        SimpoError: an objective or setting that is unknown.
    """
    if objective not in OBJECTIVES:
        raise SimpoError(f"--objective: {objective!r} is unknown{_which(objective, OBJECTIVES)}")
    if setting not in SETTINGS:
        raise SimpoError(f"--setting: {setting!r} is unknown{_which(setting, SETTINGS)}")
    chosen, tiny = SETTINGS[setting], setting == TINY.name
    name = chosen.stem.format(objective)
    lengths = {"max_length": chosen.max_length, "max_prompt_length": chosen.max_prompt_length}
    return _WHOLE.format(
        objective=objective,
        paper=OBJECTIVES[objective].paper,
        title=chosen.title,
        setting=setting,
        folder="runs" if tiny else "outputs",
        name=name,
        hyperparameters="\n".join(_hyperparameters(objective, chosen)),
        model=chosen.model,
        arithmetic="" if tiny else _PAPER_ARITHMETIC,
        data=chosen.data,
        training=(_TINY_TRAINING if tiny else _PAPER_TRAINING).format(name=name, **lengths),
    )


def _which(word: str, known: dict) -> str:
    return nearest(word, known) or f"; there are {', '.join(known)}"


def _hyperparameters(objective: str, setting: Setting) -> Iterator[str]:
    """A line for each of the row's, and for the learning rate."""
    published = PUBLISHED.get(objective, {}).get(setting.name, {})
    ranges = {} if setting is TINY else SEARCHED.get(objective, {})  # they are of models of 7 to 9 billion weights
    for name, known in OBJECTIVES[objective].hyperparameters.items():
        if name in published:
            yield _published(name, published[name])
        elif name in ranges:
            yield _searched(name, ranges[name])
        elif name not in _OPTIONS:
            yield f"{name}: {_number(known.default)}  # the row's default; try others with simpo sweep"
    if setting is TINY:
        yield f"learning_rate: {_number(_TINY_LEARNING_RATE)}  # for a model this small; try others with simpo sweep"
    elif "learning_rate" in published:
        yield _published("learning_rate", published["learning_rate"])
    else:
        yield (
            f"learning_rate: {_number(LEARNING_RATE.start)}  # of {_values(LEARNING_RATE)}, the grid that the README "
            "of github.com/princeton-nlp/SimPO advises; start here and use simpo sweep"
        )


def _published(name: str, value: float) -> str:
    return f"{name}: {_number(value)}  # published: github.com/princeton-nlp/SimPO, README"


def _searched(name: str, found: Searched) -> str:
    return (
        f"{name}: {_number(found.start)}  # searched over {_values(found)} in the paper; start here and use simpo sweep"
    )


def _values(found: Searched) -> str:
    return f"{{{', '.join(map(_number, found.values))}}}"


def _number(value: float) -> str:
    """As YAML reads a number: with a point, also in front of an exponent."""
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 and value else repr(float(value))
