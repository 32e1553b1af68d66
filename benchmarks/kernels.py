"""Compares packed products on a GPU with dense ones and the bandwidth limit, and tunes every launch choice.

    python -m benchmarks.kernels             # on the device
    python -m benchmarks.kernels --rehearse  # anywhere: tiny shapes in interpret mode, to check the script

Takes `--minutes` (9), most informative loads first, and prints one JSON object per load and a table at the
end. Writes kernels-<device>.json (to --json, $OUT or benchmarks/results), and beside it the tuning table to
commit as pallas_kernels/data/<device>.json. Experts take turns, so that none is in the L2 cache; every
product is checked against float64. A time is the slope between a program of many launches and one of few. The
limit is the codewords' bytes over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import dense_peer, gpu
from benchmarks.samples import P_ZERO, TernaryMatrix, random_ternary
from pallas_kernels import packed_matmul, tuning
from pallas_kernels.matmul import routes
from pallas_kernels.matmul.pallas import gather, separate, tensor_core

SHAPES = ("2080x6144", "6144x2080", "768x3072", "3072x768", "1024x4096", "4096x1024")
BUSY_EXPERTS = 8
NEVER = 10**9
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
SEPARATES = [
    separate.Config(*c) for c in ((4, 32, 4), (8, 32, 4), (2, 32, 2), (1, 32, 1), (1, 64, 1), (1, 128, 1))
]
GATHERS = [gather.Config(*c) for c in ((32, 8, 1), (32, 16, 1), (16, 16, 1), (32, 32, 1))]
TENSOR_CORES = {
    "bfloat16": [
        tensor_core.Config(*c)
        for c in (
            (64, 16, 16, 32, 4, 2, 264),
            (64, 16, 64, 32, 8, 2, 264),
            (64, 32, 64, 64, 8, 3, 264),
            (64, 32, 64, 64, 8, 3, 132),
            (64, 32, 128, 64, 8, 3, 264),
            (64, 16, 128, 32, 8, 2, 264),
        )
    ],
    "float32": [tensor_core.Config(64, 32, lanes, 32, 4, 3, 264) for lanes in (16, 64)],
}
ROUTES = {
    "separate": routes.RouteConfig(NEVER, NEVER),
    "gather": routes.RouteConfig(0, NEVER),
    "tensor_core": routes.RouteConfig(0, 0),
}


class Run:
    """One run of the benchmark: its size, its deadline and its results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rehearsal: bool = options.rehearse
        self.counts = (1, 2) if self.rehearsal else (10, 60)
        self.deadline = time.monotonic() + options.minutes * 60
        self.choices: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.bytes_per_second = gpu.copy_bandwidth(1 << 14 if self.rehearsal else 1 << 30)

    def seconds(self, launch: Any, operands: list[Any], shared: Any) -> float:
        return gpu.slope_seconds(launch, operands, shared, self.counts, 1 if self.rehearsal else 5)

    def tune(
        self, problem: tuning.Problem, candidates: list[Any], timed: Any, *, keep: bool = True
    ) -> dict[str, Any]:
        """Return the entry of the fastest candidate (of two in a rehearsal); `keep` adds it to the table."""
        entry = tuning.autotune(problem, candidates[:2] if self.rehearsal else candidates, timed)
        if keep:
            self.choices.append(entry)
        return entry


def codebooks(rehearsal: bool) -> dict[str, Any]:
    from qmoe_jax.coding import tunstall_codebook, upstream_codebook

    books = {"tunstall-8": tunstall_codebook(P_ZERO), "tunstall-12": tunstall_codebook(P_ZERO, 12)}
    return books if rehearsal else books | {"upstream-16": upstream_codebook()}


def indices(loads: list[int], experts: int) -> list[Any]:
    """Return expert indices [t] of successive launches: expert j of each turn gets `loads[j]` tokens."""
    turns = max(1, experts // len(loads))
    expert = lambda turn: np.repeat(np.arange(len(loads)) + turn * len(loads), loads) % experts
    shuffle = np.random.default_rng(0).permutation(sum(loads))
    return [jnp.asarray(expert(turn)[shuffle], jnp.int32) for turn in range(turns)]


def check(what: str, found: Any, x: Any, weights: np.ndarray) -> None:
    error = gpu.relative_error(found, np.asarray(x, np.float64) @ weights.T)
    if not error < BOUND[x.dtype.name]:
        raise AssertionError(f"{what}: expected a relative error below {BOUND[x.dtype.name]}, found {error}")


def one_token(run: Run, shape: str, expert: TernaryMatrix, books: dict[str, Any]) -> None:
    """Measure one token: every codebook and launch choice, dense bfloat16 and float32, the other backend."""
    x = {
        dtype: jnp.asarray(np.random.default_rng(1).standard_normal((1, expert.digits.shape[1])), dtype)
        for dtype in ("bfloat16", "float32")
    }
    row: dict[str, Any] = {"shape": shape, "tokens_per_expert": 1, "load": "one expert", "microseconds": {}}
    candidates = SEPARATES  # the first codebook tries all, the others its winner
    for name, book in books.items():
        packed = gpu.pack_copies(
            expert, book, 4 if run.rehearsal else gpu.cold_count(expert.digits.size // 10)
        )
        index = indices([1], packed.num_experts)
        for dtype in ("bfloat16", "float32") if name == "tunstall-8" else ("bfloat16",):

            def timed(config: Any, packed: Any = packed, dtype: str = dtype, index: Any = index) -> float:
                overrides = routes.Overrides(route=ROUTES["separate"], separate=config)
                launch = functools.partial(routes.packed_matmul, overrides=overrides, interpret=run.rehearsal)
                check(f"separate {config}", launch(packed, x[dtype], index[0]), x[dtype], expert.weights)
                return run.seconds(lambda s, i: launch(*s, i), index, (packed, x[dtype]))

            entry = run.tune(tuning.Problem.of("separate", packed, dtype), candidates, timed)
            candidates = [separate.Config(**entry["config"])]
            row["microseconds"][f"{name} {dtype}"] = entry["microseconds"]
        if name == "tunstall-8":
            row["jax_triton"] = other_backend(run, packed, x["bfloat16"], index)
            code_bytes = int(packed.row_offsets[0, -1]) * packed.codes.dtype.itemsize
    dense_one_token(run, expert, x, row)
    finish(run, row, expert, code_bytes, 1, "tunstall-8 bfloat16")


def other_backend(run: Run, packed: Any, x: Any, index: list[Any]) -> Any:
    """Return the microseconds of the same product through jax-triton, or why it does not run here."""
    launch = functools.partial(packed_matmul, backend="jax_triton")
    try:
        jax.block_until_ready(launch(packed, x, index[0]))
        return round(1e6 * run.seconds(lambda s, i: launch(*s, i), index, (packed, x)), 3)
    except Exception as error:  # of any kind, from versions that do not fit: it is reported in the result
        return f"{type(error).__name__}: {error}"[:300]


def dense_one_token(run: Run, expert: TernaryMatrix, x: dict[str, Any], row: dict[str, Any]) -> None:
    for dtype, tokens in x.items():
        count = 2 if run.rehearsal else gpu.cold_count(expert.digits.size * 2, most=48)
        weights = [jnp.asarray(expert.weights, dtype) + 0 for _ in range(count)]
        product = lambda tokens, w: jnp.dot(tokens, w.T)
        seconds = run.seconds(product, weights, tokens)
        row["microseconds"][f"dense {dtype}"] = round(1e6 * seconds, 3)


def many_tokens(run: Run, shape: str, expert: TernaryMatrix, book: Any, loads: list[int], dtype: str) -> None:
    """Measure tokens over eight experts: each route of a product, and the dense grouped product."""
    total, busy = sum(loads), len(loads)
    packed = gpu.pack_copies(expert, book, busy * (1 if run.rehearsal else 8))
    index = indices(loads, packed.num_experts)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((total, expert.digits.shape[1])), dtype)
    row: dict[str, Any] = {
        "shape": shape,
        "tokens_per_expert": total // busy,
        "load": "even" if len(set(loads)) == 1 else f"uneven: {loads}",
        "dtype": dtype,
        "microseconds": {},
    }
    fitting = lambda configs, least: [c for c in configs if c.lanes <= max(least, 2 * total // busy)]
    candidates = {
        "separate": SEPARATES[:1],
        "gather": fitting(GATHERS, 8)[-3:],
        "tensor_core": fitting(TENSOR_CORES[dtype], 16)[-3:],
    }
    for way, configs in candidates.items():
        if (way == "separate" and total > 32 * busy) or (way == "gather" and total > 128 * busy):
            continue  # far beyond where it could win

        def timed(config: Any, way: str = way) -> float:
            overrides = routes.Overrides(route=ROUTES[way], **{way: config})
            launch = functools.partial(routes.packed_matmul, overrides=overrides, interpret=run.rehearsal)
            check(f"{way} {config}", launch(packed, x, index[0]), x, expert.weights)
            return run.seconds(lambda s, i: launch(*s, i), index, (packed, x))

        # Tokens per expert are counted over the experts that have any, as if the whole layer had such a load.
        problem = tuning.Problem.of(way, packed, dtype, total * packed.num_experts // busy)
        entry = run.tune(problem, configs, timed, keep=row["load"] == "even")
        row["microseconds"][way], row[way] = entry["microseconds"], entry["config"]
    dense_many(run, expert, x, loads, row)
    code_bytes = int(packed.row_offsets[0, -1]) * packed.codes.dtype.itemsize * busy
    best = min((way for way in candidates if way in row["microseconds"]), key=row["microseconds"].get)
    finish(run, row, expert, code_bytes, total, best)


def dense_many(run: Run, expert: TernaryMatrix, x: Any, loads: list[int], row: dict[str, Any]) -> None:
    """Measure our grouped product and, for even loads, the library's batched one on tokens by expert."""
    experts = len(loads) * (1 if run.rehearsal else 2)
    weights = jnp.stack([jnp.asarray(expert.weights, jnp.bfloat16)] * experts)
    x = x.astype(jnp.bfloat16)
    lanes = min(64, max(16, 1 << (max(loads) - 1).bit_length()))
    launch = functools.partial(dense_peer.grouped_product, lanes=lanes, interpret=run.rehearsal)
    index = indices(loads, experts)
    check("dense grouped", launch(weights, x, index[0]), x, expert.weights)
    seconds = run.seconds(lambda s, i: launch(*s, i), index, (weights, x))
    row["microseconds"]["dense bfloat16, grouped"] = round(1e6 * seconds, 3)
    if len(set(loads)) == 1:
        halves = [weights[i : i + len(loads)] + 0 for i in range(0, experts, len(loads))]
        ordered = x.reshape(len(loads), loads[0], -1)
        batched = lambda tokens, w: jnp.einsum("eti,eoi->eto", tokens, w)
        seconds = run.seconds(batched, halves, ordered)
        row["microseconds"]["dense bfloat16, batched"] = round(1e6 * seconds, 3)


def finish(
    run: Run, row: dict[str, Any], expert: TernaryMatrix, code_bytes: int, tokens: int, ours: str
) -> None:
    """Add the limit and the speed-up to the row, store it and print it."""
    times = row["microseconds"]
    dense = min(value for name, value in times.items() if name.startswith("dense bfloat16"))
    row["limit_microseconds"] = round(1e6 * code_bytes / run.bytes_per_second, 3)
    row["best"] = ours
    row["speedup_over_dense_bfloat16"] = round(dense / times[ours], 2) if times[ours] > 0 else None
    run.rows.append(row)
    print(json.dumps(row), flush=True)


def first_load(rows: list[dict[str, Any]], ways: tuple[str, ...]) -> int:
    """Return the tokens per expert from which one of `ways` was the fastest."""
    return min((row["tokens_per_expert"] for row in rows if row["best"] in ways), default=NEVER)


def crossovers(run: Run) -> None:
    """Add to the tuning table, per shape and dtype, the tokens per expert where the next route is faster."""
    problems = [
        choice["problem"] for choice in run.choices if choice["problem"]["kind"] in ("gather", "tensor_core")
    ]
    keys = {tuple((problem | {"kind": "route"}).items()) for problem in problems}
    for problem in map(dict, sorted(keys)):
        key = f"{problem['rows']}x{problem['width']}", problem["dtype"], "even"
        rows = [row for row in run.rows if (row["shape"], row.get("dtype"), row["load"]) == key]
        gather, dense = first_load(rows, ("gather", "tensor_core")), first_load(rows, ("tensor_core",))
        config = {"gather_from": gather, "dense_from": max(gather, dense)}
        run.choices.append({"problem": problem, "config": config})


def gptq_rates(run: Run) -> list[dict[str, Any]]:
    """Return experts per second, and the hours computed from them for both matrices of all experts."""
    from qmoe_jax.quantization import gptq, ternary_grid

    sizes = {"base-128": (768, 3072, 8, 12 * 128), "c-2048": (2080, 6144, 2, 30 * 2048)}
    if run.rehearsal:
        sizes = {name: (32, 64, 1, experts) for name, (*_, experts) in sizes.items()}
    table = []
    for size, (d_model, d_ff, together, experts) in sizes.items():
        seconds = 0.0
        for out, width in ((d_ff, d_model), (d_model, d_ff)):
            keys = jax.random.split(jax.random.key(0), 2)
            w = jax.random.normal(keys[0], (together, out, width))
            tokens = jax.nn.relu(jax.random.normal(keys[1], (together, 2 * width, width)))
            hessian = jnp.einsum("eti,etj->eij", tokens, tokens)
            result = jax.block_until_ready(gptq(w, hessian, ternary_grid()))
            if bool(result.fallback.any()):
                raise AssertionError(f"{size}: a Hessian could not be factored")
            start = time.perf_counter()
            jax.block_until_ready(gptq(w, hessian, ternary_grid()))
            seconds += (time.perf_counter() - start) / together
        row = {"size": size, "experts_at_once": together, "experts_per_second": round(1 / seconds, 2)}
        table.append(row | {"hours_computed": round(experts * seconds / 3600, 2), "experts": experts})
        print(json.dumps(table[-1]), flush=True)
    return table


def uneven(tokens: int) -> list[int]:
    """Return a load: half of the tokens on one expert, a quarter on the next and so on; at least one each."""
    loads = [max(1, tokens * BUSY_EXPERTS >> (i + 1)) for i in range(BUSY_EXPERTS)]
    loads[0] += tokens * BUSY_EXPERTS - sum(loads)
    return loads


def measure(run: Run, options: argparse.Namespace) -> list[str]:
    """Measure all shapes and loads until the deadline, and return what was left out."""
    skipped = []
    books = codebooks(run.rehearsal)
    experts = {shape: random_ternary(*map(int, shape.split("x"))) for shape in options.shapes}
    for shape, expert in experts.items():
        if time.monotonic() > run.deadline:
            skipped.append(f"{shape}, one token")
        else:
            one_token(run, shape, expert, books)
    for tokens in options.tokens:
        for shape, expert in experts.items():
            for loads, dtype in (
                ([tokens] * BUSY_EXPERTS, "bfloat16"),
                (uneven(tokens), "bfloat16"),
                ([tokens] * BUSY_EXPERTS, "float32"),
            ):
                if time.monotonic() > run.deadline:
                    skipped.append(f"{shape}, {tokens} tokens per expert, {dtype}, {loads}")
                elif len(set(loads)) == 1 or tokens in (16, 128):
                    many_tokens(run, shape, expert, books["tunstall-8"], loads, dtype)
    return skipped


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the result as a Markdown table."""
    lines = [
        "| shape | tokens per expert | load | fastest | µs | speed-up over dense bf16 | limit, µs |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        load = row["load"].split(":")[0]
        cells = (row["shape"], row["tokens_per_expert"], f"{load} {row.get('dtype', '')}", row["best"])
        cells += (
            row["microseconds"][row["best"]],
            row["speedup_over_dense_bfloat16"],
            row["limit_microseconds"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    """Plot the speed-up over dense bfloat16 by tokens per expert, one line per shape; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for shape in dict.fromkeys(row["shape"] for row in rows):
        even = [r for r in rows if r["shape"] == shape and not r["load"].startswith("uneven")]
        even = [r for r in even if r.get("dtype", "bfloat16") == "bfloat16"]
        axes.plot(
            [r["tokens_per_expert"] for r in even],
            [r["speedup_over_dense_bfloat16"] for r in even],
            "o-",
            label=shape,
        )
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens per expert", ylabel="speed-up over dense bfloat16")
    axes.legend(title="out x in")
    figure.savefig(path)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 8, 512, 2, 16, 128, 32, 256, 4])
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="time after which no further load is started (9)",
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, interpreted, nothing measured")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    if options.rehearse:
        options.shapes, options.tokens = ["40x64"], [2, 16]
    return options


def main() -> None:
    options = parsed()
    gpu.require_gpu(options.rehearse)
    run = Run(options)
    result: dict[str, Any] = gpu.device() | {
        "copy_gigabytes_per_second": round(run.bytes_per_second / 1e9, 1)
    }
    result |= {"not_reached_in_time": measure(run, options), "products": run.rows}
    crossovers(run)
    table = markdown(run.rows)
    print(table)
    if options.rehearse:
        gptq_rates(run)
        print(
            "rehearsed: every product was correct; "
            "the times above are of interpreted kernels and are not stored"
        )
        return
    path = gpu.result_path("kernels", options.json)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    tuned = tuning.tuned_table(result["device"], run.choices)
    path.with_name(tuning.table_path(result["device"]).name).write_text(json.dumps(tuned, indent=1) + "\n")
    try:
        plot(run.rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")
    path.write_text(json.dumps(result | {"gptq": gptq_rates(run)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
