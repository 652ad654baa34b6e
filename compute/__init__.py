"""Device, precision, memory, fast operations and several processes."""
