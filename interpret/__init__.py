"""Interpretation of a trained run: attention traces, measures, interventions, charts, an offline page, text views."""
