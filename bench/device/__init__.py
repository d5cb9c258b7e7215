"""The hardware: devices, clocks, memory, energy counters, and the load of the machine."""
