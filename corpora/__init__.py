"""Sentence pairs: files, the Hub and the embedded toy grammar."""
