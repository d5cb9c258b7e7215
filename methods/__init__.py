"""Compression methods: one package per family, algorithms separate from the harness adapter."""
