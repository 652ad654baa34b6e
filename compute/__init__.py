"""Devices, precision, memory, threads, fast operations and distributed training."""
