"""Time and memory that observing the first batch adds to it, on ResNet-50 and ViT-B/16.

Run: `python tests/benchmarks/bench_layers.py [--device cuda] [--rounds 5] [--batch 2] [--size 224]`. Plain and observed
training steps are run in turn; the table shows medians. Memory is what the step holds when its forward is over
(activations kept for backward), measured in processes of their own on a CPU, as the growth of the resident set.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import torchvision.models as vision
from torch import Tensor, nn

from lightning_manifold_mixup.layers import observe

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet50": lambda size: vision.resnet50(),
    "vit_b_16": lambda size: vision.vit_b_16(image_size=size),
}


def step(network: nn.Module, x: Tensor, y: Tensor, observed: bool) -> tuple[Tensor, dict[str, float]]:
    """Run a forward pass and what observing it takes; the loss keeps the activations alive."""
    synchronise(x)
    start = time.perf_counter()
    with observe(network, x, y) if observed else nullcontext() as seen:
        loss = F.cross_entropy(network(x), y)
    synchronise(x)
    forward = time.perf_counter()
    if seen is not None:
        assert seen.report().sinks_found
    return loss, {"forward": forward - start, "analysis": time.perf_counter() - forward}


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    network = NETWORKS[name](args.size).to(args.device)
    x, y = (
        torch.randn(args.batch, 3, args.size, args.size, device=args.device),
        torch.arange(args.batch, device=args.device),
    )
    plain, observed = [], []
    for _ in range(args.rounds + 1):
        for times, is_observed in ((plain, False), (observed, True)):
            loss, parts = step(network, x, y, observed=is_observed)
            start = time.perf_counter()
            loss.backward()
            synchronise(x)
            times.append({**parts, "backward": time.perf_counter() - start})
    middle = {
        f"{key} {label}": median(time[key] for time in times[1:])
        for label, times in (("plain", plain), ("observed", observed))
        for key in ("forward", "analysis", "backward")
    }
    total = sum(middle[f"{part} observed"] for part in ("forward", "analysis", "backward"))
    added = total - middle["forward plain"] - middle["backward plain"]
    return {**middle, "added": added, "added / forward": added / middle["forward plain"]}


def memory(name: str, args: argparse.Namespace, observed: bool) -> float:
    """Return the mebibytes that a step holds at the end of its forward pass."""
    network = NETWORKS[name](args.size).to(args.device)
    x, y = (
        torch.randn(args.batch, 3, args.size, args.size, device=args.device),
        torch.arange(args.batch, device=args.device),
    )
    step(network, x[:1], y[:1], observed=False)[0].backward()  # gradients and libraries are there before
    gc.collect()
    before = held(args.device)
    loss, _ = step(network, x, y, observed)
    assert loss.requires_grad
    return held(args.device) - before


def held(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/statm").read_text().split()
    return int(status[1]) * 4096 / 2**20


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def memory_in_own_process(name: str, args: argparse.Namespace, observed: bool) -> float:
    command = [sys.executable, __file__, "--memory", name, *(["--observed"] if observed else [])]
    command += ["--device", args.device, "--batch", str(args.batch), "--size", str(args.size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--memory", choices=NETWORKS, help="only print the memory held by one step")
    parser.add_argument("--observed", action="store_true")
    args = parser.parse_args()
    if args.memory:
        print(memory(args.memory, args, args.observed))
        return
    print(
        f"batch {args.batch} of {args.size} x {args.size} on {args.device}, {torch.get_num_threads()} threads; ms, MiB"
    )
    print(
        f"{'':10}{'forward':>16}{'analysis':>10}{'backward':>16}{'added':>8}{'/ forward':>11}{'memory':>16}{'ratio':>7}"
    )
    for name in NETWORKS:
        times = {key: value * (1 if "/" in key else 1e3) for key, value in measure(name, args).items()}
        plain, observed = (memory_in_own_process(name, args, observed) for observed in (False, True))
        print(
            f"{name:10}"
            f"{times['forward plain']:8.0f}{times['forward observed']:8.0f}{times['analysis observed']:10.0f}"
            f"{times['backward plain']:8.0f}{times['backward observed']:8.0f}{times['added']:8.0f}"
            f"{times['added / forward']:11.2f}{plain:8.0f}{observed:8.0f}{observed / plain:7.2f}"
        )


if __name__ == "__main__":
    main()
