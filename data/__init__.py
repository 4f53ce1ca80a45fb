"""Text to tokens: tokenizers, prepared corpora, batches and needle tasks. Imports nothing of ours
from outside this folder."""
