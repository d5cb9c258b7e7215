"""The hardware: devices, clocks, memory, energy counters, and what else the machine does."""
