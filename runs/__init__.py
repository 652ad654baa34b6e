"""The files of a run: folder, checkpoints and mirror; setup on Colab."""
