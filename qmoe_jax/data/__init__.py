"""From text to samples and batches: tokenization, span corruption, padding."""

from qmoe_jax.data.batching import Batch as Batch
from qmoe_jax.data.batching import batches as batches
from qmoe_jax.data.errors import TextError as TextError
from qmoe_jax.data.examples import Example as Example
from qmoe_jax.data.examples import Examples as Examples
from qmoe_jax.data.examples import checked_examples as checked_examples
from qmoe_jax.data.samples import samples as samples
from qmoe_jax.data.samples import segments as segments
from qmoe_jax.data.samples import short_texts as short_texts
from qmoe_jax.data.sentinels import Sentinels as Sentinels
from qmoe_jax.data.span_corruption import span_corruption as span_corruption
from qmoe_jax.data.text import read_documents as read_documents
from qmoe_jax.data.tokenizer import Tokenizer as Tokenizer
from qmoe_jax.data.tokenizer import find_tokenizer as find_tokenizer
