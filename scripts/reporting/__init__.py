"""An evaluation as a user sees it: tables, plots, and files for other programs."""
