"""Attention and predictions of a trained run: traces, measures, charts, text, interventions."""
