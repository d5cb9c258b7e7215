"""Visual token strategies (arXiv 2410.06169): less work for the image's tokens in the decoder."""
