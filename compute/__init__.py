"""Devices, precision, memory, fast operations and distributed training."""
