"""Quality of a model, and how far a compressed model is from its original."""

from qmoe_jax.evaluation.compare import Comparison as Comparison
from qmoe_jax.evaluation.compare import compare as compare
from qmoe_jax.evaluation.loss import Evaluation as Evaluation
from qmoe_jax.evaluation.loss import evaluate as evaluate
