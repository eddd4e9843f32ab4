"""Training on 1, 2 and 4 processes, with DDP and FSDP2, gives the same gradients, logs, weights and checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from accelerate import PartialState
from accelerate.utils import DistributedType
from benchmarks.architectures import build
from datasets import load_from_disk
from safetensors.torch import load_file
from tests.forked import run_ranks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from simpo import PreferenceConfig, PreferenceTrainer, SFTConfig, SFTTrainer, SimpoError
from simpo.models.adapters import add_adapter
from simpo.packing.model import state_of
from simpo.training.checkpoints import check_checkpoint

ROWS, ROWS_PER_STEP, STEPS = 19, 8, 6  # two epochs; their last steps have 3 rows, fewer than 4 ranks
SETTINGS = {
    "per_device_eval_batch_size": 3,
    "max_batch_tokens": 27,  # one or two rows per micro-batch
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.5,  # clips in every step
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}
SAVES = {"save_strategy": "steps", "save_steps": 4}
# Half as long, with up to three rows per micro-batch and two per rank in full steps.
SHORT = {"num_train_epochs": 1, "max_batch_tokens": 60}
BEST = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
BEST |= {"load_best_model_at_end": True}
DPO = SHORT | {"objective": "dpo"}
DPO_SAVES = DPO | {"save_strategy": "steps", "save_steps": 2}
KL = SHORT | {"objective": "dpo", "precompute_ref_log_probs": False, "kl_weight": 0.1}
KL |= {"wpo_weights": True, "ld_alpha": 0.5}  # everything that needs more than summed log-probabilities
LORA = {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["c_attn", "c_fc"]}
KTO = SHORT | {"objective": "kto"}
COLUMNS = SHORT | {"row_columns": ["weight", "label_probability", "margin"]}
SHAPE = ("hidden_size", "num_attention_heads", "num_key_value_heads")
# Adam would amplify the fp32 rounding errors in these models.
STATES = SHORT | {"optim": "sgd", "learning_rate": 1e-3}
CHECKPOINTING = {"gradient_checkpointing": True}
ROPE = SHORT | {"max_batch_tokens": 110}  # rows with different frequencies in one micro-batch
LAYERS = {
    "dynamic": "LlamaDecoderLayer",
    "qwen3_5_text": "Qwen3_5DecoderLayer",
    "falcon_h1": "FalconH1DecoderLayer",
}
KINDS = {"pairs": (PreferenceTrainer, PreferenceConfig), "sft": (SFTTrainer, SFTConfig)}


class Job(NamedTuple):
    """A training run that saves its model to the folder ``name``."""

    name: str
    data: str = "pairs"
    shards: bool = False
    settings: dict[str, Any] | None = None
    resume: str | None = None
    model: str = "model"
    dtype: torch.dtype = torch.float64
    lora: bool = False


IN_TWO = [
    Job("ddp-2", settings=SAVES),
    Job("ddp-2-sft", "sft"),
    Job("fsdp-2", shards=True, settings=SAVES),
    Job("fsdp-2-sft", "sft", shards=True),
    Job("fsdp-2-bf16", shards=True, settings={"bf16": True, "max_batch_tokens": 60} | BEST, dtype=torch.float32),
    Job("ddp-2-kto", settings=KTO),
    Job("fsdp-2-kto", shards=True, settings=KTO),
    Job("ddp-2-lora", settings=DPO_SAVES, lora=True),
    Job("fsdp-2-lora", shards=True, settings=DPO_SAVES, lora=True),
    Job("fsdp-2-lora-of-ddp-2", shards=True, settings=DPO, lora=True, resume="ddp-2-lora/checkpoint-2"),
    Job("ddp-2-kl", settings=KL),
    Job("ddp-2-columns", "columns", settings=COLUMNS),
    Job("fsdp-2-kl", shards=True, settings=KL),
    Job("fsdp-2-lora-kl", shards=True, settings=KL, lora=True),
    Job("ddp-2-rope", "mixed", model="dynamic", settings=ROPE),
    Job("fsdp-2-rope", "mixed", shards=True, model="dynamic", settings=ROPE),
    Job("fsdp-2-alone", "mixed", shards=True, model="dynamic", settings=ROPE),
    Job("ddp-2-states", model="qwen3_5_text", settings=STATES),
    Job("fsdp-2-states", shards=True, model="qwen3_5_text", settings=STATES),
    Job("fsdp-2-checkpointed-states", shards=True, model="qwen3_5_text", settings=STATES | CHECKPOINTING),
    Job("fsdp-2-hybrid", shards=True, model="falcon_h1", settings=STATES | CHECKPOINTING),
    Job("sharded-before"),
    Job("ddp-2-nan", "long", model="poisoned", settings={"max_batch_tokens": 40}),
]
IN_FOUR = [
    Job("ddp-4"),
    Job("ddp-4-sft", "sft"),
    Job("fsdp-4", shards=True),
    Job("ddp-4-of-2", resume="ddp-2/checkpoint-4"),
    Job("fsdp-4-of-fsdp-2", shards=True, resume="fsdp-2/checkpoint-4"),
    Job("fsdp-4-of-ddp-2", shards=True, resume="ddp-2/checkpoint-4"),
]
ALONE = [
    Job("one"),
    Job("one-sft", "sft"),
    Job("one-kto", settings=KTO),
    Job("one-lora", settings=DPO, lora=True),
    Job("one-kl", settings=KL),
    Job("one-columns", "columns", settings=COLUMNS),
    Job("one-states", model="qwen3_5_text", settings=STATES),
    Job("one-hybrid", model="falcon_h1", settings=STATES),
    Job("one-rope", "mixed", model="dynamic", settings=ROPE),
    Job("one-lora-kl", settings=KL, lora=True),
    Job("one-lora-of-fsdp-2", settings=DPO, lora=True, resume="fsdp-2-lora/checkpoint-2"),
    Job("one-of-ddp-2", resume="ddp-2/checkpoint-4"),
    Job("one-of-fsdp-2", resume="fsdp-2/checkpoint-4"),
]


class LongestRowRotaryEmbedding(LlamaRotaryEmbedding):
    """Computes frequencies from the longest row in a forward; nothing in the configuration says so."""

    def forward(self, x, position_ids):
        self.attention_scaling = 1.0 if position_ids.max() < 20 else 1.2
        return super().forward(x, position_ids)


class Gradients(TrainerCallback):
    """Records the gradients before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([whole(parameter.grad) for parameter in model.parameters() if parameter.requires_grad])


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(job: Job, folder: Path, world: int) -> dict[str, Any]:
    """Train and evaluate on this rank and return everything recorded."""
    trainer_type, config_type = KINDS["sft" if job.data == "sft" else "pairs"]
    settings = SETTINGS | {"per_device_train_batch_size": ROWS_PER_STEP // world} | (job.settings or {})
    if job.data != "sft":
        settings |= {"reference_cache": str(folder / job.name / "reference")}
    if world > 1:
        settings |= {"ddp_backend": "gloo"}
    if job.shards:
        layer = LAYERS.get(job.model, "GPT2Block")
        settings |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": layer}}
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate's leftovers from the previous job
    args = config_type(output_dir=str(folder / job.name), **settings)
    if job.shards:
        # On a CPU, accelerate turns FSDP into DDP. It shards on what looks like an accelerator, here backed by gloo.
        PartialState().distributed_type = DistributedType.MULTI_XPU
    model = hf.AutoModelForCausalLM.from_pretrained(folder / job.model, dtype=job.dtype)
    if job.lora:
        torch.manual_seed(int(os.environ.get("RANK", "0")))  # differs by rank; the main rank's weights must win
        model = add_adapter(model, LORA)
    rows, gradients = load_from_disk(folder / job.data), Gradients()
    if job.name == "sharded-before":
        with pytest.raises(SimpoError, match="model: its weights are already sharded"):
            trainer_type(fully_shard(model), args, rows)
        return {}
    if job.name == "fsdp-2-alone":
        model.model.rotary_emb = LongestRowRotaryEmbedding(
            hf.LlamaConfig(**{key: model.config.to_dict()[key] for key in SHAPE})
        )
        with pytest.raises(SimpoError, match=r"fsdp: .* a separate forward pass"):
            trainer_type(model, args, rows)
        return {}
    trainer = trainer_type(model, args, rows, eval_dataset=rows, callbacks=[gradients])
    found: dict[str, Any] = {"seen": watch_rows(trainer), "gradients": gradients.steps}
    found["points"] = watch_points(trainer)
    found["before"] = trainer.score_rows(rows) if job.data != "long" else None
    try:
        trainer.train(resume_from_checkpoint=None if job.resume is None else str(folder / job.resume))
    except SimpoError as error:
        return {"error": str(error)}
    found |= {
        "type": trainer.accelerator.distributed_type,
        "wrapper": [kind for kind in (DistributedDataParallel, FSDPModule) if isinstance(trainer.model_wrapped, kind)],
        "sharded": {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()},
        "policy": state_of(trainer.accelerator.unwrap_model(trainer.model)),
        "log": [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry],
        "after": trainer.score_rows(rows),
        "evaluation": trainer.evaluate(),
        "best": trainer.state.best_model_checkpoint,
    }
    trainer.save_model(args.output_dir)
    trainer.accelerator.wait_for_everyone()
    return found


def watch_points(trainer) -> list[float]:
    """Record KTO's reference point in every step."""
    points, before_step = [], trainer.before_step

    def watched(*args):
        before_step(*args)
        points.append(float(getattr(trainer, "_context", {}).get("z_ref", 0)))

    trainer.before_step = watched
    return points


def watch_rows(trainer) -> list[list[int]]:
    """Record this rank's rows in every step, without fillers; every micro-batch must reach backward."""
    seen, training_step, backward = [], trainer.training_step, trainer.accelerator.backward
    left = []

    def watched_step(model, inputs, *rest, **kwargs):
        batches = inputs["micro_batches"]
        seen.append([r for b in batches for r, w in zip(b.rows, b.packed.weights.tolist(), strict=True) if w])
        left.append(len(batches))
        loss = training_step(model, inputs, *rest, **kwargs)
        assert left[-1] == 0
        return loss

    def watched_backward(loss, **kwargs):
        left[-1] -= 1
        return backward(loss, **kwargs)

    trainer.training_step, trainer.accelerator.backward = watched_step, watched_backward
    return seen


def run_jobs(jobs: list[Job], folder: Path, world: int) -> int:
    for job in jobs:
        torch.save(run(job, folder, world), folder / f"{job.name}.{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def done(make_model, pairs, random_comparisons, as_dataset, tmp_path_factory):
    """``done(name)``: what every rank recorded in a job; ``done.folder`` contains the models."""
    folder = tmp_path_factory.mktemp("ranks")
    pairs(ROWS).save_to_disk(folder / "pairs")
    with_values(pairs(ROWS)).save_to_disk(folder / "columns")
    shapes = [(3 + row % 5, (2 + row * 7 % 17,)) for row in range(ROWS)]
    as_dataset(random_comparisons(*shapes)).save_to_disk(folder / "sft")
    long = as_dataset(random_comparisons(*[(4, (5, 6))] * (ROWS - 1), (25, (2, 3))))
    long.save_to_disk(folder / "long")
    lengths = [(3 + row % 9, (2 + row * 7 % 17, 2 + row * 5 % 23)) for row in range(ROWS)]
    as_dataset(random_comparisons(*lengths)).save_to_disk(folder / "mixed")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # applies beyond 16 tokens; rows have up to 37
    make_model("llama", max_position_embeddings=16, rope_parameters=rope).save_pretrained(folder / "dynamic")
    kinds = {"qwen3_5_text": ["linear_attention", "full_attention"], "falcon_h1": None}
    for name, layers in kinds.items():
        options = {} if layers is None else {"layer_types": layers}
        build(name, torch.float64, num_hidden_layers=2, **options).save_pretrained(folder / name)
    model = make_model("gpt2")
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.transformer.wpe.weight[22] = torch.nan  # only the long row reaches this position
    model.save_pretrained(folder / "poisoned")
    for world, jobs in ((2, IN_TWO), (4, IN_FOUR)):
        ended = run_ranks(world, run_jobs, jobs, folder, world, folder=folder, timeout=900)
        assert ended.codes == [0] * world, ended.stderr
    found = {job.name: [run(job, folder, 1)] for job in ALONE}

    def ranks_of(name: str) -> list[dict[str, Any]]:
        if name not in found:
            files = sorted(folder.glob(f"{name}.?.pt"))
            found[name] = [torch.load(file, weights_only=False) for file in files]
        return found[name]

    ranks_of.folder = folder
    return ranks_of


def with_values(rows):
    """Return rows with a weight, a label probability and a margin each."""
    for number, name in enumerate(COLUMNS["row_columns"], start=1):
        rows = rows.add_column(name, [((row * number * 7) % 10 + 0.3) / 11 for row in range(len(rows))])
    return rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "alone", "ranks"),
    [
        ("ddp-2", "one", 2),
        ("ddp-4", "one", 4),
        ("fsdp-2", "one", 2),
        ("fsdp-4", "one", 4),
        ("ddp-2-sft", "one-sft", 2),
        ("ddp-4-sft", "one-sft", 4),
        ("fsdp-2-sft", "one-sft", 2),
        ("ddp-2-kto", "one-kto", 2),
        ("fsdp-2-kto", "one-kto", 2),
        ("ddp-2-lora", "one-lora", 2),
        ("fsdp-2-lora", "one-lora", 2),
        ("ddp-2-kl", "one-kl", 2),
        ("fsdp-2-kl", "one-kl", 2),
        ("ddp-2-columns", "one-columns", 2),
        ("fsdp-2-lora-kl", "one-lora-kl", 2),
        ("ddp-2-rope", "one-rope", 2),
        ("fsdp-2-rope", "one-rope", 2),
        ("ddp-2-states", "one-states", 2),
        ("fsdp-2-states", "one-states", 2),
        ("fsdp-2-checkpointed-states", "one-states", 2),
        ("fsdp-2-hybrid", "one-hybrid", 2),
    ],
)
def test_all_ranks_together_train_like_one_process(name, alone, ranks, done):
    (expected,) = done(alone)
    found = done(name)
    assert len(found) == ranks
    steps = STEPS if alone in ("one", "one-sft") else STEPS // 2
    shares, tolerance = ("cached", 1e-5) if name.endswith(("states", "hybrid")) else ("packed", 1e-9)
    for rank in found:
        if name.startswith("fsdp"):
            assert (rank["type"], rank["wrapper"], rank["sharded"]) == (DistributedType.FSDP, [FSDPModule], {True})
        else:
            wrapped = (DistributedType.MULTI_CPU, [DistributedDataParallel], {False})
            assert (rank["type"], rank["wrapper"], rank["sharded"]) == wrapped
        assert (rank["policy"].path, rank["policy"].fused_head) == (shares, True)
        assert len(rank["policy"].reasons) == (shares == "cached")
        assert len(rank["gradients"]) == len(rank["points"]) == steps
        assert rank["points"] == pytest.approx(expected["points"], abs=tolerance)
        assert any(rank["points"]) == name.endswith("kto")
        for step, gradients in enumerate(rank["gradients"]):
            for gradient, other in zip(gradients, expected["gradients"][step], strict=True):
                torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance)
        for stage in ("before", "after"):
            for figure, values in rank[stage].items():
                if name.endswith(("kto", "lora", "kl")) and (stage, figure) == ("before", "rewards/accuracies"):
                    continue  # both rewards are 0 up to rounding, so their order is arbitrary
                assert values.tolist() == pytest.approx(expected[stage][figure].tolist(), abs=tolerance)
        assert rank["evaluation"]["eval_loss"] == pytest.approx(expected["evaluation"]["eval_loss"], abs=tolerance)
    shares = zip(*(rank["seen"] for rank in found), strict=True)
    seen = [sorted(row for rows in share for row in rows) for share in shares]
    assert seen == [sorted(rows) for rows in expected["seen"]]
    assert sorted(row for step in seen[:3] for row in step) == list(range(ROWS))
    for (loss, norm), (other, other_norm) in zip(found[0]["log"], expected["log"], strict=True):
        assert (loss, norm) == (pytest.approx(other, abs=tolerance), pytest.approx(other_norm, rel=tolerance))
    assert_same_weights(done.folder / name, done.folder / alone, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-of-ddp-2", "ddp-4-of-2", "one-of-fsdp-2", "fsdp-4-of-fsdp-2", "fsdp-4-of-ddp-2"])
def test_a_checkpoint_continues_on_a_different_number_of_processes(name, done):
    """Saved by two processes; every continuation equals a single-process run without interruption."""
    assert_same_weights(done.folder / name, done.folder / "one", 1e-9)
    (expected,) = done("one")
    assert len(done(name)[0]["gradients"]) == STEPS - 4
    assert done(name)[0]["log"][-1][0] == pytest.approx(expected["log"][-1][0], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-lora-of-fsdp-2", "fsdp-2-lora-of-ddp-2"])
def test_an_adapter_checkpoint_continues_with_or_without_sharding(name, done):
    assert_same_weights(done.folder / name, done.folder / "one-lora", 1e-9)
    assert len(done(name)[0]["gradients"]) == STEPS // 2 - 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["ddp-2/checkpoint-4", "ddp-2-lora/checkpoint-2"])
def test_checkpoints_of_sharded_runs_have_the_usual_format(checkpoint, done):
    checkpoints = [done.folder / checkpoint.replace("ddp", kind) for kind in ("ddp", "fsdp")]
    names = [sorted(path.name for path in checkpoint.iterdir()) for checkpoint in checkpoints]
    assert names[0] == names[1]
    assert_same_weights(*checkpoints, 1e-9)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_complete(done):
    sharded = done.folder / "fsdp-2" / "checkpoint-4"
    check_checkpoint(sharded, hf.AutoModelForCausalLM.from_pretrained(sharded))


@pytest.mark.slow
def test_sharded_bf16_metrics_are_not_rounded(done):
    (expected,) = done("one")
    for rank in done("fsdp-2-bf16"):
        assert rank["type"] == DistributedType.FSDP
        assert (rank["policy"].path, rank["policy"].fused_head) == ("packed", True)
        losses = torch.tensor(rank["before"]["loss"])
        assert losses.tolist() == pytest.approx(expected["before"]["loss"].tolist(), rel=0.1, abs=0.1)
        assert not torch.equal(losses.bfloat16().double(), losses)
        assert rank["after"]["loss"].mean() < rank["before"]["loss"].mean() / 2
        assert_same_weights(done.folder / "fsdp-2-bf16", Path(rank["best"]), 0)
    assert {tensor.dtype for tensor in weights(done.folder / "fsdp-2-bf16").values()} == {torch.float32}


@pytest.mark.slow
def test_every_rank_names_the_row_with_a_non_finite_loss(done):
    first, second = done("ddp-2-nan")
    assert first == second
    assert "the loss is not finite; rows: made up:18;" in first["error"]


@pytest.mark.slow
def test_a_changed_number_of_processes_is_reported(done, caplog):
    settings = {"learning_rate": 0.0, "max_steps": 4}
    run(Job("said", settings=settings, resume="ddp-2/checkpoint-4"), done.folder, 1)
    assert "2 processes and continues on 1" in caplog.text
