"""Visual token strategies of YOPO (arXiv 2410.06169)."""
