"""Visual token strategies of YOPO (arXiv 2410.06169) and the engine that carries them out."""
