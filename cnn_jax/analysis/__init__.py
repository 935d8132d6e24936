"""What a network has learned.

layers.py  runs a trained network layer by layer, and collects its confusion matrix and mistakes
plots.py   draws every picture
report.py  writes the page about a run; report.html is its template
"""

import logging

# It warns, as it is imported, where it cannot keep its list of fonts; it then makes that anew, and draws the same.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
