"""Interpretation of a trained run: attention traces, measures, interventions, charts, offline pages and text."""
