"""The machine and the process.

errors.py       the failures, and the exit code of each
signals.py      how Ctrl-C and SIGTERM reach a run
devices.py      which devices, and where compiled code is kept
distributed.py  several processes that train one run
records.py      JSON that is read against a type
streams.py      stdin, stdout and stderr, whatever becomes of them
files.py        files that are whole at any instant, and locks
display.py      the progress bar, the tables, the tutorial's lines
"""
