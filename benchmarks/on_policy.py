"""Best of N and on-policy rounds on the tiny world, by its exact judge and by a reward model that learnt from little.

    simpo demo --output_dir runs/demo-1
    python -m benchmarks.on_policy runs/demo-1 --output_dir runs/on-policy

About a quarter of an hour on one core. Every stage is a run of a command, so that the same call goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.best_of_n import best_of_n, best_of_n_kl
from simpo import cli
from simpo.analysis.plots import COLORS, STYLE, save
from simpo.data.prompts import prepare_prompts
from simpo.data.sources import load_rows
from simpo.models.loading import load_tokenizer
from simpo.runs.files import read_lines, write_lines
from simpo.statistics import Interval, mean_interval

_RECIPE = Path(__file__).parents[1] / "recipes/loop/tiny.yaml"
_DRAWN = ["--temperature=1", "--top_p=1", "--max_new_tokens=48", "--chunk_size=128"]
_KEPT = ["--keep_unfinished"]  # nothing is done here against a reward model that is exploited
_TRAINED_ON = 300  # rankings: few enough that the reward model is wrong in places
_REWARD = ["--learning_rate=1e-3", "--num_train_epochs=3", "--per_device_train_batch_size=16", "--max_length=128"]
_TEMPERATURES = (0.5, 0.7, 1.0)
JUDGES = ("exact", "reward model")


@dataclass(frozen=True)
class Place:
    """Where everything is.

    Attributes:
        demo: folder of a finished ``simpo demo``.
        folder: of this benchmark.
        answers: of the start to every held-out prompt.
        prompts: the held-out ones.
    """

    demo: Path
    folder: Path
    answers: int
    prompts: Path

    @property
    def annotators(self) -> dict[str, str]:
        """The names of both judges, as ``--annotator`` takes them."""
        return dict(zip(JUDGES, ("exact", f"reward:{self.folder / 'reward'}"), strict=True))

    def scores(self, responses: Path, name: str, judges: Sequence[str] = JUDGES) -> dict[str, np.ndarray]:
        """Scores by ``judges``, ``[P, K]``, of a folder of responses."""
        found = {}
        for judge in judges:
            annotator = self.annotators[judge]
            folder = self.folder / f"{name}-{judge.partition(' ')[0]}"
            simpo("annotate", responses, f"--annotator={annotator}", f"--output_dir={folder}")
            found[judge] = np.array([row["scores"] for row in read_lines(folder / "annotated.jsonl")])
        return found


def simpo(*arguments: object) -> None:
    """Run a command; if it fails, exit with its exit code."""
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages, write ``figures.json``, ``best-of-n.png`` and ``reward-kl.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished simpo demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=64, help="of the start to every held-out prompt (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="of each loop (default 3)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # for a model this small, threads wait for one another longer than they work
    demo = given.demo.resolve()
    place = Place(demo, given.output_dir.resolve(), given.answers, demo / "held-out.jsonl")
    train_reward(place)
    best = best_of_n_curves(place)
    curves = {judge: _rounds(place, judge, given.rounds) for judge in JUDGES}
    _plot_best_of_n(place.folder / "best-of-n.png", best)
    _plot_rounds(place.folder / "reward-kl.png", curves)
    figures = {"best of n": best, "rounds": curves}
    (place.folder / "figures.json").write_text(json.dumps(figures, default=vars, indent=1) + "\n")
    print(f"figures: {place.folder / 'figures.json'}")


def train_reward(place: Place) -> None:
    """A reward model from exactly judged answers to the training prompts."""
    folder = place.folder
    simpo("annotate", place.demo / "samples", "--annotator=exact", f"--output_dir={folder / 'judged'}")
    simpo("pair", folder / "judged", "--pairs=ranking", *_KEPT, f"--output_dir={folder / 'rankings'}")
    write_lines(folder / "reward.jsonl", read_lines(folder / "rankings/pairs.jsonl")[:_TRAINED_ON])
    options = [f"--model_name_or_path={place.demo / 'sft'}", f"--dataset_name={folder / 'reward.jsonl'}", *_REWARD]
    simpo("reward", *options, "--save_strategy=no", "--report_to=none", f"--output_dir={folder / 'reward'}")


def best_of_n_curves(place: Place) -> dict[str, dict[str, list[Interval]]]:
    """Chosen by each judge, measured by each, over N = 1, 2, 4, ..."""
    responses = place.folder / "many"
    sample(place, place.demo / "sft", responses, place.answers, 1.0)
    scores = place.scores(responses, "many")
    return {
        chooser: {
            judge: [mean_interval(best_of_n(scores[chooser], scores[judge], n)) for n in sizes(place.answers)]
            for judge in JUDGES
        }
        for chooser in JUDGES
    }


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def sample(place: Place, model: Path, output: Path, n: int, temperature: float) -> None:
    """``n`` answers of a model to every held-out prompt."""
    words = [f"--n={n}", *_DRAWN, f"--temperature={temperature}", "--seed=1", f"--output_dir={output}"]
    simpo("sample", model, place.prompts, *words)


def _rounds(place: Place, judge: str, rounds: int) -> list[dict[str, object]]:
    """Both judges' scores and the KL divergence from the start, of every round's model at every temperature."""
    name = f"loop-{judge.partition(' ')[0]}"
    options = [f"--{key}={place.demo / found}" for key, found in _DEMO.items()]
    options += [f"--annotator={place.annotators[judge]}", "--judges", *place.annotators.values()]
    options += [f"--rounds={rounds}", "--stop_win_rate=0", *_KEPT, f"--output_dir={place.folder / name}"]
    simpo("loop", _RECIPE, *options)
    found: list[dict[str, object]] = []
    for number in range(rounds + 1):
        model = place.folder / name / f"round-{number}/model" if number else place.demo / "sft"
        for temperature in _TEMPERATURES:
            responses = place.folder / f"{name}-{number}-{temperature}"
            sample(place, model, responses, 4, temperature)
            scores = place.scores(responses, responses.name)
            kl = mean_interval(divergence(place, model, responses, temperature))
            means = {who: mean_interval(values.mean(1)) for who, values in scores.items()}
            found.append({"round": number, "temperature": temperature, "kl": kl, "scores": means})
    return found


_DEMO = {"model_name_or_path": "sft", "prompts": "prompts.jsonl", "eval_prompts": "held-out.jsonl"}


def divergence(place: Place, model: Path, responses: Path, temperature: float) -> np.ndarray:
    """Estimates ``[P]`` of KL(model at the temperature || start) on the model's own answers, in nats."""
    tokenizer = load_tokenizer(str(model))
    rows = load_rows(str(place.prompts), split="train")
    prompts = {prompt.id: prompt.ids for prompt in prepare_prompts(rows, tokenizer)}
    here, there = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model, place.demo / "sft"))
    found = []
    for row in read_lines(responses / "responses.jsonl"):
        asked = prompts[row["id"]], row["response_ids"]
        found.append(np.mean(_logps(here, *asked, temperature) - _logps(there, *asked, 1.0)))
    return np.array(found)


@torch.no_grad()
def _logps(model: torch.nn.Module, prompt: list[int], responses: list[list[int]], temperature: float) -> np.ndarray:
    """``[K]`` log-probabilities of the responses to a prompt as they are drawn at a temperature."""
    ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True, padding_value=-1)
    prompts = torch.tensor(prompt).expand(len(responses), -1)
    logits = model(torch.cat([prompts, ids.clamp(min=0)], 1)).logits[:, len(prompt) - 1 : -1]
    each = (logits / temperature).log_softmax(-1).gather(2, ids.clamp(min=0)[:, :, None])[:, :, 0]
    return each.where(ids >= 0, 0).sum(1).numpy()  # what is read after a response does not change it


def _plot_best_of_n(path: Path, best: dict[str, dict[str, list[Interval]]]) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, judge in zip(figure.subplots(1, 2), JUDGES, strict=True):
            for color, (chooser, found) in zip(COLORS, best.items(), strict=False):
                counts = [1 << power for power in range(len(found[judge]))]
                _line(axes, counts, found[judge], color, f"chosen by the {chooser}" + " judge" * (chooser == "exact"))
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [f"{count}\n{best_of_n_kl(count):.1f}" for count in counts])
            axes.set(xlabel="best of N; below: KL from the start at most, nats", ylabel=f"score by {judge}")
            axes.legend(frameon=False)
        save(figure, path)


def _line(
    axes: Axes, places: Sequence[float] | range, found: Sequence[Interval], color: str, label: str, *, scale: float = 1
) -> None:
    """Points with their intervals, and a line through them."""
    values = [scale * one.value for one in found]
    below = [0.0 if one.low is None else scale * (one.value - one.low) for one in found]
    above = [0.0 if one.high is None else scale * (one.high - one.value) for one in found]
    axes.errorbar(places, values, [below, above], color=color, marker="o", capsize=3, linewidth=1.4, label=label)


def _plot_rounds(path: Path, curves: dict[str, list[dict[str, object]]]) -> None:
    """A line a temperature through the rounds; the rounds' numbers next to the points of temperature 1."""

    def draw(axes: Axes, annotated_by: str, judge: str) -> None:
        for color, temperature in zip(COLORS, _TEMPERATURES, strict=False):
            chosen = [point for point in curves[annotated_by] if point["temperature"] == temperature]
            places = [point["kl"].value for point in chosen]
            values = [point["scores"][judge] for point in chosen]
            _line(axes, places, values, color, f"temperature {temperature}")
            if temperature == 1:
                for point, x, y in zip(chosen, places, values, strict=True):
                    axes.annotate(str(point["round"]), (x, y.value), (4, -11), textcoords="offset points")

    plot_against_kl(path, list(curves), "rounds annotated by", draw)


def plot_against_kl(path: Path, trained: Sequence[str], title: str, draw: Callable[[Axes, str, str], None]) -> None:
    """Scores over the KL divergence: a row of panels for each of ``trained``, a column for each judge that measures.

    Args:
        path: of the PNG file.
        trained: the judges that were trained against.
        title: what they did, before their names in the panels' titles.
        draw: fills the panel of one of ``trained`` and of a judge.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.5 * len(trained)), layout="constrained")
        grid = figure.subplots(len(trained), len(JUDGES), squeeze=False, sharex="row")
        for row, by in zip(grid, trained, strict=True):
            for axes, judge in zip(row, JUDGES, strict=True):
                draw(axes, by, judge)
                axes.set(xlabel="KL from the start, nats an answer", ylabel=f"score by {judge}")
                axes.set_title(f"{title}: {by}", fontsize=10)
        names = grid[0][0].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=4, frameon=False)
        save(figure, path)


if __name__ == "__main__":
    main()
