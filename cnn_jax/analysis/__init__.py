"""What a network has learned.

layers.py  what a trained network does: layer by layer, class by class, mistake by mistake
plots.py   every picture
report.py  the page about a run; report.html is its template
"""
