"""Text to tokens: tokenizers, prepared corpora, batches and needle tasks."""
