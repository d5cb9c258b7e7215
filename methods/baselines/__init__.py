"""Baselines for the MoE methods: controls without calibration, and published competitors."""
