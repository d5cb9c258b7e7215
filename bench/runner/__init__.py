"""Execution of runs: launching sweeps, executing a run, and repeating a recorded one."""
