"""Best-of-N and on-policy rounds on the tiny world, with its exact judge and a reward model trained on little data.

    simpo demo --output_dir runs/demo-1
    python -m benchmarks.on_policy runs/demo-1 --output_dir runs/on-policy

Takes about 15 minutes on one core. Every stage is a run of a command, so the same command continues after a kill.
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
_SAMPLING = ["--temperature=1", "--top_p=1", "--max_new_tokens=48", "--chunk_size=128"]
_KEEP_UNFINISHED = ["--keep_unfinished"]  # on purpose: no safeguard against reward hacking here
_REWARD_ROWS = 300  # few enough rankings that the reward model makes mistakes
_REWARD_KEYS = ["--learning_rate=1e-3", "--num_train_epochs=3", "--per_device_train_batch_size=16", "--max_length=128"]
_TEMPERATURES = (0.5, 0.7, 1.0)
JUDGES = ("exact", "reward model")


@dataclass(frozen=True)
class Workspace:
    """The folders and files of this benchmark.

    Attributes:
        demo: folder of a finished ``simpo demo``.
        folder: folder for this benchmark's output.
        answers: answers the initial model gives to each held-out prompt.
        prompts: file of held-out prompts.
    """

    demo: Path
    folder: Path
    answers: int
    prompts: Path

    @property
    def annotators(self) -> dict[str, str]:
        """The ``--annotator`` argument for each judge."""
        return dict(zip(JUDGES, ("exact", f"reward:{self.folder / 'reward'}"), strict=True))

    def scores(self, responses: Path, name: str, judges: Sequence[str] = JUDGES) -> dict[str, np.ndarray]:
        """Score a folder of responses with ``judges``; return ``[P, K]`` scores for each."""
        found = {}
        for judge in judges:
            annotator = self.annotators[judge]
            folder = self.folder / f"{name}-{judge.partition(' ')[0]}"
            simpo("annotate", responses, f"--annotator={annotator}", f"--output_dir={folder}")
            found[judge] = np.array([row["scores"] for row in read_lines(folder / "annotated.jsonl")])
        return found


def simpo(*arguments: object) -> None:
    """Run a simpo command, and exit with its exit code if it fails."""
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages; write ``figures.json``, ``best-of-n.png`` and ``reward-kl.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished simpo demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=64, help="the initial model's answers per prompt (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in each loop (default 3)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # for a model this small, threads would mostly wait for each other
    demo = given.demo.resolve()
    workspace = Workspace(demo, given.output_dir.resolve(), given.answers, demo / "held-out.jsonl")
    train_reward(workspace)
    best = best_of_n_curves(workspace)
    curves = {judge: _rounds(workspace, judge, given.rounds) for judge in JUDGES}
    _plot_best_of_n(workspace.folder / "best-of-n.png", best)
    _plot_rounds(workspace.folder / "reward-kl.png", curves)
    figures = {"best of n": best, "rounds": curves}
    (workspace.folder / "figures.json").write_text(json.dumps(figures, default=vars, indent=1) + "\n")
    print(f"figures: {workspace.folder / 'figures.json'}")


def train_reward(workspace: Workspace) -> None:
    """Train a reward model on exactly judged answers to the training prompts."""
    folder = workspace.folder
    simpo("annotate", workspace.demo / "samples", "--annotator=exact", f"--output_dir={folder / 'judged'}")
    simpo("pair", folder / "judged", "--pairs=ranking", *_KEEP_UNFINISHED, f"--output_dir={folder / 'rankings'}")
    write_lines(folder / "reward.jsonl", read_lines(folder / "rankings/pairs.jsonl")[:_REWARD_ROWS])
    data = [f"--model_name_or_path={workspace.demo / 'sft'}", f"--dataset_name={folder / 'reward.jsonl'}"]
    simpo("reward", *data, *_REWARD_KEYS, "--save_strategy=no", "--report_to=none", f"--output_dir={folder / 'reward'}")


def best_of_n_curves(workspace: Workspace) -> dict[str, dict[str, list[Interval]]]:
    """Return best-of-N scores for N = 1, 2, 4, ..., for every pair of selecting and evaluating judge."""
    responses = workspace.folder / "many"
    sample(workspace, workspace.demo / "sft", responses, workspace.answers, 1.0)
    scores = workspace.scores(responses, "many")
    return {
        chooser: {
            judge: [
                mean_interval(best_of_n(scores[chooser], scores[judge], n)) for n in powers_of_two(workspace.answers)
            ]
            for judge in JUDGES
        }
        for chooser in JUDGES
    }


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``limit``."""
    return [1 << power for power in range(limit.bit_length())]


def sample(workspace: Workspace, model: Path, output: Path, n: int, temperature: float) -> None:
    """Sample ``n`` answers from a model for every held-out prompt."""
    words = [f"--n={n}", *_SAMPLING, f"--temperature={temperature}", "--seed=1", f"--output_dir={output}"]
    simpo("sample", model, workspace.prompts, *words)


def _rounds(workspace: Workspace, judge: str, rounds: int) -> list[dict[str, object]]:
    """Measure each round's model at every temperature: both judges' scores and the KL from the initial model."""
    name = f"loop-{judge.partition(' ')[0]}"
    options = [f"--{key}={workspace.demo / found}" for key, found in _DEMO.items()]
    options += [f"--annotator={workspace.annotators[judge]}", "--judges", *workspace.annotators.values()]
    options += [f"--rounds={rounds}", "--stop_win_rate=0", *_KEEP_UNFINISHED, f"--output_dir={workspace.folder / name}"]
    simpo("loop", _RECIPE, *options)
    found: list[dict[str, object]] = []
    for number in range(rounds + 1):
        model = workspace.folder / name / f"round-{number}/model" if number else workspace.demo / "sft"
        for temperature in _TEMPERATURES:
            responses = workspace.folder / f"{name}-{number}-{temperature}"
            sample(workspace, model, responses, 4, temperature)
            scores = workspace.scores(responses, responses.name)
            kl = mean_interval(divergence(workspace, model, responses, temperature))
            means = {who: mean_interval(values.mean(1)) for who, values in scores.items()}
            found.append({"round": number, "temperature": temperature, "kl": kl, "scores": means})
    return found


_DEMO = {"model_name_or_path": "sft", "prompts": "prompts.jsonl", "eval_prompts": "held-out.jsonl"}


def divergence(workspace: Workspace, model: Path, responses: Path, temperature: float) -> np.ndarray:
    """Estimate KL(model at the temperature || start) in nats from the model's own answers, one value per prompt."""
    tokenizer = load_tokenizer(str(model))
    rows = load_rows(str(workspace.prompts), split="train")
    prompts = {prompt.id: prompt.ids for prompt in prepare_prompts(rows, tokenizer)}
    trained, start = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model, workspace.demo / "sft"))
    found = []
    for row in read_lines(responses / "responses.jsonl"):
        ids = prompts[row["id"]], row["response_ids"]
        found.append(np.mean(_logps(trained, *ids, temperature) - _logps(start, *ids, 1.0)))
    return np.array(found)


@torch.no_grad()
def _logps(model: torch.nn.Module, prompt: list[int], responses: list[list[int]], temperature: float) -> np.ndarray:
    """Return the log-probabilities ``[K]`` of the responses to a prompt when sampled at a temperature."""
    ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True, padding_value=-1)
    prompts = torch.tensor(prompt).expand(len(responses), -1)
    logits = model(torch.cat([prompts, ids.clamp(min=0)], 1)).logits[:, len(prompt) - 1 : -1]
    each = (logits / temperature).log_softmax(-1).gather(2, ids.clamp(min=0)[:, :, None])[:, :, 0]
    return each.where(ids >= 0, 0).sum(1).numpy()  # padding after a response has no effect on it


def _plot_best_of_n(path: Path, best: dict[str, dict[str, list[Interval]]]) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, judge in zip(figure.subplots(1, 2), JUDGES, strict=True):
            for color, (chooser, found) in zip(COLORS, best.items(), strict=False):
                counts = [1 << power for power in range(len(found[judge]))]
                _line(axes, counts, found[judge], color, f"chosen by the {chooser}" + " judge" * (chooser == "exact"))
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [f"{count}\n{best_of_n_kl(count):.1f}" for count in counts])
            axes.set(xlabel="N, with the upper bound on KL from the start in nats below", ylabel=f"score by {judge}")
            axes.legend(frameon=False)
        save(figure, path)


def _line(
    axes: Axes, xs: Sequence[float] | range, found: Sequence[Interval], color: str, label: str, *, scale: float = 1
) -> None:
    """Draw points with error bars, joined by a line."""
    values = [scale * one.value for one in found]
    below = [0.0 if one.low is None else scale * (one.value - one.low) for one in found]
    above = [0.0 if one.high is None else scale * (one.high - one.value) for one in found]
    axes.errorbar(xs, values, [below, above], color=color, marker="o", capsize=3, linewidth=1.4, label=label)


def _plot_rounds(path: Path, curves: dict[str, list[dict[str, object]]]) -> None:
    """Draw one line per temperature through the rounds, with round numbers next to the points at temperature 1."""

    def draw(axes: Axes, annotated_by: str, judge: str) -> None:
        for color, temperature in zip(COLORS, _TEMPERATURES, strict=False):
            chosen = [point for point in curves[annotated_by] if point["temperature"] == temperature]
            xs = [point["kl"].value for point in chosen]
            values = [point["scores"][judge] for point in chosen]
            _line(axes, xs, values, color, f"temperature {temperature}")
            if temperature == 1:
                for point, x, y in zip(chosen, xs, values, strict=True):
                    axes.annotate(str(point["round"]), (x, y.value), (4, -11), textcoords="offset points")

    plot_against_kl(path, list(curves), "rounds annotated by", draw)


def plot_against_kl(path: Path, trained: Sequence[str], title: str, draw: Callable[[Axes, str, str], None]) -> None:
    """Plot scores against KL: a row of panels per training judge, a column per evaluating judge.

    Args:
        path: the PNG file to write.
        trained: the judges that were trained against.
        title: text before the training judge's name in panel titles.
        draw: draws the panel for a training judge and an evaluating judge.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.5 * len(trained)), layout="constrained")
        grid = figure.subplots(len(trained), len(JUDGES), squeeze=False, sharex="row")
        for row, by in zip(grid, trained, strict=True):
            for axes, judge in zip(row, JUDGES, strict=True):
                draw(axes, by, judge)
                axes.set(xlabel="KL from the start, nats per answer", ylabel=f"score by {judge}")
                axes.set_title(f"{title}: {by}", fontsize=10)
        names = grid[0][0].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=4, frameon=False)
        save(figure, path)


if __name__ == "__main__":
    main()
