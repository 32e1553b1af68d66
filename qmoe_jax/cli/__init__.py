"""The console script `qmoe`: one module a command, each of which parses, calls the public API and prints.

Nothing here imports jax before a command runs, so that help comes at once.
"""

from qmoe_jax.cli.app import main as main
