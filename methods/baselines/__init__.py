"""Methods to compare with: controls without calibration, and published competitors."""
