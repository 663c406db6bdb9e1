"""Pixels in and out: data sets, sets of files, grids, an image from its seed."""
