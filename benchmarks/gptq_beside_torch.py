"""Times GPTQ of expert groups beside plain PyTorch on the same weights and Hessians, taking turns.

    python -m benchmarks.gptq_beside_torch

Needs torch (pip install 'qmoe-jax[benchmarks]'); takes three minutes on two cores. Prints for each shape the
experts per second of `qmoe_jax.quantization.gptq`, of the peer (`benchmarks/torch_peer.py`) with weights as
the papers have them and with contiguous columns, the ratio to the faster of these, the share of the time that
is factorization, and the share of equal digits: at least .99, since a weight near a rounding border may fall
on its other side.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np

from benchmarks import measuring
from benchmarks.gptq import problem

# experts at once, out, in: both matrices of switch-base-128 and of switch-c-2048
SHAPES = ((4, 768, 3072), (2, 3072, 768), (2, 6144, 2080), (1, 2080, 6144))


def compare(shape: tuple[int, int, int], rounds: int, threads: int) -> dict[str, Any]:
    """Return the speed of both on one shape."""
    import jax

    torch, torch_peer = load_peer()
    from qmoe_jax.quantization import factorize, gptq, ternary_grid

    torch.set_num_threads(threads)
    experts, rows, width = shape
    w, hessian = problem(experts, rows, width, min(2 * width, 4096))
    device_w, device_hessian = jax.device_put((w, hessian))
    torch_w, torch_hessian = torch.from_numpy(w), torch.from_numpy(hessian)
    grid = ternary_grid()
    peer = functools.partial(torch_peer.gptq, torch_w, torch_hessian)
    seconds = measuring.best_seconds(
        {
            "ours": lambda i: jax.block_until_ready(gptq(device_w, device_hessian, grid)),
            "peer": lambda i: peer(),
            "peer_transposed": lambda i: peer(transposed=True),
            "factorization": lambda i: jax.block_until_ready(factorize(device_hessian)),
            "peer_factorization": lambda i: torch_peer.upper_factor(torch_hessian, 0.1),
        },
        rounds,
    )
    ours, theirs = gptq(device_w, device_hessian, grid), peer()
    equal = float((np.asarray(ours.digits) == theirs.digits.numpy()).mean())
    assert equal >= 0.99, f"{shape}: expected the peer's digits but for ties, found {equal:.4f} of them"
    best_peer = min(seconds["peer"], seconds["peer_transposed"])
    return {
        "experts_at_once": experts,
        "out": rows,
        "in": width,
        "seconds": seconds,
        "experts_per_second": experts / seconds["ours"],
        "peer_experts_per_second": experts / best_peer,
        "ratio": best_peer / seconds["ours"],
        "ratio_as_in_the_papers": seconds["peer"] / seconds["ours"],
        "digits_equal": equal,
    }


def load_peer() -> tuple[Any, Any]:
    """Return the modules of torch and of the peer; end the program with advice where torch is missing."""
    try:
        import torch

        from benchmarks import torch_peer
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit("the peer needs torch: pip install 'qmoe-jax[benchmarks]', or --no-peer") from error
    return torch, torch_peer


def line(row: dict[str, Any]) -> str:
    """Return a row of the printed table."""
    seconds = row["seconds"]
    return (
        f"{row['experts_at_once']} x {row['out']:,} x {row['in']:,}:"
        f" {row['experts_per_second']:.2f} experts/s ({seconds['factorization'] / seconds['ours']:.0%}"
        f" factorization), PyTorch {row['experts_at_once'] / seconds['peer']:.2f} as in the papers,"
        f" {row['experts_at_once'] / seconds['peer_transposed']:.2f} transposed: {row['ratio']:.1f} x the"
        f" faster; {row['digits_equal']:.2%} of the digits equal"
    )


def run(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Compare at every shape, and print a line for each."""
    rows = []
    for shape in SHAPES:
        rows.append(compare(shape, rounds, threads))
        print(line(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    measuring.use_threads(options.threads)
    machine = measuring.machine(options.threads)
    rows = run(options.rounds, options.threads)
    measuring.write_json(options.json, {"machine": machine, "note": options.note, "speeds": rows})


if __name__ == "__main__":
    main()
