"""A complete recipe for any objective in any of the paper's settings, every hyperparameter with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator

from simpo.coercion import nearest
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES
from simpo.search.published import LEARNING_RATE, PUBLISHED, SEARCHED, SETTINGS, TINY, Searched, Setting

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
        setting: one of :data:`~simpo.search.published.SETTINGS`.

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
