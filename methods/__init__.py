"""Compression methods: one folder a family, the maths apart from the adapter."""
