"""Two-stream prefill in one paragraph."""
