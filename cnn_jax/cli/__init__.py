"""From the words of a command line to a function call, and from a failure to one line.

commands.py   one function per command
parser.py     how the words become a call, and what is said of a mistake
"""
