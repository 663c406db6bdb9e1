"""The papers' tables: data sets, what a run is told, and a row for each run that they report."""
