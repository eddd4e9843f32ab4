from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from transformers import TrainingArguments
from transformers import integrations as transformers_integrations

from simpo.cli.training import parse
from simpo.config import parse_settings
from simpo.errors import SimpoError
from simpo.judging.settings import AnnotatorArguments, GenerationArguments
from simpo.training.configs import OnlineConfig
from simpo.training.preference import PreferenceConfig
from simpo.training.reward import RewardConfig
from simpo.training.sft import SFTConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

# Setting: beta, gamma/beta, learning rate, maximum length (paper, appendix; the authors' repository).
PAPER = {
    "mistral-7b-base-simpo": (2.0, 0.8, 3e-7, 1024),
    "mistral-7b-instruct-simpo": (2.5, 0.1, 5e-7, 2048),
    "llama-3-8b-base-simpo": (2.0, 0.5, 6e-7, 2048),
    "llama-3-8b-instruct-simpo": (2.5, 0.55, 1e-6, 2048),
    "llama-3-8b-instruct-simpo-v2": (10.0, 0.3, 1e-6, 2048),
    "gemma-2-9b-it-simpo": (10.0, 0.5, 8e-7, 2048),
}


class Color(Enum):
    RED = "red"
    NONE = "no"


@dataclass
class Model:
    name: str
    dtype: str | None = None
    attn_implementation: str | None = None


@dataclass
class Data:
    dataset_name: str | None = field(default=None, metadata={"help": "Where the data are. A hub id or a file."})
    dataset_mixer: dict[str, float] | None = None
    dataset_splits: list[str] | None = None
    dataset_num_proc: int | None = None
    chat_template: str | None = None


@dataclass
class Values:
    flag: bool = False
    count: int = 0
    rate: float = 0.5
    text: str = "text"
    maybe: float | None = 1.0
    color: Color = Color.RED
    loose_color: Color | str = Color.RED
    mode: Literal["a", "b"] = "a"
    level: Literal[1, 2] = 1
    names: list[str] = field(default_factory=list)
    counts: list[int] | None = None
    weights: dict[str, float] | None = None
    config: dict[str, Any] | str | None = None
    target: str | list[str] | None = None
    logged: str | bool = "no"

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be\n  negative")
        if self.rate < 0:
            raise SimpoError("rate must not be negative")


@dataclass
class Config(TrainingArguments):
    beta: float = 2.0
    max_length: int = 2048


@dataclass(frozen=True)
class Sub:
    rate: float = 0.5
    names: list[str] | None = None
    hidden: int = 0


@dataclass
class Placed:
    """A command with positional arguments, and the settings of another dataclass with different defaults."""

    model: str = field(metadata={"positional": "MODEL"})
    data: str = field(metadata={"positional": "DATA"})
    sub: Sub = field(default=Sub(rate=2.0, hidden=7), metadata={"without": ["hidden"]})
    judge: list[str] = field(default_factory=list, metadata={"repeat": True})
    flag: bool = False
    count: int = 0
    prices: tuple[float, float] | None = None
    where: Path | None = None
    extra: list[str] | None = None


REPLACES = {"dataset_name": ("dataset_mixer", "dataset_splits")}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return "recipe.yaml"

    return write


def values(*argv):
    return parse_settings(list(argv), (Values,))[0]


def error(*argv, types=(Values,), **options):
    with pytest.raises(SimpoError) as caught:
        parse_settings(list(argv), types, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- values ----

# Field, written form (the same in YAML and on the command line), resulting value.
SCALARS = [
    ("flag", "true", True),
    ("flag", "No", False),
    ("count", "12", 12),
    ("count", "1e3", 1000),
    ("count", "9007199254740993", 9007199254740993),
    ("rate", "1e-6", 1e-6),
    ("rate", "3", 3.0),
    ("rate", "8.0e-7", 8e-7),
    ("text", "007", "007"),
    ("text", "no", "no"),
    ("text", "2024-06-01", "2024-06-01"),
    ("maybe", "null", None),
    ("maybe", "0.25", 0.25),
    ("color", "red", Color.RED),
    ("color", "no", Color.NONE),
    ("loose_color", "no", Color.NONE),
    ("mode", "b", "b"),
    ("level", "2", 2),
    ("names", "one", ["one"]),
    ("counts", "null", None),
    ("counts", "[1, 2]", [1, 2]),
    ("names", '["x", "y"]', ["x", "y"]),
    ("weights", '{"x": 1, "y": 1e-1}', {"x": 1.0, "y": 0.1}),
    ("config", '{"rate": 1e-7, "deep": {"on": true}}', {"rate": 1e-7, "deep": {"on": True}}),
    ("config", "settings.json", "settings.json"),
    ("target", "all-linear", "all-linear"),
    ("target", '["q", "v"]', ["q", "v"]),
    ("logged", "true", True),
    ("logged", "all", "all"),
]


@pytest.mark.parametrize(("key", "written", "expected"), SCALARS)
def test_files_and_the_command_line_read_values_alike(recipe, key, written, expected):
    from_file = getattr(values(recipe(f"{key}: {written}")), key)
    from_line = getattr(values(f"--{key}", written), key)
    assert from_file == from_line == expected
    assert type(from_file) is type(from_line) is type(expected)


@pytest.mark.parametrize(
    ("key", "written", "reason"),
    [
        ("rate", "abc", "'abc' is not a number"),
        ("rate", "nan", "'nan' is not a number"),
        ("rate", "null", "null is not a number; leave out the key to use its default"),
        ("count", "1.5", "'1.5' is not a whole number"),
        ("count", "true", "'true' is not a whole number"),
        ("flag", "maybe", "'maybe' is not true or false"),
        ("text", "[a, b]", None),
        ("text", '"a\\0b"', None),
        ("text", '"a\\ud800b"', None),
        ("color", "rad", "'rad' is not one of red, no; did you mean red?"),
        ("loose_color", "blue", "'blue' is not one of red, no"),
        ("mode", "c", "'c' is not one of a, b"),
        ("counts", "[1, x]", None),
        ("counts", '["x"]', "['x'] is not a list, each item a whole number"),
        ("weights", "abc", "'abc' is not a mapping, each value a number"),
        ("weights", '{"x": "y"}', "{'x': 'y'} is not a mapping, each value a number"),
    ],
)
def test_an_invalid_value_is_reported_with_its_location(recipe, key, written, reason):
    from_file = error(recipe(f"# a comment\n\n{key}: {written}"))
    assert from_file.startswith(f"recipe.yaml:3: {key}: ")
    if reason:
        assert from_file == f"recipe.yaml:3: {key}: {reason}"
        assert error(f"--{key}", written) == f"--{key}: {reason}"


def test_yaml_lists_and_mappings(recipe):
    read = values(recipe("names:\n- no\n- 1.0\ncounts: [1, 2]\nconfig: {rate: 1e-7, when: 2024-06-01, on: true}\n"))
    assert read.names == ["no", "1.0"]
    assert read.counts == [1, 2]
    assert read.config == {"rate": 1e-7, "when": "2024-06-01", "on": True}


def test_multi_line_text_stays_verbatim(recipe):
    template = "{% for m in messages %}\n  {{ m['content'] }}\\n\n{% endfor %}\n"
    block = "chat_template: |\n" + "".join(f"  {line}\n" for line in template.splitlines())
    assert parse_settings([recipe(block)], (Data,))[0].chat_template == template
    quoted = f"chat_template: {json.dumps(template)}"
    assert parse_settings([recipe(quoted)], (Data,))[0].chat_template == template


def test_a_quoted_null_is_text(recipe):
    assert values(recipe("text: 'null'")).text == "null"


# ---- the command line ----


def test_ways_to_write_an_option():
    read = values("--flag", "--rate=0.25", "--names", "a", "b", "--names", "c", "--counts", "-1", "2", "--text=")
    assert (read.flag, read.rate, read.names, read.counts, read.text) == (
        True,
        0.25,
        ["a", "b", "c"],
        [-1, 2],
        "",
    )
    assert parse_settings(["--dataset-num-proc", "3"], (Data,))[0].dataset_num_proc == 3


def test_the_last_of_a_repeated_option_wins():
    assert values("--count", "1", "--names", "a", "--count=2", "--names", "b").count == 2


def test_the_command_line_overrides_the_file(recipe):
    path = recipe("count: 1\nrate: 0.1\nweights: {x: 1}")
    read = values(path, "--count", "2", "--weights", '{"y": 2}')
    assert (read.count, read.rate, read.weights) == (2, 0.1, {"y": 2.0})


def test_without_input_defaults_apply(recipe):
    assert values() == values(recipe("# nothing yet\n")) == Values()


def test_several_dataclasses_share_the_keys(recipe):
    path = recipe("name: m\ndataset_num_proc: 2")
    assert parse_settings([path], (Model, Data)) == (Model("m"), Data(dataset_num_proc=2))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate"], "--rate: needs a value"),
        (["--rate", "1", "2"], "--rate: ['1', '2'] is not a number"),
        (["--rat", "1"], "--rat: unknown key; did you mean rate?"),
        (["-r", "1"], "-r: expected [RECIPE.yaml] [--key value ...]"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line_are_reported(argv, message):
    assert error(*argv) == message


def test_a_missing_key_is_named(recipe):
    expected = "name is missing: give it in the recipe or as --name"
    assert error(recipe("dtype: float32"), types=(Model,)) == expected


def help_of(capsys, *types):
    with pytest.raises(SystemExit) as caught:
        parse_settings(["recipe.yaml", "--help"], types, command="align", about="Align it.\n\nexamples:\n  simpo align")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_lists_keys_with_meaning_choices_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, Placed, Data, Config)
    lines = text.splitlines()
    assert lines[0] == "usage: simpo align [RECIPE.yaml] MODEL DATA [--key value ...]"
    assert lines[2:5] == ["Align it.", "", "examples:"]
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n  (?=--|[A-Z]+,)", text)}
    assert entries["MODEL,"] == "MODEL, --model [text; required]"
    assert entries["--dataset_name"] == "--dataset_name Where the data are. A hub id or a file. [text]"
    assert "[one of no, steps, epoch; default no]" in entries["--eval_strategy"]
    assert "transformers' TrainingArguments:" in lines


def test_help_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_of(capsys, Data, Config).splitlines()[8:])) <= 80


# ---- positional arguments and nested settings ----


def placed(*argv):
    return parse_settings(list(argv), (Placed,))[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "d", "--count", "2"],
        ["d", "--model", "m", "--count=2"],
        ["--count", "2", "--model_name_or_path=m", "d"],
        ["--count", "2", "m", "d"],
        ["m", "--count", "2", "d"],
        ["--data", "d", "m", "--count", "2"],
    ],
)
def test_ways_to_give_a_positional_argument(argv):
    found = placed(*argv)
    assert (found.model, found.data, found.count) == ("m", "d", 2)


def test_options_do_not_consume_positional_arguments():
    found = placed("--flag", "m", "--judge", "one", "--prices", "1", "2", "d", "--judge=two", "--extra", "x", "y")
    assert (found.model, found.data, found.flag, found.judge) == ("m", "d", True, ["one", "two"])
    assert (found.prices, found.extra) == ((1.0, 2.0), ["x", "y"])
    assert placed("--flag", "false", "m", "d").flag is False


def test_nested_settings_have_flat_keys_and_their_own_defaults(recipe):
    assert placed("m", "d").sub == Sub(rate=2.0, hidden=7)
    assert placed(recipe("rate: 3"), "m", "d", "--names", "x", "y").sub == Sub(3.0, ["x", "y"], 7)
    assert "--hidden: unknown key" in error("m", "d", "--hidden", "1", types=(Placed,))


def test_the_home_folder_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert placed("m", "d", "--where", "~/x").where == Path("/somewhere/x")


def test_positional_arguments_can_be_in_the_file(recipe):
    path = recipe("model: m\ndata: d")
    found = [placed(*argv) for argv in ([path], [path, "x", "y"], [path, "--data", "y"])]
    assert [(one.model, one.data) for one in found] == [("m", "d"), ("x", "y"), ("m", "y")]
    assert placed(recipe("model_name_or_path: m"), "--count", "1", "y").data == "y"
    assert placed(recipe("model: m"), "y").data == "y"
    message = error(recipe("model: m\ndata: d"), "--count", "1", "y", types=(Placed,))
    assert message.startswith("--count: ['1', 'y'] is not")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["m"], ["data is missing"]),
        (["a", "b", "c"], ["c: expected", "MODEL DATA"]),
        (["a", "b", "--model", "m"], ["b: expected", "MODEL DATA"]),
        (["d", "--model"], ["--model: needs a value"]),
        (["m", "d", "--prices", "1"], ["--prices: '1' is not a list of a number, a number"]),
        (["rows.jsonl", "m"], ["rows.jsonl is a data file", "--model MODEL"]),
    ],
)
def test_mistakes_in_positional_arguments_are_reported(argv, parts):
    message = error(*argv, types=(Placed,))
    assert all(part in message for part in parts)


# ---- the file ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 1\nrate: 2\ncount: 3", "recipe.yaml:3: count: already given on line 1"),
        ("weights:\n  x: 1\n  x: 2", "recipe.yaml:3: x: already given on line 2"),
        ("- count\n- rate", "recipe.yaml:1: a recipe must be a mapping of keys to values"),
        ("just text", "recipe.yaml:1: a recipe must be a mapping of keys to values"),
        ("count: 1\n[1, 2]: 3", "recipe.yaml:2: a key must be text"),
        ("count: 1\nrate: [1,\n", "recipe.yaml:3: not YAML: "),
        ("count: 1\n\trate: 2", "recipe.yaml:2: not YAML: "),
        ("count: !!python/object/apply:os.getpid []", "recipe.yaml:1: not YAML: "),
        ("count: 1\n---\ncount: 2", "recipe.yaml:2: not YAML: "),
        ('text: "\\U99999999"', "recipe.yaml: cannot be read: "),
        ("count: !!int abc", "recipe.yaml:1: count: cannot be read: "),
        (f"counts: {'[' * 3000}", "recipe.yaml: cannot be read: "),
        (
            "betta: 1\nrate: x\ncont: 2",
            "3 problems: (1) recipe.yaml:1: betta: unknown key; (2) recipe.yaml:3: cont: unknown key; did you "
            "mean count?; (3) recipe.yaml:2: rate: 'x' is not a number",
        ),
        ("rate: 1\ncont: 2", "recipe.yaml:2: cont: unknown key; did you mean count?"),
    ],
)
def test_mistakes_in_the_file_are_reported(recipe, text, message):
    assert error(recipe(text)).startswith(message)


def test_bytes_that_are_not_text_are_reported(recipe):
    path = recipe("")
    Path(path).write_bytes(b"text: \xff\xfe")
    assert error(path).startswith("recipe.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_merge_keys_provide_defaults(recipe):
    path = recipe("config: &base {count: 5, rate: 0.25}\n<<: *base\nrate: 0.75")
    assert (values(path).count, values(path).rate) == (5, 0.75)


# ---- spellings ----


def parse_training(*argv):
    return parse_settings([*argv, "--use_cpu", "--output_dir", "out"], (Model, Data, Config))


def test_older_spellings_are_mapped_with_a_notice_each(recipe, caplog):
    path = recipe(
        "name: m\ntorch_dtype: bfloat16\npreprocessing_num_workers: 12\nevaluation_strategy: steps\n"
        "max_seq_length: 512\nwarmup_ratio: 0.1\nhub_model_revision: v1\nuse_flash_attention_2: true\n"
    )
    with caplog.at_level(logging.WARNING, "simpo.config"):
        model, data, config = parse_training(path)
    assert (model.dtype, model.attn_implementation) == ("bfloat16", "flash_attention_2")
    assert (data.dataset_num_proc, config.max_length, config.hub_revision) == (12, 512, "v1")
    assert (config.eval_strategy.value, config.warmup_steps) == ("steps", 0.1)
    assert caplog.messages == [
        "recipe.yaml:2: torch_dtype is read as dtype",
        "recipe.yaml:3: preprocessing_num_workers is read as dataset_num_proc",
        "recipe.yaml:4: evaluation_strategy is read as eval_strategy",
        "recipe.yaml:5: max_seq_length is read as max_length",
        "recipe.yaml:6: warmup_ratio is read as warmup_steps: 0.1",
        "recipe.yaml:7: hub_model_revision is read as hub_revision",
        "recipe.yaml:8: use_flash_attention_2 is read as attn_implementation: flash_attention_2",
    ]


@pytest.mark.parametrize("key", ["overwrite_output_dir", "save_safetensors", "logging_dir", "padding_free"])
def test_meaningless_keys_are_dropped_with_a_notice(caplog, key):
    parse_training("--name", "m", f"--{key}", "true")
    assert caplog.messages == [f"--{key} has no effect here and is dropped"]


def test_gradient_checkpointing_means_the_same_under_both_names(recipe):
    path = recipe("name: m\nactivation_checkpointing: true\nactivation_checkpointing_kwargs: {use_reentrant: false}")
    _, _, config = parse_training(path)
    assert config.gradient_checkpointing is True
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    _, _, config = parse_training(path, "--gradient_checkpointing", "false")
    assert config.gradient_checkpointing is False


def test_both_spellings_in_one_place_are_an_error(recipe):
    path = recipe("name: m\ntorch_dtype: float16\ndtype: float32")
    expected = "recipe.yaml:3: dtype: means the same as recipe.yaml:2: torch_dtype; keep one of them"
    assert error(path, types=(Model,)) == expected
    path = recipe("warmup_steps: 10\nwarmup_ratio: 0.1")
    expected = "recipe.yaml:2: warmup_ratio: means the same as recipe.yaml:1: warmup_steps; keep one of them"
    assert error(path, types=(Config,)) == expected


def test_both_spellings_in_two_places_are_an_override(recipe):
    path = recipe("name: m\ntorch_dtype: float16")
    assert parse_settings([path, "--dtype", "float32"], (Model,))[0].dtype == "float32"


def test_a_ratio_is_not_read_as_a_number_of_steps(recipe):
    path = recipe("warmup_ratio: 1.0")
    expected = "recipe.yaml:1: warmup_ratio: 1.0 is not a fraction of the steps; it must be below 1"
    assert error(path, types=(Config,)) == expected


def test_a_spelling_without_a_corresponding_key_is_unknown():
    assert error("--evaluation_strategy", "steps") == "--evaluation_strategy: unknown key"


# ---- mutually exclusive keys ----


def test_the_command_line_replaces_the_other_data_source(recipe, caplog):
    path = recipe("dataset_mixer: {a: 1.0}\ndataset_splits: [train, test]")
    (data,) = parse_settings([path, "--dataset_name", "mine"], (Data,), replaces=REPLACES)
    assert (data.dataset_name, data.dataset_mixer, data.dataset_splits) == ("mine", None, None)
    assert caplog.messages == [
        "recipe.yaml:1: dataset_mixer is replaced by --dataset_name",
        "recipe.yaml:2: dataset_splits is replaced by --dataset_name",
    ]
    (data,) = parse_settings(
        [recipe("dataset_name: theirs"), "--dataset_mixer", '{"b": 1}'], (Data,), replaces=REPLACES
    )
    assert (data.dataset_name, data.dataset_mixer) == (None, {"b": 1.0})


def test_two_data_sources_in_one_place_are_an_error(recipe):
    path = recipe("dataset_mixer: {a: 1.0}\ndataset_name: mine")
    expected = "recipe.yaml:2: dataset_name: cannot be combined with recipe.yaml:1: dataset_mixer; keep one of them"
    assert error(path, types=(Data,), replaces=REPLACES) == expected
    argv = ["--dataset_name", "mine", "--dataset_splits", "train"]
    expected = "--dataset_name: cannot be combined with --dataset_splits; keep one of them"
    assert error(*argv, types=(Data,), replaces=REPLACES) == expected


def test_keys_in_one_group_can_be_combined(recipe):
    path = recipe("dataset_mixer: {a: 1.0}\ndataset_splits: [train, test]")
    (data,) = parse_settings([path, "--dataset_splits", "dev"], (Data,), replaces=REPLACES)
    assert (data.dataset_mixer, data.dataset_splits) == ({"a": 1.0}, ["dev"])


# ---- TrainingArguments ----


@pytest.fixture
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(transformers_integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])


@pytest.mark.usefixtures("only_tensorboard")
def test_a_tracker_that_is_not_installed_is_an_error(recipe):
    for written, missing in (
        ("[wandb, tensorboard]", "wandb is"),
        ("wandb", "wandb is"),
        ("[wandb, mlflow]", "wandb and mlflow are"),
    ):
        message = error(recipe(f"name: m\nreport_to: {written}"), "--use_cpu", types=(Model, Config))
        pronoun = "them" if "and" in missing.split() else "it"
        remedy = f"install {pronoun}, or set report_to: none"
        assert message == f"recipe.yaml:2: report_to: {missing} not installed; {remedy}"
    for written, expected in (("tensorboard", ["tensorboard"]), ("none", [])):
        _, _, config = parse_training(recipe(f"name: m\nreport_to: {written}"))
        assert config.report_to == expected


def test_an_unknown_integration_is_an_error(recipe):
    message = error(recipe("report_to: wandbb"), types=(Config,))
    assert message.startswith("recipe.yaml:1: report_to: 'wandbb' is not a reporting integration")
    assert message.endswith("; did you mean wandb?")


def test_training_arguments_accept_common_yaml_values(recipe):
    path = recipe(
        "name: m\nsave_strategy: no\nlearning_rate: 1e-6\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1e-7}\noptim: adamw_torch\nsave_steps: 0.5\nfsdp: false\ndebug: ''\n"
    )
    _, _, config = parse_training(path)
    assert (config.save_strategy.value, config.learning_rate, config.save_steps) == ("no", 1e-6, 0.5)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert config.fsdp is False


def test_enum_values_are_validated_before_transformers_sees_them(recipe):
    message = error(recipe("\nlr_scheduler_type: cosin"), types=(Config,))
    assert message.startswith("recipe.yaml:2: lr_scheduler_type: 'cosin' is not one of linear, cosine, ")
    assert message.endswith("; did you mean cosine?")


# ---- rejections by the dataclasses ----


def test_a_rejection_is_one_line_with_the_keys_location(recipe):
    assert error(recipe("rate: 1\ncount: -1")) == "recipe.yaml:2: count must not be negative"
    assert error("--count", "-1") == "count must not be negative"
    assert error(recipe("rate: -1")) == "recipe.yaml:1: rate must not be negative"


def test_a_rejection_by_transformers_has_the_location_too(recipe):
    message = error(recipe("output_dir: out\nlogging_steps: 0"), "--use_cpu", types=(Config,))
    assert message.startswith("recipe.yaml:2: logging strategy")
    assert message.endswith("requires non-zero --logging_steps")


def test_a_rejection_without_a_key_has_no_location():
    @dataclass
    class Stubborn:
        rate: float = 1.0

        def __post_init__(self):
            raise ValueError("not today")

    assert error("--rate", "2", types=(Stubborn,)) == "not today"


# ---- the recipes in this repository ----


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path, tmp_path, caplog):
    kind = SFTConfig if path.stem.endswith("-sft") else PreferenceConfig
    kind = RewardConfig if path.stem.startswith("reward-") else kind
    kind, more = (OnlineConfig, (GenerationArguments, AnnotatorArguments)) if path.stem.endswith("-ppo") else (kind, ())
    _, _, config, *_ = parse([str(path), "--use_cpu", "--output_dir", str(tmp_path)], kind, *more)
    assert isinstance(config, kind)
    # Older versions of transformers call activation_checkpointing gradient_checkpointing, which causes a notice.
    assert [message for message in caplog.messages if "checkpointing" not in message] == []


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_have_the_papers_values(name):
    settings = yaml.safe_load((Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text())
    keys = ("beta", "gamma_beta_ratio", "learning_rate", "max_length")
    assert tuple(settings[key] for key in keys) == PAPER[name]
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * 4 == 128


@pytest.mark.parametrize(
    "value",
    [
        *(
            "!!int abc",
            "!!float x",
            "!!bool maybe",
            "!!timestamp x",
            "0b_",
            "0x_",
            "1" * 5000,
            '!!int ""',
            '!!float ""',
        ),
        *("!!python/object:os.system x", "!!timestamp 2001-99-99", "1e400", "[" * 3000 + "]" * 3000, "&a [*a]"),
        "[" + ", ".join([f"&a0 [{'x, ' * 10}]"] + [f"&a{i} [{f'*a{i - 1}, ' * 10}]" for i in range(1, 10)]) + "]",
        "[" + ", ".join(["&a0 {a: x}"] + [f"&a{i} {{<<: [{f'*a{i - 1}, ' * 10}]}}" for i in range(1, 10)]) + "]",
    ],
)
def test_values_yaml_cannot_read_give_a_one_line_error(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"objective: simpo\nbeta: {value}\n")
    with pytest.raises(SimpoError) as caught:
        parse([str(path)], PreferenceConfig)
    assert "recipe.yaml" in str(caught.value) and len(str(caught.value)) < 1000
