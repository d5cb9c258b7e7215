"""The command line: parser, entry point, and one module per command."""
