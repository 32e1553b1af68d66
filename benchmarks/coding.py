"""Measures how fast ternary digits are encoded and decoded, and the bits per weight that they take.

    python -m benchmarks.coding --threads 2 --json benchmarks/results/coding.json

Takes about a minute. Prints million weights per second for one c-2048 expert matrix (2,080 x 6,144) at P(0) =
.885, compared with a plain NumPy encoder that walks the trie for all rows at once; then bits per weight
without row headers, compared with the entropy, for five sparsities.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks import measuring
from benchmarks.samples import random_digits

SPARSITIES = (0.80, 0.85, 0.885, 0.91, 0.95)
TUNSTALL_BITS = (8, 10, 12, 16)


def numpy_encode(digits: np.ndarray, codebook: Any) -> np.ndarray:
    """Encode in plain NumPy, for comparison: a step of all rows at a time, scattered into a padded array."""
    trie, step = codebook.trie, codebook.symbol_digits
    symbols = (digits.reshape(len(digits), -1, step) * 3 ** np.arange(step)).sum(-1)
    rows = np.arange(len(digits))
    codes = np.zeros((len(digits), symbols.shape[1] + 1), codebook.code_dtype)
    node, count = np.zeros(len(digits), np.int64), np.zeros(len(digits), np.int64)
    for symbol in symbols.T:
        child = trie.child[node, symbol]
        ended = child < 0
        codes[rows[ended], count[ended]] = trie.code[node[ended]]
        count += ended
        node = np.where(ended, trie.child[0, symbol], child)
    codes[rows, count] = trie.last_code[node]
    return codes[np.arange(codes.shape[1]) <= count[:, None]]


def speeds(rows: int, width: int, rounds: int) -> list[dict[str, Any]]:
    from qmoe_jax.coding import decode, encode, tunstall_codebook, upstream_codebook

    digits = random_digits((rows, width))
    table = []
    for codebook in (tunstall_codebook(), upstream_codebook()):
        encoded = encode(digits, codebook)
        assert (decode(encoded, codebook, width) == digits).all()
        assert (numpy_encode(digits, codebook) == encoded.codes).all()
        contenders = {
            "encode": lambda i, c=codebook: encode(digits, c),
            "encode, reference": lambda i, c=codebook: encode(digits, c, backend="reference"),
            "encode, plain NumPy": lambda i, c=codebook: numpy_encode(digits, c),
            "decode": lambda i, c=codebook, e=encoded: decode(e, c, width),
            "decode, reference": lambda i, c=codebook, e=encoded: decode(e, c, width, backend="reference"),
        }
        for name, seconds in measuring.best_seconds(contenders, rounds).items():
            speed = round(digits.size / seconds / 1e6, 1)
            table.append({"codebook": codebook.name, "operation": name, "million_weights_per_second": speed})
    return table


def rates(rows: int, width: int) -> list[dict[str, Any]]:
    from qmoe_jax.coding import encode, entropy_bits, tunstall_codebook, upstream_codebook

    table = []
    for p_zero in SPARSITIES:
        digits = random_digits((rows, width), p_zero)
        other = (1 - p_zero) / 2
        row = {"p_zero": p_zero, "entropy": entropy_bits(np.array([p_zero, other, other]))}
        row["upstream 16"] = 16 * len(encode(digits, upstream_codebook()).codes) / digits.size
        for bits in TUNSTALL_BITS:
            codes = encode(digits, tunstall_codebook(p_zero, bits)).codes
            row[f"tunstall {bits}"] = bits * len(codes) / digits.size
        table.append({key: round(value, 4) for key, value in row.items()})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="2080x6144", help="rows x columns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="stored with the result: what else the machine was doing")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    measuring.use_threads(options.threads)
    rows, width = map(int, options.shape.split("x"))
    result = {"machine": measuring.machine(options.threads), "note": options.note, "shape": options.shape}
    result["speeds"] = speeds(rows, width, options.rounds)
    for row in result["speeds"]:
        print(
            f"{row['codebook']:20} {row['operation']:22} {row['million_weights_per_second']:8.1f} M weights/s"
        )
    result["bits_per_weight"] = rates(rows, width)
    print("\n" + "  ".join(f"{name:>12}" for name in result["bits_per_weight"][0]))
    for row in result["bits_per_weight"]:
        print("  ".join(f"{value:12.3f}" for value in row.values()))
    measuring.write_json(options.json, result)


if __name__ == "__main__":
    main()
