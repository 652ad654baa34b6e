"""Sentence pairs from files, the Hugging Face Hub and the built-in toy grammar."""
