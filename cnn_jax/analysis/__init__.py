"""What a network has learned, which settings learn best, and what a training would do on another machine.

layers.py   runs a trained network layer by layer, and collects its confusion matrix and mistakes
plots.py    draws every picture
report.py   writes the page about a run; report.html is its template, and page.html what all pages share
diff.py     compares runs, and writes the page about that: the command `diff`; diff.html is its template
plan.py     compiles a training for devices that need not be here: the command `plan`
targets.py  the accelerators that can be compiled for
hlo.py      counts what a step starts, in XLA's optimised program
sweep.py    the search over settings, with Optuna
"""

import logging

# It warns, as it is imported, where it cannot keep its list of fonts; it then makes that anew, and draws the same.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
