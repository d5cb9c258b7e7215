"""Figures of records for papers: PNG, SVG and PDF, readable in grey and by the colour-blind."""
