"""Turns a command line into a function call, and a failure into one line.

commands.py   one function per command
interface.py  the program from Python: a trained network, and a training
parser.py     turns words into a call, and reports mistakes
"""
