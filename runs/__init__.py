"""What a run has on disk: its folder, checkpoints, mirror, and Colab."""
