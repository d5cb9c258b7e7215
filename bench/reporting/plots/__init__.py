"""Figures for papers: PNG, SVG and PDF, readable in greyscale and with colour blindness."""
