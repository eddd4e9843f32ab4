"""Verify on a GPU what a CPU cannot run: attention kernels, and packed models in half precision.

Every check compares with a simpler reference: a kernel with attention computed by its definition, the packed path with
the model's own forward, one sequence at a time. Run from the repository root::

    python -m benchmarks.verify_cuda

With ``--device cpu``, checks that need a GPU are reported as skipped. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal
from unittest import mock

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.setting import Setting, build_model
from benchmarks.small_models import KINDS, build, comparisons
from simpo.packing import attention as kernels
from simpo.packing.attention import AttentionStyle, by_segment
from simpo.packing.layout import AttentionLayout, PackedBatch, Span
from simpo.packing.model import choose_path, policy_logprobs, prepare_policy
from simpo.packing.selfcheck import naive_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUT = (Span(300, (77, 201)), Span(5, (130, 1, 64)), Span(64, (64,)))
# largest error of a kernel relative to the largest entry; half precision has about three digits
KERNEL_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
# a packed model's error relative to fp32 may be FACTOR times the naive forward's in the same dtype, plus SLACK
FACTOR, SLACK = 2.0, {"fp32": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    outcome: Literal["passed", "FAILED", "skipped"]
    detail: str


def main() -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(prog="verify_cuda", description="Verify kernels and packed models.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=list(CHECKS), help="default: all")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("verify_cuda: PyTorch finds no CUDA GPU; use --device cpu for a dry run", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU (CUDA is not verified)"
    print(f"Verification on {where}, torch {torch.__version__}", flush=True)
    outcomes = []
    for check in chain.from_iterable(CHECKS[name](device) for name in options.only):
        print(f"{check.outcome}: {check.name} ({check.detail})", flush=True)  # flushed in case a time limit strikes
        outcomes.append(check.outcome)
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "FAILED", "skipped")))
    return int("FAILED" in outcomes)


def kernel_checks(device: str) -> Iterator[Check]:
    """Check both kernels, in both dtypes, for every attention style they are used for."""
    styles = {
        "plain": AttentionStyle(0.125),
        "window": AttentionStyle(0.125, window=100),
        "softcap": AttentionStyle(0.125, softcap=5.0),
        "softcap and window": AttentionStyle(0.125, window=100, softcap=5.0),
        "sinks": AttentionStyle(0.125, sinks=torch.linspace(-1, 1, 8, device=device)),
    }
    for dtype in DTYPES:
        for name, style in styles.items():
            yield _kernel_check("flex", name, style, dtype, device)
            if style.plain:
                yield _kernel_check("varlen", name, style, dtype, device)


def _kernel_check(kernel: str, style_name: str, style: AttentionStyle, dtype: str, device: str) -> Check:
    name = f"{kernel} {style_name} {dtype}"
    if device != "cuda":
        return Check(name, "skipped", "needs CUDA")
    if kernel == "varlen" and dtype == "fp32":
        return Check(name, "skipped", "the kernel supports half precision only")
    try:
        errors = _kernel_errors(getattr(kernels, kernel), style, DTYPES[dtype], device)
    except Exception as error:  # whatever a kernel raises is the result
        return Check(name, "FAILED", f"{type(error).__name__}: {_first_line(error)}")
    passed = all(error <= KERNEL_TOLERANCE[dtype] for error in errors.values())  # False for NaN
    details = ", ".join(f"{key} {error:.1e}" for key, error in errors.items())
    return Check(name, "passed" if passed else "FAILED", details)


def _kernel_errors(kernel: kernels.Kernel, style: AttentionStyle, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return the largest error of the output and of each gradient, relative to its largest entry."""
    layout = AttentionLayout(LAYOUT).to(torch.device(device))
    torch.manual_seed(0)
    exact = [torch.randn(1, n, layout.total, 64, device=device, requires_grad=True) for n in (8, 2, 2)]
    weight = torch.randn(1, layout.total, 8, 64, device=device)
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    sinks = None if style.sinks is None else style.sinks.to(dtype)
    expected = _outputs(by_segment, exact, layout, style, weight)
    found = _outputs(kernel, given, layout, replace(style, sinks=sinks), weight)
    return {
        name: ((a - b.float()).abs().max() / a.abs().max()).item()
        for name, a, b in zip(("output", "d_query", "d_key", "d_value"), expected, found, strict=True)
    }


def _outputs(
    kernel: kernels.Kernel, inputs: list[Tensor], layout: AttentionLayout, style: AttentionStyle, weight: Tensor
) -> list[Tensor]:
    output = kernel(*inputs, layout, style)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


@dataclass(frozen=True)
class Result:
    """Log-probabilities ``[S]``, and the flattened fp32 gradient of their weighted sum with respect to all weights."""

    logprobs: Tensor
    gradient: Tensor


def model_checks(device: str) -> Iterator[Check]:
    """Check the packed path of every small model in both dtypes, with and without gradient checkpointing."""
    batch = PackedBatch.build(comparisons(device)).to(device)
    for kind in KINDS:
        truth = _naive(kind, "fp32", batch)
        for dtype in DTYPES:
            naive = truth if dtype == "fp32" else _naive(kind, dtype, batch)
            plain, used = _packed(kind, dtype, batch, checkpointing=False)
            yield _model_check(f"{kind} {dtype}", truth, naive, plain, dtype, used)
            checkpointed, used = _packed(kind, dtype, batch, checkpointing=True)
            yield _model_check(f"{kind} {dtype}, checkpointed", truth, naive, checkpointed, dtype, used)
            yield _expected_kernel(kind, dtype, used, device)


def compiled_checks(device: str) -> Iterator[Check]:
    """Check a model with layers compiled once for all lengths, as with ``torch_compile``."""
    name = "llama bf16, compiled"
    if device != "cuda":
        yield Check(name, "skipped", "needs CUDA")
        return
    batch = PackedBatch.build(comparisons(device)).to(device)
    truth, naive = (_naive("llama", dtype, batch) for dtype in ("fp32", "bf16"))
    model = build("llama", torch.bfloat16, batch.input_ids.device)
    prepare_policy(model)
    choose_path(model, batch)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
    found = _result(model, policy_logprobs(model, batch, path="packed"))
    yield _model_check(name, truth, naive, found, "bf16", "compiled")


def large_checks(device: str) -> Iterator[Check]:
    """Check that an 8B model in bf16 (a toy model on a CPU) passes the self-check and takes the packed path."""
    setting = Setting("", model="8b" if device == "cuda" else "toy", weights="bf16", device=device)
    model = build_model(setting)
    path = choose_path(model, PackedBatch.build(comparisons(device, setting.vocabulary)).to(device))
    yield Check(f"self-check of {setting.model} bf16", "passed" if path == "packed" else "FAILED", f"{path} path")


CHECKS = {"kernels": kernel_checks, "models": model_checks, "compiled": compiled_checks, "large": large_checks}


def _naive(kind: str, dtype: str, batch: PackedBatch) -> Result:
    model = build(kind, DTYPES[dtype], batch.input_ids.device)
    prepare_policy(model)
    return _result(model, naive_logprobs(model, batch))


def _packed(kind: str, dtype: str, batch: PackedBatch, *, checkpointing: bool) -> tuple[Result, str]:
    """Return the packed path's result and the attention kernels it used."""
    model = build(kind, DTYPES[dtype], batch.input_ids.device)
    model.train()  # checkpointing only works in training mode; the models have no dropout
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    used: set[str] = set()
    choose = kernels.choose_kernel

    def spy(*args: object) -> kernels.Kernel | None:
        kernel = choose(*args)
        used.add("segments" if kernel is None else kernel.__name__)
        return kernel

    with mock.patch.object(kernels, "choose_kernel", spy):
        found = _result(model, policy_logprobs(model, batch, path="packed"))
    return found, ", ".join(sorted(used)) or "segments"


def _result(model: torch.nn.Module, logprobs: Tensor) -> Result:
    weight = torch.linspace(-1, 1, len(logprobs), device=logprobs.device)
    gradients = torch.autograd.grad((logprobs * weight).sum(), list(model.parameters()))
    return Result(logprobs.detach(), torch.cat([gradient.flatten().float() for gradient in gradients]))


def _model_check(name: str, truth: Result, naive: Result, found: Result, dtype: str, used: str) -> Check:
    """The packed result must be about as close to the naive fp32 result as the naive forward in the same dtype."""
    passed, details = True, []
    for part in ("logprobs", "gradient"):
        exact = getattr(truth, part)
        mine, theirs = (((getattr(r, part) - exact).norm() / exact.norm()).item() for r in (found, naive))
        passed &= mine <= FACTOR * theirs + SLACK[dtype]  # False for NaN
        details.append(f"{part} {mine:.1e} (naive {theirs:.1e})")
    return Check(name, "passed" if passed else "FAILED", f"{', '.join(details)}; {used}")


def _expected_kernel(kind: str, dtype: str, used: str, device: str) -> Check:
    """Fail if the expected kernel was not used: training falls back without an error if a kernel fails its check."""
    name = f"{kind} {dtype}, kernel"
    if device != "cuda":
        return Check(name, "skipped", "needs CUDA")
    expected = "flex" if kind == "gemma2" else "varlen" if dtype == "bf16" else "segments"
    return Check(name, "passed" if used == expected else "FAILED", f"{used} (expected {expected})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:80]


if __name__ == "__main__":
    sys.exit(main())
