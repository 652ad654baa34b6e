"""Sentence pairs from files, the Hugging Face Hub and the embedded toy grammar."""
