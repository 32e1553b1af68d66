"""The command line `qmoe`: one module per command, which parses, calls the public API and prints."""

from qmoe_jax.cli.app import main as main
